"""One drawing for each rule of `docs/scheduling.md`, from the steps that vLLM's scheduler has really made.

    python -m benchmarks.scheduling_timelines --out benchmarks/results

The engines are those of `benchmarks.schedulers_virtual`: vLLM's own EngineCore and scheduler, once with
`--kv-scheduling vllm` and once with `phase`; a step takes what a profile says. Each case is small enough to be followed
with the eye. The drawings show what was computed when; nothing in them is drawn by hand.
"""

from __future__ import annotations

import argparse
import logging
import statistics
import tempfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.load import Request, Times
from benchmarks.schedulers import BLOCK_SIZE, LATENCY, ROWS, SIDES, Row, words
from benchmarks.schedulers_virtual import Deployment, Moment
from vllm_disagg.core.scheduling.pace import critical_length

MOST_BYTES = 60 * 1024
COMPUTES, WAITS, AGAIN, LOST = "#3b6ea5", "#d9dee5", "#e08a3c", "#c0392b"
STREAMS_ALONE = "#b8c0ca"

Bar = tuple[float, float, float, float]
"""x, y, width, height."""


@dataclass(frozen=True, kw_only=True)
class Run:
    """What one deployment did, with the client's number for each request's name."""

    requests: Sequence[Request]
    times: Sequence[Times]
    prefill: Sequence[Moment]
    decode: Sequence[Moment]
    counters: Mapping[str, float]

    @property
    def ttft_ms(self) -> float:
        """Mean time to the first token."""
        return 1e3 * statistics.mean(one.ttft_s for one in self.times)


def run(
    requests: Sequence[Request],
    side: str = "phase",
    *,
    prefill: Sequence[str] = (),
    decode: Sequence[str] = (),
    both: Sequence[str] = (),
    split: bool = True,
) -> Run:
    """Serve requests on a fresh pair.

    Args:
        requests: what is asked, by the device's clock.
        side: `--kv-scheduling`.
        prefill, decode: more flags of our side's engines.
        both: more flags of the decode engine, whoever schedules.
        split: over both engines, or on decode alone.
    """
    row = replace(
        ROWS[0],
        flags=lambda role, k: list(prefill if role == "prefill" else decode),
        both_flags=tuple(both),
        split=split,
    )
    with tempfile.TemporaryDirectory() as name:
        deployment = Deployment(row, side, Path(name))
        times = deployment.run(requests, split=split)
        number = {request: str(index) for request, (index, _) in deployment.place.items()}
        found = Run(
            requests=requests,
            times=times,
            prefill=[_numbered(moment, number) for moment in deployment.prefill.moments],
            decode=[_numbered(moment, number) for moment in deployment.decode.moments],
            counters=deployment.counters(),
        )
        deployment.stop()
    return found


def _numbered(moment: Moment, number: Mapping[str, str]) -> Moment:
    def known(names: Iterable[str]) -> tuple[str, ...]:
        return tuple(number[name] for name in names)

    return replace(
        moment,
        tokens=tuple((number[name], count) for name, count in moment.tokens),
        preempted=known(moment.preempted),
        kv_here=known(moment.kv_here),
        waiting=known(moment.waiting),
    )


# Order.

PROMISED = (
    (0.00, 1900, 1.40), (0.01, 1200, 0.55), (0.02, 300, 1.20), (0.03, 800, 0.24), (0.04, 200, 0.60), (0.05, 500, 0.30),
)  # fmt: skip
"""When a prompt comes, how many tokens it has, and when its first token is due, counted from its arrival."""


def order(plt: Any) -> Any:
    """The same six prompts, one at a time, in each of the orders."""
    rng = np.random.default_rng(1)
    requests = [
        Request(at_s=at_s, prompt=words(rng, tokens), num_output_tokens=2, extra={"slo": due_s})
        for at_s, tokens, due_s in PROMISED
    ]
    figure, panels = plt.subplots(3, 1, figsize=(8, 6), sharex=True)
    for axes, policy in zip(panels, ("fcfs", "sjf", "edf"), strict=True):
        found = run(requests, prefill=("--kv-prefill-order", policy, "--kv-batch-tokens", "16"))
        spans = [_span(found.prefill, str(place)) for place in range(len(requests))]
        late = 0
        bars(
            axes,
            [(one.at_s, row - 0.35, span[0] - one.at_s, 0.7) for row, (one, span) in _rows(requests, spans)],
            WAITS,
        )
        bars(
            axes, [(span[0], row - 0.35, span[1] - span[0], 0.7) for row, (_, span) in _rows(requests, spans)], COMPUTES
        )
        for row, (one, span) in _rows(requests, spans):
            due_s = one.at_s + one.extra["slo"]
            is_late = span[1] > due_s
            late += is_late
            axes.plot([due_s, due_s], [row - 0.45, row + 0.45], color=LOST if is_late else "black", linewidth=1.5)
        axes.set_yticks(range(len(requests)), [f"{len(one.prompt)}" for one in requests])
        axes.invert_yaxis()
        axes.set_ylabel("prompt, tokens")
        axes.set_title(f"{policy}: {late} of {len(requests)} late", fontsize=9)
    panels[-1].set_xlabel("seconds of the device; grey waits, blue computes, the line is when it is due (red: missed)")
    return figure


def _rows(requests: Sequence[Request], spans: Sequence[tuple[float, float]]) -> list[tuple[int, Any]]:
    return list(enumerate(zip(requests, spans, strict=True)))


def _span(moments: Sequence[Moment], name: str) -> tuple[float, float]:
    mine = [moment for moment in moments if name in dict(moment.tokens)]
    return mine[0].at_s, mine[-1].at_s + mine[-1].step_s


# Packing.


def packing(plt: Any) -> Any:
    """Fourteen prompts that wait: what each step takes."""
    rng = np.random.default_rng(2)
    lengths = (420, 90, 1500, 200, 64, 350, 700, 128, 260, 510, 80, 900, 300, 150)
    requests = [Request(at_s=0.0, prompt=words(rng, length), num_output_tokens=2) for length in lengths]
    figure, panels = plt.subplots(2, 1, figsize=(8, 4.5), sharex=True, sharey=True)
    for axes, side in zip(panels, SIDES, strict=True):
        found = run(requests, side)
        for place in range(len(requests)):
            stacked: list[Bar] = []
            for moment in found.prefill:
                below = 0
                for name, count in moment.tokens:
                    if name == str(place):
                        stacked.append((moment.at_s, below, moment.step_s, count))
                    below += count
            bars(axes, stacked, plt.get_cmap("tab20")(place % 20), edge="white")
        if side == "phase":
            limit = critical_length(LATENCY, longest=2048)
            axes.axhline(limit, color="black", linestyle="--", linewidth=0.8)
            axes.annotate(f"L_m = {limit}", (0, limit), fontsize=8, va="bottom")
        axes.set_ylabel("tokens in the step")
        axes.set_title(f"--kv-scheduling {side}: mean time to first token {found.ttft_ms:.0f} ms", fontsize=9)
    panels[-1].set_xlabel("seconds of the device; a bar is a step, a colour is a prompt")
    return figure


# Admission.


def admission(plt: Any) -> Any:
    """Forty requests and a cache for half of them, while nothing is known of answers: what is in it, and who loses what
    it had."""
    rng = np.random.default_rng(3)
    requests = [
        Request(at_s=0.02 * place, prompt=words(rng, rng.integers(128, 385)), num_output_tokens=512, may_end=True)
        for place in range(40)
    ]
    blocks = 40 * (256 + 128) // 2 // BLOCK_SIZE
    figure, panels = plt.subplots(2, 1, figsize=(8, 4.5), sharex=True, sharey=True)
    for axes, side in zip(panels, SIDES, strict=True):
        both = (
            "--num-gpu-blocks-override",
            str(blocks + 1),
            "--emulate-output-tokens",
            "128",
            "--max-model-len",
            "1024",
        )
        found = run(requests, side, both=both)
        shown = [(m.at_s, m.used_blocks) for m in found.decode[::4]]  # it changes little from step to step
        axes.fill_between(*zip(*shown, strict=True), step="post", color=COMPUTES, linewidth=0)
        lost = [moment.at_s for moment in found.decode for _ in moment.preempted]
        axes.plot(lost, [blocks * 1.06] * len(lost), "v", color=LOST, markersize=5)
        axes.axhline(blocks, color="black", linestyle="--", linewidth=0.8)
        tokens = found.counters.get("vllm_disagg_sched_preempted_tokens_total", 0.0)
        axes.set_ylabel("blocks in use")
        axes.set_title(
            f"--kv-scheduling {side}: {len(lost)} preemptions, {tokens:.0f} tokens computed again", fontsize=9
        )
    panels[-1].set_xlabel("seconds of the device; the dashed line is the whole cache, a red mark is a preemption")
    return figure


# Fetching ahead.


def fetching(plt: Any) -> Any:
    """Twelve requests for four run slots: where each one's KV lies."""
    rng = np.random.default_rng(4)
    requests = [
        Request(at_s=0.01 * place, prompt=words(rng, 256), num_output_tokens=int(rng.integers(20, 60)))
        for place in range(12)
    ]
    figure, panels = plt.subplots(2, 1, figsize=(8, 5.5), sharex=True)
    for axes, side in zip(panels, SIDES, strict=True):
        found = run(requests, side, both=("--max-num-seqs", "4"))
        on_prefill_s = 0.0
        kinds: dict[str, list[Bar]] = {WAITS: [], AGAIN: [], COMPUTES: []}
        for place in range(len(requests)):
            name, row = str(place), place - 0.35
            kept_s = _span(found.prefill, name)[1]
            here_s = next(m.at_s for m in found.decode if name in (*m.kv_here, *dict(m.tokens)))
            begun_s, ended_s = _span(found.decode, name)
            on_prefill_s += here_s - kept_s
            kinds[WAITS].append((kept_s, row, here_s - kept_s, 0.7))
            kinds[AGAIN].append((here_s, row, begun_s - here_s, 0.7))
            kinds[COMPUTES].append((begun_s, row, ended_s - begun_s, 0.7))
        for color, mine in kinds.items():
            bars(axes, mine, color)
        axes.invert_yaxis()
        axes.set_ylabel("request")
        axes.set_title(
            f"--kv-scheduling {side}: prefill keeps a prompt's KV for {1e3 * on_prefill_s / len(requests):.0f} ms",
            fontsize=9,
        )
    panels[-1].set_xlabel(
        "seconds of the device; KV on prefill (grey), on decode without a slot (orange), generates (blue)"
    )
    return figure


# Pace.


def pace(plt: Any) -> Any:
    """The first case of the benchmark: every stream waits as long as a bar is high."""
    row: Row = ROWS[0]
    figure, panels = plt.subplots(2, 1, figsize=(8, 4), sharex=True, sharey=True)
    for axes, side in zip(panels, SIDES, strict=True):
        found = run(row.requests(0), side, decode=row.flags("decode", 1.0), split=False)
        shown = [moment for moment in found.decode if 0.7 <= moment.at_s <= 2.2]
        for color, wanted in ((STREAMS_ALONE, False), (COMPUTES, True)):
            mine = [moment for moment in shown if any(count > 1 for _, count in moment.tokens) == wanted]
            bars(axes, [(m.at_s, 0, m.step_s, 1e3 * m.step_s) for m in mine], color, edge="white")
        axes.set_ylabel("step, ms")
        axes.set_title(f"--kv-scheduling {side}: longest step {1e3 * max(m.step_s for m in shown):.0f} ms", fontsize=9)
    panels[-1].set_xlabel("seconds of the device; grey: streams alone, blue: with prompt tokens")
    return figure


# Victims.


def victims(plt: Any) -> Any:
    """A cache that ends before nine answers do: whose KV is given up. The last three have the tightest targets."""
    rng = np.random.default_rng(6)
    tpots = (0.2, 0.2, 0.2, 0.05, 0.05, 0.05, 0.016, 0.016, 0.016)
    requests = [
        Request(at_s=0.05 * place, prompt=words(rng, 128), num_output_tokens=560, extra={"tpot": tpot_s})
        for place, tpot_s in enumerate(tpots)
    ]
    both = ("--num-gpu-blocks-override", "290", "--max-model-len", "1024")
    figure, panels = plt.subplots(2, 1, figsize=(8, 5.5), sharex=True)
    for axes, side in zip(panels, SIDES, strict=True):
        found = run(requests, side, both=both, split=False)
        kinds: dict[str, list[Bar]] = {COMPUTES: [], AGAIN: []}
        for moment in found.decode:
            for name, count in moment.tokens:
                first = moment.at_s < requests[int(name)].at_s + 0.2
                color = COMPUTES if count == 1 or first else AGAIN
                _lengthen(kinds[color], (moment.at_s, int(name) - 0.35, moment.step_s, 0.7))
        for color, mine in kinds.items():
            bars(axes, mine, color)
        lost = [(moment.at_s, int(name)) for moment in found.decode for name in moment.preempted]
        axes.plot([at_s for at_s, _ in lost], [place for _, place in lost], "x", color=LOST, markersize=7)
        met = sum(one.tpot_s <= tpot_s for one, tpot_s in zip(found.times, tpots, strict=True))
        axes.set_yticks(range(len(tpots)), [f"{1e3 * tpot_s:g}" for tpot_s in tpots])
        axes.invert_yaxis()
        axes.set_ylabel("TPOT target, ms")
        axes.set_title(
            f"--kv-scheduling {side}: {len(lost)} preemptions; {met} of {len(tpots)} answers within their target",
            fontsize=9,
        )
    panels[-1].set_xlabel("seconds of the device; blue generates, a red cross gives way, orange computes again")
    return figure


def _lengthen(found: list[Bar], bar: Bar) -> None:
    """Add a bar, as a part of one in the same row that ends where it begins."""
    for place in range(len(found) - 1, max(-1, len(found) - 40), -1):
        x, y, width, height = found[place]
        if y == bar[1] and abs(x + width - bar[0]) < 1e-9:
            found[place] = (x, y, width + bar[2], height)
            return
    found.append(bar)


# Drawing.


def bars(axes: Any, mine: Sequence[Bar], color: Any, *, edge: str = "none") -> None:
    """Many rectangles as one path: a file with one element for each would be ten times as large."""
    from matplotlib.patches import PathPatch
    from matplotlib.path import Path as Outline

    if not mine:
        return
    corners = [[(x, y), (x + w, y), (x + w, y + h), (x, y + h), (x, y)] for x, y, w, h in mine]
    codes = [Outline.MOVETO, Outline.LINETO, Outline.LINETO, Outline.LINETO, Outline.CLOSEPOLY] * len(mine)
    axes.add_patch(PathPatch(Outline(np.concatenate(corners), codes), facecolor=color, edgecolor=edge, linewidth=0.3))
    axes.autoscale_view()


DRAWINGS: dict[str, Callable[[Any], Any]] = {
    "order": order, "packing": packing, "admission": admission, "fetching": fetching, "pace": pace, "victims": victims,
}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", default=list(DRAWINGS), choices=list(DRAWINGS))
    parser.add_argument("--out", type=Path, required=True, help="folder for the drawings")
    options = parser.parse_args()
    logging.disable(logging.WARNING)
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams.update({"svg.hashsalt": "vllm-disagg", "svg.fonttype": "none", "path.simplify": False})
    import matplotlib.pyplot as plt

    options.out.mkdir(parents=True, exist_ok=True)
    for name in options.only:
        figure, file = DRAWINGS[name](plt), options.out / f"scheduling_{name}.svg"
        figure.tight_layout()
        figure.savefig(file, metadata={"Date": None})
        plt.close(figure)
        size = file.stat().st_size
        print(f"{file}: {size / 1024:.0f} KiB")
        if size > MOST_BYTES:
            raise SystemExit(f"{file} has {size} bytes, more than {MOST_BYTES}: show less in it")


if __name__ == "__main__":
    main()
