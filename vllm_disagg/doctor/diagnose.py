"""What the figures of a probe mean. Pure: reports in, findings out."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Literal
from urllib.parse import urlsplit

from vllm_disagg.core.fingerprint import check_compatible
from vllm_disagg.core.probe import Identity, PairReport, ReadTiming, SourceReport, WorkerReport
from vllm_disagg.errors import IncompatiblePeer

SLOW_SHARE = 0.1
"""Below this share of a local copy's rate even a good wire is slow. Measured here, on cores shared with other work: CMA
0.2 to 0.6."""

SLOW_ROUND_TRIP_S = 0.05
DEAR_COPY_S = 50e-6
"""Time of one copy of 4 KiB, beyond that of its bytes, from which on many small blocks decide a transfer's time."""

_DOCS = "docs/transport.md, 'Choosing links'"
_FAST = ("cma", "rdma", "nccl", "memory")
_CMA_NAMES = {"cma", "sm", "shm", "all", ""}


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing that is wrong, or worth knowing. Only a `problem` makes a deployment unhealthy."""

    severity: Literal["problem", "note"]
    what: str
    fix: str


def diagnose(prefill: Identity, decode: Identity, report: PairReport) -> list[Finding]:
    """All that is to be said of one pair, the gravest first."""
    found = [*_misfits(prefill, decode, report)]
    if report.stage != "done" and not found:
        found.append(_stopped(prefill, decode, report))
    found += _reads(prefill, decode, report)
    found += _control(report)
    return sorted(found, key=lambda finding: finding.severity != "problem")


def bulk(source: SourceReport) -> ReadTiming | None:
    """The read in the longest copies."""
    return max(source.reads, key=lambda timing: timing.copy_bytes, default=None)


def seconds_per_copy(source: SourceReport) -> float:
    """What each of many small copies costs, beyond the time of its bytes at the rate of long ones."""
    long, short = bulk(source), min(source.reads, key=lambda timing: timing.copy_bytes, default=None)
    if long is None or short is None or not long.bytes_per_s:
        return 0.0
    return max(0.0, short.seconds / short.num_copies - short.copy_bytes / long.bytes_per_s)


def share_one_host(prefill: Identity, decode: Identity) -> bool:
    """Whether both run under one kernel, in containers or not."""
    boot = prefill.facts.get("boot")
    return boot is not None and boot == decode.facts.get("boot")


def _misfits(prefill: Identity, decode: Identity, report: PairReport) -> Iterator[Finding]:
    factor, ours, theirs = report.factor, report.prefill, report.decode
    if not factor:
        try:
            check_compatible(prefill.fingerprint, decode.fingerprint)
        except IncompatiblePeer as refusal:
            factor, ours, theirs = refusal.factor, refusal.ours, refusal.theirs
    if factor:
        yield Finding(
            "problem",
            f"the engines refuse each other: {factor} is {ours!r} on prefill and {theirs!r} on decode",
            f"start both with the same {factor}",
        )


def _stopped(prefill: Identity, decode: Identity, report: PairReport) -> Finding:
    details = f" ({report.error})" if report.error and report.cause else report.error
    address = prefill.control.removeprefix("tcp://")
    if report.stage == "greeting" and report.cause == "handshake_timeout":
        host = urlsplit(prefill.control).hostname or ""
        if host.startswith("127.") and not share_one_host(prefill, decode):
            return Finding(
                "problem",
                f"prefill listens for decode instances on {address} only, and decode runs on another host",
                "start prefill with --kv-control-host and its address in the private network",
            )
        return Finding(
            "problem",
            f"decode gets no answer from prefill's control channel at {address}{details}",
            "check that decode's host reaches this address and port (--kv-control-host, --kv-control-port, firewall), "
            "and that prefill's engine is not frozen",
        )
    fixes = {
        "peer_unreachable": f"look for `handshake.failed` in decode's log; {_DOCS} tells what the transport needs",
        "incompatible": "look for `handshake.refused` or `handshake.failed` in decode's log, and start both alike",
        "peer_lost": "look at prefill's log for why it ended, and run doctor again",
        "handshake_timeout": "look whether decode's workers are busy or frozen; run doctor again",
        "pull_timeout": "look whether a worker is frozen; where the link is slow or cut, see its figures",
        "peer_silent": "look whether prefill's engine is frozen or starved of processor time",
    }
    return Finding(
        "problem",
        f"the probe stopped while {report.stage}: {report.cause}{details}",
        fixes.get(report.cause, "look at decode's log; if it says nothing useful, report this with it"),
    )


def _reads(prefill: Identity, decode: Identity, report: PairReport) -> Iterator[Finding]:
    for worker in report.workers:
        if worker.error:
            yield Finding("problem", f"a worker of decode could not probe: {worker.error}", "run doctor again")
        for source in worker.sources:
            if source.error:
                yield Finding("problem", f"reading from {source.peer} failed: {source.error}", f"see {_DOCS}")
            elif not source.intact:
                yield Finding(
                    "problem",
                    f"the bytes read from {source.peer} are not the bytes it owns: answers of this pair may be wrong",
                    "take the pair out of service; try --kv-transport nccl, and another version of UCX",
                )
    slow = [finding for worker in report.workers for finding in _wires(prefill, decode, worker)]
    yield from {finding.what: finding for finding in slow}.values()  # ranks say the same, once


def _wires(prefill: Identity, decode: Identity, worker: WorkerReport) -> Iterator[Finding]:
    for source in worker.sources:
        timing = bulk(source)
        if timing is None:
            continue
        rate = f"{timing.bytes_per_s / 1e9:.2f} GB/s"
        share = timing.bytes_per_s / worker.copy_bytes_per_s if worker.copy_bytes_per_s else 1.0
        if source.wire not in _FAST and (source.wire != "unknown" or _keeps_cma_out(prefill, decode)):
            yield _slow(prefill, decode, source, rate)
        elif share < SLOW_SHARE and share_one_host(prefill, decode):
            yield Finding(
                "note",
                f"{rate} over {source.wire} is {share:.0%} of a local copy, less than it usually carries",
                "measure again when engines and memory are idle",
            )
        if source.carrier == "nixl" and source.sent_by_owner:
            yield Finding(
                "note",
                "over this wire a decode engine that ends in the middle of a read can end prefill's process with it",
                "--kv-transport auto, on both sides, takes messages here instead of NIXL",
            )
        if (each_s := seconds_per_copy(source)) > DEAR_COPY_S:
            yield Finding(
                "note",
                f"each copy of 4 KiB costs {each_s * 1e6:.0f} us beyond its bytes",
                "larger blocks (--block-size) make fewer copies",
            )


def _slow(prefill: Identity, decode: Identity, source: SourceReport, rate: str) -> Finding:
    """A wire over which bytes go through the processors or sockets of both sides."""
    wire = "gloo (TCP)" if source.wire == "gloo" else source.wire
    over = f"over {wire} at {rate}" if source.wire != "unknown" else f"at {rate}"
    why = f" ({source.evidence})" if source.evidence else ""
    if prefill.transport == "nccl":
        return Finding(
            "note",
            f"KV travels as messages {over}: --kv-transport is nccl, or auto without NIXL",
            "with NIXL installed on both sides, --kv-transport auto takes it where it is faster",
        )
    if share_one_host(prefill, decode):
        return Finding(
            "problem",
            f"slow transport: both engines are on one host, yet KV travels {over} and not by CMA{why}",
            _how_to_get_cma(prefill, decode),
        )
    settings = _settings_of(("UCX_TLS", "UCX_NET_DEVICES"), prefill, decode)
    ports = prefill.facts.get("rdma", ""), decode.facts.get("rdma", "")
    if all(ports):
        return Finding(
            "problem",
            f"slow transport: KV travels {over}, though both hosts have RDMA ({ports[0]}; {ports[1]}){why}",
            f"unset or correct {settings}" if settings else f"give the engines access to these devices; see {_DOCS}",
        )
    return Finding(
        "note",
        f"KV travels {over}; an active RDMA port is not seen on both hosts",
        f"nothing, if this is the best network there is; else see {_DOCS}",
    )


def _how_to_get_cma(prefill: Identity, decode: Identity) -> str:
    if _keeps_cma_out(prefill, decode):
        return f"unset {_settings_of(('UCX_TLS',), prefill, decode)}, and restart the engines"
    if prefill.facts.get("pid namespace") != decode.facts.get("pid namespace"):
        return f"let the two containers share a PID namespace (--pid=host), with --cap-add=SYS_PTRACE; see {_DOCS}"
    if (scope := prefill.facts.get("ptrace scope", "0")) != "0":
        return f"allow decode to read prefill's memory: ptrace_scope is {scope}; give SYS_PTRACE, or set it to 0"
    return f"run both as the same user with the right to trace (SYS_PTRACE); see {_DOCS}"


def _keeps_cma_out(prefill: Identity, decode: Identity) -> bool:
    """Whether a `UCX_TLS` of either side does not allow CMA."""
    for engine in (prefill, decode):
        value = engine.facts.get("UCX_TLS", "")
        names = {name.strip() for name in value.removeprefix("^").split(",")}
        if bool(names & _CMA_NAMES) == value.startswith("^"):
            return True
    return False


def _control(report: PairReport) -> Iterator[Finding]:
    if report.lease is not None and not report.lease.good:
        wrong = [
            text
            for good, text in (
                (report.lease.renews, "a hold was gone before its lease could have ended"),
                (report.lease.guarded, "a release with a wrong nonce was obeyed"),
                (report.lease.proves, "prefill did not confirm a hold that stood"),
                (report.lease.single_use, "a hold outlived its release"),
            )
            if not good
        ]
        yield Finding(
            "problem",
            f"leases do not hold: {'; '.join(wrong)}",
            "raise --kv-lease-s if it is below a second; else report this with both logs",
        )
    if report.round_trips_s and (median := statistics.median(report.round_trips_s)) > SLOW_ROUND_TRIP_S:
        yield Finding(
            "note",
            f"a round trip of the control channel takes {1000 * median:.0f} ms; every request needs one",
            "look whether the engines are starved of processor time, or the hosts far apart",
        )


def _settings_of(names: tuple[str, ...], prefill: Identity, decode: Identity) -> str:
    """Which of these variables are set where, for a person to read."""
    sides: Mapping[str, Identity] = {"prefill": prefill, "decode": decode}
    told = []
    for name in names:
        values = {side: engine.facts[name] for side, engine in sides.items() if name in engine.facts}
        for value in dict.fromkeys(values.values()):
            where = " and ".join(side for side in values if values[side] == value)
            told.append(f"{name}={value} in the environment of {where}")
    return ", ".join(told)
