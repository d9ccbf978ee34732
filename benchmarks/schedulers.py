"""Our schedulers against vLLM's own on the same split, on emulated accelerators.

    python -m benchmarks.schedulers --out benchmarks/results

Both sides are the same deployment (`--kv-role`, the same transport, proxy and engines; `docs/emulation.md`), one with
`--kv-scheduling phase`, one with `--kv-scheduling vllm`. They run at the same time, with the same requests, so that
whatever disturbs the machine disturbs both. Devices are slowed down (`--dilation`) until the host's share is small; all
times are converted back to the device's.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import re
import signal
import statistics
import sys
import tempfile
import urllib.request
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.emulated_goodput import late_steps
from benchmarks.load import Request, Times, drive
from benchmarks.machine import OtherLoad, fact_list, facts, table
from tests.e2e.engines import EmulatedEngine, ForkHost, Server, emulated_engine, fork_host, proxy
from vllm_disagg.core.keys import create_key_file
from vllm_disagg.core.latency import work_of
from vllm_disagg.profiles import load_profile

PROFILE = "llama-3-8b-a100-80g"
LATENCY = load_profile(PROFILE).entry(1).latency
SIDES = ("vllm", "phase")
BLOCK_SIZE = 16
Figures = dict[str, float]


def prompt_s(tokens: int) -> float:
    """How long the device computes one prompt alone."""
    return LATENCY.step_s(work_of([(0, tokens)]))


def words(rng: np.random.Generator, length: int) -> tuple[int, ...]:
    return tuple(rng.integers(5000, 27000, int(length)).tolist())


@dataclass(frozen=True, kw_only=True)
class Row:
    """One comparison. Times are the device's.

    Args:
        name: one word.
        what: one sentence.
        requests: of one repetition, by its number; times in seconds.
        figures: what is read off a side's times, and its decode engine's metrics at the end.
        split: through the proxy over both engines, or to the decode instance alone.
        warm: requests before, by repetition.
        flags: of our side's engines, by role, with the dilation.
        both_flags: of both sides' decode engine.
    """

    name: str
    what: str
    requests: Callable[[int], list[Request]]
    figures: Callable[[Sequence[Times], dict[str, float], Sequence[Request]], Figures]
    warm: Callable[[int], list[Request]]
    split: bool = True
    flags: Callable[[str, float], list[str]] = lambda role, k: []
    both_flags: tuple[str, ...] = ()


# A. Streams while prompts are computed beside them.

STREAMS, RECOMPUTES, RECOMPUTED_TOKENS = 32, 5, 1500
SETTLED_S = 0.6


def stream_requests(repetition: int) -> list[Request]:
    rng = np.random.default_rng([1, repetition])
    streams = [Request(at_s=0.0, prompt=words(rng, 64), num_output_tokens=220) for _ in range(STREAMS)]
    late = [
        Request(
            at_s=0.8 + 0.35 * number + float(rng.uniform(0, 0.2)),
            prompt=words(rng, RECOMPUTED_TOKENS),
            num_output_tokens=2,
        )
        for number in range(RECOMPUTES)
    ]
    return [*streams, *late]


def stream_figures(
    times: Sequence[Times],
    metrics: dict[str, float],
    requests: Sequence[Request],
    *,
    streams: int = STREAMS,
    settled_s: float = SETTLED_S,
) -> Figures:
    gaps = [
        later - earlier
        for one in times[:streams]
        for earlier, later in zip(one.token_times_s, one.token_times_s[1:], strict=False)
        if earlier >= settled_s
    ]
    return {
        "ITL p99, ms": 1e3 * float(np.quantile(gaps, 0.99)),
        "ITL p50, ms": 1e3 * float(np.quantile(gaps, 0.5)),
        "total, s": max(request.at_s + one.token_times_s[-1] for one, request in zip(times, requests, strict=True)),
        "TTFT of the prompts, ms": 1e3 * statistics.mean(one.ttft_s for one in times[streams:]),
    }


def stream_warm(repetition: int) -> list[Request]:
    rng = np.random.default_rng([2, repetition])
    return [
        *(Request(at_s=0.0, prompt=words(rng, 64), num_output_tokens=60) for _ in range(8)),
        Request(at_s=0.3, prompt=words(rng, 600), num_output_tokens=2),
    ]


# B. Half the memory.

HALF_REQUESTS = 96
HALF_BLOCKS = HALF_REQUESTS * (320 + 256) // 2 // BLOCK_SIZE


def memory_requests(repetition: int, number: int = HALF_REQUESTS, seed: int = 3) -> list[Request]:
    rng = np.random.default_rng([seed, repetition])
    return [
        Request(at_s=0.02 * place, prompt=words(rng, rng.integers(128, 513)), num_output_tokens=1024, may_end=True)
        for place in range(number)
    ]


def memory_figures(times: Sequence[Times], metrics: dict[str, float], requests: Sequence[Request]) -> Figures:
    end_s = max(request.at_s + one.token_times_s[-1] for one, request in zip(times, requests, strict=True))
    tokens = sum(len(one.token_times_s) for one in times)
    return {
        "preempted tokens": metrics.get("vllm_disagg_sched_preempted_tokens_total", 0.0),
        "output tokens/s": tokens / end_s,
        "output tokens": float(tokens),
        "TTFT p90, s": float(np.quantile([one.ttft_s for one in times], 0.9)),
        "TPOT p90, ms": 1e3 * float(np.quantile([one.tpot_s for one in times if len(one.token_times_s) > 1], 0.9)),
    }


# C. Deadlines.

EDF_LOAD, EDF_REQUESTS, PATIENCE_S = 0.8, 120, 3.0


def target_s(tokens: int) -> float:
    return 0.1 + 3 * prompt_s(tokens)


def edf_requests(repetition: int) -> list[Request]:
    rng = np.random.default_rng([4, repetition])
    lengths = rng.integers(64, 2033, EDF_REQUESTS)
    mean_s = statistics.mean(prompt_s(int(length)) for length in rng.integers(64, 2033, 4000))
    at = np.cumsum(rng.exponential(mean_s / EDF_LOAD, EDF_REQUESTS))
    return [
        Request(at_s=float(at_s), prompt=words(rng, length), num_output_tokens=4, extra={"slo": target_s(int(length))})
        for at_s, length in zip(at, lengths, strict=True)
    ]


def edf_figures(times: Sequence[Times], metrics: dict[str, float], requests: Sequence[Request]) -> Figures:
    met = [one.ttft_s <= request.extra["slo"] for one, request in zip(times, requests, strict=True)]
    return {
        "TTFT met, %": 100 * statistics.mean(met),
        "TTFT p50, ms": 1e3 * float(np.quantile([one.ttft_s for one in times], 0.5)),
        "longest TTFT, s": max(one.ttft_s for one in times),
        "beyond the bound": float(
            sum(one.ttft_s > bound for one, bound in zip(times, waiting_bounds_s(times, requests), strict=True))
        ),
    }


def waiting_bounds_s(times: Sequence[Times], requests: Sequence[Request]) -> list[float]:
    """How long each request may wait for its first token by the rule of patience (`docs/scheduling.md`): the patience,
    then the prompts that came before it and were still there when it came; before that the step that had begun, after
    it its own one, the hand-over and decode's step."""
    longest_s = max(prompt_s(len(request.prompt)) for request in requests)
    first_s = [request.at_s + one.ttft_s for request, one in zip(requests, times, strict=True)]
    bounds = []
    for place, request in enumerate(requests):
        before = (other for other in range(place) if first_s[other] > request.at_s)
        backlog_s = sum(prompt_s(len(requests[other].prompt)) for other in before)
        bounds.append(PATIENCE_S + backlog_s + longest_s + prompt_s(len(request.prompt)) + 0.1)
    return bounds


def plain_warm(repetition: int) -> list[Request]:
    rng = np.random.default_rng([5, repetition])
    return [Request(at_s=0.12 * place, prompt=words(rng, 256), num_output_tokens=24) for place in range(40)]


# D. Nothing to gain.


def plain_requests(repetition: int) -> list[Request]:
    rng = np.random.default_rng([6, repetition])
    at = np.cumsum(rng.exponential(1 / 2.5, 30))
    return [Request(at_s=float(at_s), prompt=words(rng, 256), num_output_tokens=64) for at_s in at]


def plain_figures(times: Sequence[Times], metrics: dict[str, float], requests: Sequence[Request]) -> Figures:
    ttft, tpot = [1e3 * one.ttft_s for one in times], [1e3 * one.tpot_s for one in times]
    whole = [1e3 * one.token_times_s[-1] for one in times]
    return {
        "TTFT p50, ms": float(np.quantile(ttft, 0.5)),
        "TTFT p90, ms": float(np.quantile(ttft, 0.9)),
        "TPOT p50, ms": float(np.quantile(tpot, 0.5)),
        "TPOT p90, ms": float(np.quantile(tpot, 0.9)),
        "whole answer p50, ms": float(np.quantile(whole, 0.5)),
    }


ROWS = (
    Row(
        name="pace",
        what=f"{STREAMS} streams on decode, {RECOMPUTES} prompts of {RECOMPUTED_TOKENS} tokens are computed beside "
        "them; TPOT target 30 ms",
        requests=stream_requests,
        figures=stream_figures,
        warm=stream_warm,
        split=False,
        flags=lambda role, k: ["--kv-slo-tpot-s", str(0.03 * k)],
    ),
    Row(
        name="memory",
        what=f"{HALF_REQUESTS} requests, of which decode's cache ({HALF_BLOCKS} blocks) holds half at their mean "
        "length; nobody knows how long an answer gets",
        requests=memory_requests,
        figures=memory_figures,
        warm=lambda repetition: memory_requests(repetition, 24, 7),
        both_flags=("--num-gpu-blocks-override", str(HALF_BLOCKS + 1), "--emulate-output-tokens", "256"),
    ),
    Row(
        name="deadlines",
        what=f"prompts of 64 to 2,032 tokens at {EDF_LOAD:.0%} of what prefill can do; each is promised 0.1 s + three "
        f"times its own time alone; patience {PATIENCE_S:g} s",
        requests=edf_requests,
        figures=edf_figures,
        warm=plain_warm,
        flags=lambda role, k: (
            ["--kv-prefill-order", "edf", "--kv-patience-s", str(PATIENCE_S * k)] if role == "prefill" else []
        ),
    ),
    Row(
        name="plain",
        what="prompts of 256 tokens, answers of 64, 2.5 requests/s: nothing to gain",
        requests=plain_requests,
        figures=plain_figures,
        warm=plain_warm,
    ),
)


def start(stack: ExitStack, row: Row, side: str, host: ForkHost, folder: Path, k: float) -> tuple[str, EmulatedEngine]:
    """Bring one side up. Returns where it takes requests, and its decode engine."""
    folder.mkdir()
    key_file = folder / "key"
    create_key_file(key_file)
    shared = [
        "--dilation", str(k), "--emulate-link", "nvlink", "--emulate-link-ledger", str(folder / "links"),
        "--kv-lease-s", str(30 * k), "--kv-pull-timeout-s", str(10 * k), "--kv-scheduling", side,
        "--no-kv-back-pressure",
    ]  # fmt: skip
    ours = ["--kv-profile", PROFILE, "--kv-slo-ttft-s", str(2 * k), "--kv-slo-tpot-s", str(0.1 * k)]

    def engine(role: str) -> EmulatedEngine:
        flags = [*shared, *(row.both_flags if role == "decode" else ())]
        flags += [*ours, *row.flags(role, k)] if side == "phase" else []
        made = emulated_engine(
            role, host=host, folder=folder, key_file=key_file, role=role, profile=PROFILE, block_size=BLOCK_SIZE,
            flags=flags,
        )  # fmt: skip
        stack.callback(made.kill)
        made.start()
        return made

    decode = engine("decode")
    if not row.split:
        decode.wait_until_ready()
        return decode.url, decode
    prefill = engine("prefill")
    for server in (prefill, decode):
        server.wait_until_ready()
    patience = ["--prefill-timeout-s", str(600 * k), "--first-event-timeout-s", str(600 * k)]
    front = proxy(prefill=[prefill], decode=[decode], folder=folder, flags=patience)
    stack.callback(front.kill)
    front.start()
    front.wait_until_ready("/ready")
    return front.url, decode


def dilated(requests: Sequence[Request], k: float) -> list[Request]:
    """As they are sent: in the host's time, and with their targets as hints."""
    return [
        Request(
            at_s=request.at_s * k,
            prompt=request.prompt,
            num_output_tokens=request.num_output_tokens,
            may_end=request.may_end,
            extra={"vllm_xargs": {"slo_ttft_ms": 1e3 * k * request.extra["slo"]}} if request.extra else {},
        )
        for request in requests
    ]


def undilated(times: Sequence[Times], k: float) -> list[Times]:
    return [
        Times(
            num_prompt_tokens=one.num_prompt_tokens,
            num_output_tokens=one.num_output_tokens,
            sent_late_s=one.sent_late_s / k,
            token_times_s=tuple(value / k for value in one.token_times_s),
            route=one.route,
            error=one.error,
        )
        for one in times
    ]


def metrics_of(engine: Server) -> dict[str, float]:
    """The engine's counters, over all labels."""
    with urllib.request.urlopen(engine.url + "/metrics", timeout=30) as answer:
        text = answer.read().decode()
    found: dict[str, float] = {}
    for name, value in re.findall(r"^(\w+)(?:\{[^}]*\})? (\S+)$", text, re.MULTILINE):
        found[name] = found.get(name, 0.0) + float(value)
    return found


class Side:
    """One deployment of a row, which serves all repetitions.

    Args:
        row: what is compared.
        name: its `--kv-scheduling`.
        url: where it takes requests.
        decode: whose metrics count.
    """

    def __init__(self, row: Row, name: str, url: str, decode: EmulatedEngine, k: float) -> None:
        self._row, self.name, self._url, self._decode, self._k = row, name, url, decode, k

    async def warm(self) -> None:
        """Let it see what its requests are like."""
        await self._drive(self._row.warm(0))

    async def run(self, repetition: int) -> Figures:
        """One repetition."""
        before = await asyncio.to_thread(metrics_of, self._decode)
        requests = self._row.requests(repetition)
        times = undilated(await self._drive(requests), self._k)
        after = await asyncio.to_thread(metrics_of, self._decode)
        counted = {name: value - before.get(name, 0.0) for name, value in after.items()}
        return self._row.figures(times, counted, requests)

    async def _drive(self, requests: Sequence[Request]) -> list[Times]:
        times = await drive([self._url], dilated(requests, self._k), timeout_s=1800)
        if failed := [one.error for one in times if one.error]:
            raise SystemExit(f"{self._row.name} {self.name}: {len(failed)} requests failed: {failed[0]}")
        return times


async def run_row(row: Row, host: ForkHost, folder: Path, options: argparse.Namespace) -> list[dict[str, Figures]]:
    """All repetitions of a row. In each, both sides begin at the same time."""
    results: list[dict[str, Figures]] = []
    with ExitStack() as stack:
        starting = (
            asyncio.to_thread(start, stack, row, side, host, folder / f"{row.name}-{side}", options.dilation)
            for side in SIDES
        )
        started = zip(SIDES, await asyncio.gather(*starting), strict=True)
        sides = [Side(row, name, url, decode, options.dilation) for name, (url, decode) in started]
        await asyncio.gather(*(side.warm() for side in sides))
        for repetition in range(options.repetitions):
            found = await asyncio.gather(*(side.run(repetition) for side in sides))
            results.append({side.name: figures for side, figures in zip(sides, found, strict=True)})
            print(row.name, repetition, json.dumps(results[-1]), flush=True)
    return results


def run(row: Row, options: argparse.Namespace) -> tuple[list[dict[str, Figures]], str]:
    """A row's figures, and how punctual its devices were."""
    with tempfile.TemporaryDirectory() as name, ExitStack() as stack:
        folder = Path(name)
        host = fork_host(folder)
        stack.callback(host.kill)
        host.start()
        host.wait_until_ready()
        results = asyncio.run(run_row(row, host, folder, options))
        late = ", ".join(f"{late_steps(folder / f'{row.name}-{side}')} with `{side}`" for side in SIDES)
    return results, f"steps for which the host took longer than the device: {late}"


ABOUT = (
    f"**Emulated**: {PROFILE}, step times a guess (see its `source`), link nvlink, over HTTP and with real waiting, "
    "slowed down k times. In each repetition both sides ran at the same time on the same requests. Medians, least and "
    "most in brackets. Times are the device's."
)


def report(
    results: dict[str, list[dict[str, Figures]]], found: dict[str, str], about: str, rows: Sequence[Row] = ROWS
) -> str:
    """As Markdown, where one run has measured all rows."""
    parts = [TITLE, "", about, ""]
    for row in rows:
        if runs := results.get(row.name):
            parts += section(row, runs)
    return "\n".join([*parts, fact_list(found), ""])


def section(row: Row, runs: Sequence[dict[str, Figures]]) -> list[str]:
    """Medians of the repetitions with least and most, and the same of the ratios of pairs."""
    lines = []
    for name in runs[0]["vllm"]:
        stock, ours = ([run[side][name] for run in runs] for side in SIDES)
        ratios = [b / a if a else float("nan") for a, b in zip(stock, ours, strict=True)]
        ratio = _spread(ratios, digits=3) if all(stock) else ""
        lines.append((name, _spread(stock), _spread(ours), ratio))
    head = ("", "`--kv-scheduling vllm`", "`phase`", "phase / vllm")
    return [f"## {row.name}", "", f"{row.what[0].upper()}{row.what[1:]}.", "", table(head, lines), ""]


def _spread(values: Sequence[float], digits: int = 1) -> str:
    return f"{statistics.median(values):.{digits}f} ({min(values):.{digits}f}-{max(values):.{digits}f})"


TITLE = "# Our schedulers against vLLM's own, on the same split"


def publish(folder: Path, measured: dict[str, dict[str, Any]]) -> None:
    """Write the result; rows that this run has not measured stay as they were, each with its own facts."""
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / "schedulers.json"
    known = json.loads(file.read_text()) if file.exists() else {}
    known |= measured
    parts = [TITLE, "", ABOUT, ""]
    for row in ROWS:
        if (of_row := known.get(row.name)) is not None:
            parts += [*section(row, of_row["runs"]), fact_list(of_row["facts"]), ""]
    file.write_text(json.dumps(known, indent=1) + "\n")
    (folder / "schedulers.md").write_text("\n".join(parts))


def read_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", nargs="+", default=[row.name for row in ROWS], choices=[row.name for row in ROWS])
    parser.add_argument("--repetitions", type=int, default=3)
    parser.add_argument("--dilation", type=float, default=10.0)
    parser.add_argument("--out", type=Path, default=None, help="folder for the result; nothing is written without it")
    return parser.parse_args()


def main() -> None:
    options = read_options()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # so that the engines end with us
    for row in (row for row in ROWS if row.name in options.rows):
        with OtherLoad() as other_load:
            runs, punctual = run(row, options)
        found = {
            "dilation": f"k = {options.dilation:g}; {options.repetitions} repetitions",
            **facts("benchmarks.schedulers", other_load),
            "punctuality": punctual,
        }
        print("\n".join([*section(row, runs), fact_list(found), ""]), flush=True)
        if options.out is not None:
            publish(options.out, {row.name: {"facts": found, "runs": runs}})


if __name__ == "__main__":
    main()
