"""What an examination has found, as values: for people as text, for scripts as JSON."""

from __future__ import annotations

import statistics
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

import msgspec

from vllm_disagg.core.probe import Identity, PairReport, SourceReport, WorkerReport
from vllm_disagg.doctor.diagnose import Finding, bulk, seconds_per_copy

JSON_VERSION = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Engine:
    """One engine, or why it could not be examined."""

    role: Literal["prefill", "decode"]
    number: int
    url: str
    identity: Identity | None
    finding: Finding | None = None

    @property
    def name(self) -> str:
        """As the text calls it."""
        return f"{self.role} {self.number}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Pair:
    """One decode engine reading from one prefill engine."""

    prefill: str
    decode: str
    report: PairReport | None
    findings: tuple[Finding, ...]

    @property
    def name(self) -> str:
        """As the text calls it."""
        return f"{self.decode} <- {self.prefill}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Examination:
    """All of it."""

    engines: tuple[Engine, ...]
    pairs: tuple[Pair, ...]

    def findings(self, severity: Literal["problem", "note"]) -> list[tuple[str, Finding]]:
        """Where, and what."""
        found = [(f"{engine.name} at {engine.url}", engine.finding) for engine in self.engines if engine.finding]
        found += [(pair.name, finding) for pair in self.pairs for finding in pair.findings]
        return [(where, finding) for where, finding in found if finding.severity == severity]

    @property
    def is_healthy(self) -> bool:
        """Whether nothing has to be changed."""
        return not self.findings("problem")


def as_json(examination: Examination) -> bytes:
    """One object; its keys stay as they are while `version` does."""
    return msgspec.json.encode(
        {
            "version": JSON_VERSION,
            "healthy": examination.is_healthy,
            "engines": [_engine_object(engine) for engine in examination.engines],
            "pairs": [_pair_object(pair) for pair in examination.pairs],
            "problems": [_finding_object(*found) for found in examination.findings("problem")],
            "notes": [_finding_object(*found) for found in examination.findings("note")],
        }
    )


def as_text(examination: Examination) -> Iterator[str]:
    """Lines for people."""
    for engine in examination.engines:
        yield f"{engine.name:<9} {engine.url}  {_who(engine)}"
    for pair in examination.pairs:
        yield ""
        yield pair.name
        if pair.report is not None:
            for label, text in _figures(pair.report):
                yield f"  {label:<16}{text}"
    yield ""
    for severity in ("problem", "note"):
        for where, finding in examination.findings(severity):
            yield f"{severity}: {where}: {finding.what}"
            yield f"  change: {finding.fix}"
    pairs = f"{len(examination.pairs)} pair{'s' * (len(examination.pairs) != 1)} examined"
    problems = len(examination.findings("problem"))
    yield f"healthy: {pairs}" if not problems else f"{problems} problem{'s' * (problems != 1)}, {pairs}"


def _who(engine: Engine) -> str:
    identity = engine.identity
    if identity is None:
        return "not examined"
    model = identity.fingerprint.get("model", "").split(" ")[0]
    place = f"control {identity.control.removeprefix('tcp://')}" if identity.control else ""
    return "  ".join(text for text in (identity.transport, model, place) if text)


def _figures(report: PairReport) -> Iterator[tuple[str, str]]:
    if report.round_trips_s:
        times = report.round_trips_s
        yield (
            "control channel",
            f"greeted in {1000 * report.greeting_s:.1f} ms, round trip {1000 * statistics.median(times):.2f} ms "
            f"(slowest of {len(times)}: {1000 * max(times):.1f} ms)",
        )
    if (lease := report.lease) is not None:
        told = (
            (lease.renews, "held"),
            (lease.guarded, "guarded by its nonce"),
            (lease.proves, "proven"),
            (lease.single_use, "single use"),
        )
        yield "lease", ", ".join(text if good else f"NOT {text}" for good, text in told)
    for number, worker in enumerate(report.workers):
        for source in worker.sources:
            yield from _source_figures(number, worker, source)
        if worker.error:
            yield f"worker {number}", worker.error


def _source_figures(number: int, worker: WorkerReport, source: SourceReport) -> Iterator[tuple[str, str]]:
    yield f"worker {number}", f"reads from {source.peer}"
    via = f" ({source.carrier})" if source.carrier else ""
    yield "  wire", f"{source.wire}{via}: {source.evidence}" if source.evidence else source.wire
    if source.error:
        yield "  failed", source.error
    else:
        yield "  bytes", "equal" if source.intact else "NOT EQUAL"
    for timing in source.reads:
        share = f"{timing.bytes_per_s / worker.copy_bytes_per_s:.0%}" if worker.copy_bytes_per_s else "?"
        yield (
            f"  {_size(timing.copy_bytes)} x {timing.num_copies}",
            f"{timing.bytes_per_s / 1e9:.2f} GB/s, {share} of a local copy's {worker.copy_bytes_per_s / 1e9:.1f}",
        )
    if source.reads:
        yield "  each copy", f"{seconds_per_copy(source) * 1e6:.1f} us beyond the time of its bytes"


def _size(num_bytes: int) -> str:
    return f"{num_bytes >> 20} MiB" if num_bytes >= 1 << 20 else f"{num_bytes >> 10} KiB"


def _engine_object(engine: Engine) -> dict[str, Any]:
    identity = None if engine.identity is None else msgspec.to_builtins(engine.identity)
    return {"role": engine.role, "number": engine.number, "url": engine.url, "identity": identity}


def _pair_object(pair: Pair) -> dict[str, Any]:
    report = None if pair.report is None else msgspec.to_builtins(pair.report)
    for worker, told in zip(pair.report.workers if pair.report else (), (report or {}).get("workers", ()), strict=True):
        for source, figures in zip(worker.sources, told["sources"], strict=True):
            timing = bulk(source)
            figures["bytes_per_s"] = timing.bytes_per_s if timing else 0.0
            figures["seconds_per_copy"] = seconds_per_copy(source)
    return {"prefill": pair.prefill, "decode": pair.decode, "report": report}


def _finding_object(where: str, finding: Finding) -> dict[str, str]:
    return {"where": where, "what": finding.what, "fix": finding.fix}
