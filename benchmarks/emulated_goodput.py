"""SLO attainment over the request rate: split against colocated vLLM, on emulated A100s.

    taskset -c 0,1 python -m benchmarks.emulated_goodput

vLLM's own engines with emulated devices (`docs/emulation.md`): scheduling, KV blocks, transfers, HTTP and the proxy are
real, the time of a step and of a transfer is modelled. Every cell, a system at a rate, has engines of its own and gets
Poisson arrivals that do not wait for answers, with lengths around those of ShareGPT. Several cells run at once; devices
are slowed down (`--dilation`) until the host's share is small, and times are converted back.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import re
import statistics
import tempfile
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.load import Request, Times, drive
from benchmarks.machine import OtherLoad, fact_list, facts, table
from tests.e2e.engines import EmulatedEngine, ForkHost, Server, emulated_engine, fork_host, proxy
from vllm_disagg.core.keys import create_key_file
from vllm_disagg.core.slo import SLO
from vllm_disagg.profiles import load_profile
from vllm_disagg.sim.lengths import SURROGATES, make_workload

GOAL = 0.9
PAPER = {"DistServe": 2.30, "vLLM 0.2": 0.50}
"""Per-GPU goodput of OPT-13B on ShareGPT in DistServe's Figure 8a, requests/s at 90 % attainment; SLO 0.25 s, 0.1 s."""


@dataclass(frozen=True, kw_only=True)
class System:
    """A deployment. Without prefill instances it is plain vLLM."""

    name: str
    prefill: int
    decode: int
    rates: tuple[float, ...]
    """Requests per second and GPU."""
    prefill_tp: int = 1
    decode_tp: int = 1

    @property
    def num_gpus(self) -> int:
        return self.prefill * self.prefill_tp + self.decode * self.decode_tp


SYSTEMS = (
    System(name="colocated", prefill=0, decode=1, rates=(1.0, 1.5, 2.0, 2.5, 3.0, 3.5)),
    System(name="split 2P1D", prefill=2, decode=1, rates=(1.0, 1.25, 1.5, 2.0, 2.5)),
    System(name="split 1P(TP2) 1D", prefill=1, prefill_tp=2, decode=1, rates=(1.0, 1.25, 1.5, 2.0, 2.5)),
)
"""The last is the paper's placement of this model (Table 3). All use one GPU per TP rank."""


@dataclass(frozen=True, kw_only=True)
class Cell:
    """What one system did at one rate and one seed, in the devices' own time."""

    system: str
    rate_per_gpu: float
    seed: int
    ttft_s: tuple[float, ...]
    tpot_s: tuple[float, ...]
    attainment: float
    ttft_attainment: float
    tpot_attainment: float
    num_requests: int
    num_failed: int
    num_local: int
    late_steps: int


def requests_of(system: System, rate_per_gpu: float, options: argparse.Namespace, seed: int) -> list[Request]:
    """The load of a cell, in the host's time. One seed, the same lengths and tokens at every rate."""
    workload = make_workload(
        SURROGATES[options.lengths],
        num_requests=options.requests_per_gpu * system.num_gpus,
        rate=rate_per_gpu * system.num_gpus,
        seed=seed,
    )
    tokens = np.random.default_rng([seed, 99])
    return [
        Request(
            at_s=float(at_s) * options.dilation,
            prompt=tuple(tokens.integers(5000, 27000, int(prompt)).tolist()),
            num_output_tokens=max(2, int(output)),
        )
        for at_s, prompt, output in zip(workload.arrival_s, workload.prompt_tokens, workload.output_tokens, strict=True)
    ]


def start(stack: ExitStack, system: System, host: ForkHost, folder: Path, options: argparse.Namespace) -> str:
    """Bring a system up. Returns where it takes requests."""
    folder.mkdir()
    key_file = folder / "key"
    create_key_file(key_file)
    k = options.dilation
    flags = ["--dilation", str(k)]
    split_flags = [
        *flags, "--emulate-link", options.link, "--emulate-link-ledger", str(folder / "links"),
        "--kv-lease-s", str(30 * k), "--kv-pull-timeout-s", str(10 * k),
    ]  # fmt: skip

    def engine(name: str, role: str | None, tp: int = 1) -> EmulatedEngine:
        made = emulated_engine(
            name, host=host, folder=folder, key_file=key_file, role=role, profile=options.profile, block_size=16,
            flags=[*(flags if role is None else split_flags), "--tensor-parallel-size", str(tp)],
        )  # fmt: skip
        stack.callback(made.kill)
        made.start()
        return made

    if not system.prefill:
        plain = engine("plain", None)
        plain.wait_until_ready()
        return plain.url
    prefill = [engine(f"prefill-{index}", "prefill", system.prefill_tp) for index in range(system.prefill)]
    decode = [engine(f"decode-{index}", "decode", system.decode_tp) for index in range(system.decode)]
    for server in (*prefill, *decode):
        server.wait_until_ready()
    patience = ["--prefill-timeout-s", str(600 * k), "--first-event-timeout-s", str(600 * k)]
    front: Server = proxy(prefill=prefill, decode=decode, folder=folder, flags=patience)
    stack.callback(front.kill)
    front.start()
    front.wait_until_ready("/ready")
    return front.url


async def run_cell(
    system: System, rate_per_gpu: float, seed: int, host: ForkHost, folder: Path, options: argparse.Namespace
) -> Cell:
    """Start a system, drive it, and take it down."""
    with ExitStack() as stack:
        url = await asyncio.to_thread(start, stack, system, host, folder, options)
        warm = requests_of(system, 4.0, options, 12345)[: 2 * system.num_gpus]
        await drive([url], warm, timeout_s=options.timeout_s)
        times = await drive([url], requests_of(system, rate_per_gpu, options, seed), timeout_s=options.timeout_s)
    for error in sorted({one.error for one in times if one.error}):
        print(f"{system.name} {rate_per_gpu:g}/s/GPU seed {seed}: {error}", flush=True)
    late = await asyncio.to_thread(late_steps, folder)
    return judged(system, rate_per_gpu, seed, times, late, options)


def late_steps(folder: Path) -> int:
    """Steps for which the host took longer than the device would have, as far as the engines have said so."""
    texts = (log.read_text(errors="replace") for log in folder.glob("*.log"))
    return sum(int(found) for text in texts for found in re.findall(r"late_steps=(\d+)", text))


def judged(
    system: System, rate_per_gpu: float, seed: int, times: Sequence[Times], late: int, options: argparse.Namespace
) -> Cell:
    """Convert back to the devices' time and hold against the SLO."""
    slo, k = SLO(ttft_s=options.ttft_s, tpot_s=options.tpot_s), options.dilation
    good = [one for one in times if not one.error]
    met = [(one.ttft_s / k <= slo.ttft_s, one.tpot_s / k <= slo.tpot_s) for one in good]
    return Cell(
        system=system.name,
        rate_per_gpu=rate_per_gpu,
        seed=seed,
        ttft_s=tuple(one.ttft_s / k for one in good),
        tpot_s=tuple(one.tpot_s / k for one in good),
        attainment=sum(both[0] and both[1] for both in met) / len(times),
        ttft_attainment=sum(both[0] for both in met) / len(times),
        tpot_attainment=sum(both[1] for both in met) / len(times),
        num_requests=len(times),
        num_failed=len(times) - len(good),
        num_local=sum(one.route == "local" for one in times),
        late_steps=late,
    )


def goodput(cells: Sequence[Cell], goal: float = GOAL) -> float | None:
    """Highest rate per GPU at which the goal is met, between two rates by linear interpolation, as DistServe reads it;
    None when it is met at none. At least the highest rate when it is met at all."""
    by_rate = sorted({cell.rate_per_gpu for cell in cells})
    shares = [statistics.mean(cell.attainment for cell in cells if cell.rate_per_gpu == rate) for rate in by_rate]
    best = None
    for index, (rate, share) in enumerate(zip(by_rate, shares, strict=True)):
        if share >= goal:
            best = rate
        elif best is not None:
            before = shares[index - 1]
            return by_rate[index - 1] + (rate - by_rate[index - 1]) * (before - goal) / (before - share)
    return best


async def run(options: argparse.Namespace) -> list[Cell]:
    """All cells, some at a time."""
    gate = asyncio.Semaphore(options.at_once)
    chosen = [system for system in SYSTEMS if system.name in options.systems]
    with tempfile.TemporaryDirectory() as name, ExitStack() as stack:
        host = fork_host(Path(name))
        stack.callback(host.kill)
        host.start()
        await asyncio.to_thread(host.wait_until_ready)

        async def one(system: System, rate: float, seed: int) -> Cell:
            async with gate:
                folder = Path(name) / f"{SYSTEMS.index(system)}-{rate:g}-{seed}"
                cell = await run_cell(system, rate, seed, host, folder, options)
            print(
                f"{system.name} {rate:g}/s/GPU seed {seed}: attainment {cell.attainment:.1%} (TTFT "
                f"{cell.ttft_attainment:.1%}, TPOT {cell.tpot_attainment:.1%}), failed {cell.num_failed}, "
                f"local {cell.num_local}, late steps {cell.late_steps}",
                flush=True,
            )
            return cell

        cells = [(system, rate, seed) for seed in range(options.seeds) for system in chosen for rate in system.rates]
        return list(await asyncio.gather(*(one(*cell) for cell in cells)))


def report(cells: Sequence[Cell], found: dict[str, str], options: argparse.Namespace) -> str:
    """The result as Markdown."""
    profile = load_profile(options.profile)
    rows = []
    for system in SYSTEMS:
        for rate in system.rates:
            mine = [cell for cell in cells if (cell.system, cell.rate_per_gpu) == (system.name, rate)]
            if mine:
                rows.append(_row(system, rate, mine))
    goodputs = {
        system.name: goodput([cell for cell in cells if cell.system == system.name])
        for system in SYSTEMS
        if any(cell.system == system.name for cell in cells)
    }
    paper = ", ".join(f"{name} {value:.2f}" for name, value in PAPER.items())
    lines = [
        f"- {name}: {'below its lowest rate' if value is None else f'{value:.2f}'}" for name, value in goodputs.items()
    ]
    return "\n".join(
        [
            f"# Emulated goodput: {profile.model.name} on {profile.device}",
            "",
            "**Emulated**: vLLM's own engines, no model computed; step times from the profile "
            f"({profile.kind}), dilation k = {options.dilation:g}. SLO: TTFT {options.ttft_s:g} s and TPOT "
            f"{options.tpot_s:g} s on the same request. {SURROGATES[options.lengths].source}. "
            f"{options.requests_per_gpu} requests per GPU and run, {options.seeds} seed(s), link {options.link}.",
            "",
            f"Goodput (requests/s per GPU at {GOAL:.0%} attainment):",
            "",
            *lines,
            f"- for comparison, the paper's Figure 8a: {paper}",
            "",
            table(
                ("system", "rate per GPU", "attainment", "TTFT met", "TPOT met", "TTFT p50 / p90, ms",
                 "TPOT p50 / p90, ms", "failed", "local", "late steps"),
                rows,
            ),
            "",
            fact_list(found),
            "",
        ]
    )  # fmt: skip


def _row(system: System, rate: float, cells: Sequence[Cell]) -> list[str]:
    ttft = np.concatenate([cell.ttft_s for cell in cells]) * 1e3
    tpot = np.concatenate([cell.tpot_s for cell in cells]) * 1e3
    shares = [cell.attainment for cell in cells]
    spread = f" ({min(shares):.0%}-{max(shares):.0%})" if len(shares) > 1 else ""
    return [
        system.name,
        f"{rate:g}",
        f"{statistics.mean(shares):.1%}{spread}",
        f"{statistics.mean(cell.ttft_attainment for cell in cells):.1%}",
        f"{statistics.mean(cell.tpot_attainment for cell in cells):.1%}",
        " / ".join(f"{value:.0f}" for value in np.quantile(ttft, (0.5, 0.9))),
        " / ".join(f"{value:.0f}" for value in np.quantile(tpot, (0.5, 0.9))),
        str(sum(cell.num_failed for cell in cells)),
        str(sum(cell.num_local for cell in cells)),
        str(sum(cell.late_steps for cell in cells)),
    ]


def draw(cells: Sequence[Cell], path: Path, options: argparse.Namespace) -> None:
    """Attainment over the rate per GPU, with the paper's crossings."""
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams["svg.hashsalt"] = "vllm-disagg"
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(7, 3.6))
    for system in SYSTEMS:
        mine = [cell for cell in cells if cell.system == system.name]
        rates = sorted({cell.rate_per_gpu for cell in mine})
        of_rate = [[100 * cell.attainment for cell in mine if cell.rate_per_gpu == rate] for rate in rates]
        if rates:
            (line,) = axes.plot(rates, [statistics.mean(shares) for shares in of_rate], marker="o", label=system.name)
            axes.fill_between(
                rates, list(map(min, of_rate)), list(map(max, of_rate)), color=line.get_color(), alpha=0.15
            )
    axes.axhline(100 * GOAL, color="0.6", linewidth=0.8)
    for (name, rate), marker in zip(PAPER.items(), "D^", strict=True):
        axes.plot([rate], [100 * GOAL], marker=marker, color="0.3", linestyle="none", label=f"{name}, paper's Fig. 8a")
    axes.set_xlabel("requests/s per GPU")
    axes.set_ylabel("SLO attainment, %")
    axes.set_ylim(0, 102)
    axes.set_title(
        f"emulated OPT-13B on A100s, ShareGPT-like lengths, k = {options.dilation:g}, "
        f"TTFT {options.ttft_s:g} s, TPOT {options.tpot_s:g} s",
        fontsize=9,
    )
    axes.legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(path, metadata={"Date": None})


def read_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--profile", default="opt-13b-a100-80g")
    parser.add_argument("--lengths", default="sharegpt-like", choices=sorted(SURROGATES))
    parser.add_argument("--systems", nargs="+", default=[system.name for system in SYSTEMS])
    parser.add_argument("--dilation", type=float, default=4.0)
    parser.add_argument("--link", default="nvlink")
    parser.add_argument("--ttft-s", type=float, default=0.25)
    parser.add_argument("--tpot-s", type=float, default=0.1)
    parser.add_argument("--requests-per-gpu", type=int, default=100)
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--at-once", type=int, default=3, help="cells that run at a time")
    parser.add_argument("--timeout-s", type=float, default=1200.0, help="of a request, in the host's time")
    parser.add_argument("--out", type=Path, default=None, help="folder for the result; nothing is written without it")
    return parser.parse_args()


def main() -> None:
    options = read_options()
    with OtherLoad() as other_load:
        cells = asyncio.run(run(options))
    found = facts("benchmarks.emulated_goodput", other_load)
    text = report(cells, found, options)
    print(text)
    if options.out is not None:
        options.out.mkdir(parents=True, exist_ok=True)
        (options.out / "emulated_goodput.md").write_text(text)
        shown: list[dict[str, Any]] = [
            {
                **{name: getattr(cell, name) for name in Cell.__dataclass_fields__ if name not in ("ttft_s", "tpot_s")},
                "ttft_ms": [round(1e3 * value, 2) for value in cell.ttft_s],
                "tpot_ms": [round(1e3 * value, 3) for value in cell.tpot_s],
            }
            for cell in cells
        ]
        document = {"facts": found, "options": {k: str(v) for k, v in vars(options).items()}, "cells": shown}
        (options.out / "emulated_goodput.json").write_text(json.dumps(document) + "\n")
        draw(cells, options.out / "emulated_goodput.svg", options)


if __name__ == "__main__":
    main()
