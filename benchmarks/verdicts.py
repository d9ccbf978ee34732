"""Split or stay colocated: what `vllm-disagg plan` says in situations that differ in targets, lengths, links and load.

    taskset -c 0,1 python -m benchmarks.verdicts --out benchmarks/results/verdicts

Each verdict rests on simulations with several seeds; the intervals of both kinds stand beside it. Profiles are the
published ones of OPT and the guess for Llama-3-8B; no engine runs.
"""

from __future__ import annotations

import argparse
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from benchmarks.machine import OtherLoad, fact_list, facts, table
from vllm_disagg.core.slo import SLO
from vllm_disagg.errors import NoFeasiblePlacement
from vllm_disagg.planner.candidates import Resources
from vllm_disagg.planner.cluster import Cluster, EngineOptions, Pool
from vllm_disagg.planner.placement import Mapper, Question, Score
from vllm_disagg.planner.plan import Plan, make_plan
from vllm_disagg.profiles import load_profile
from vllm_disagg.sim.arrivals import Arrivals
from vllm_disagg.sim.lengths import SURROGATES, FixedLengths, Lengths, make_workload

OPT_13B, OPT_66B, LLAMA = "opt-13b-a100-80g", "opt-66b-a100-80g", "llama-3-8b-a100-80g"
NODE = Cluster(num_nodes=1, devices_per_node=8)
CHAT, CODE, LONG = (SURROGATES[name] for name in ("sharegpt-like", "humaneval-like", "longbench-like"))


@dataclass(frozen=True, kw_only=True)
class Situation:
    """A question to the planner, and what makes it particular."""

    name: str
    why: str
    profile: str
    lengths: Lengths
    ttft_s: float
    tpot_s: float
    cluster: Cluster = NODE
    rate: float | None = None
    cv: float = 1.0


SITUATIONS = (
    Situation(
        name="chat, both targets moderate", profile=OPT_13B, lengths=CHAT, ttft_s=0.25, tpot_s=0.1,
        why="a lone long prompt nearly takes all of TTFT; the hand-over costs what it has left",
    ),
    Situation(
        name="chat, tight TPOT", profile=OPT_13B, lengths=CHAT, ttft_s=1.0, tpot_s=0.04,
        why="prompts beside decoding stretch its steps; whoever decodes alone keeps them short",
    ),
    Situation(
        name="chat, tight TPOT, slow link", profile=OPT_13B, lengths=CHAT, ttft_s=1.0, tpot_s=0.04,
        cluster=Cluster(num_nodes=8, devices_per_node=1),
        why="the same, but each prompt's KV takes 0.2 s over 25 Gb/s",
    ),
    Situation(
        name="chat, nothing is urgent", profile=OPT_13B, lengths=CHAT, ttft_s=10.0, tpot_s=0.5,
        why="throughput alone counts; a second copy of the weights takes memory from KV",
    ),
    Situation(
        name="chat, tiny load", profile=OPT_13B, lengths=CHAT, ttft_s=1.0, tpot_s=0.04, rate=0.2,
        why="one instance does it, and a split has at least two",
    ),
    Situation(
        name="chat in bursts, tight TPOT", profile=OPT_13B, lengths=CHAT, ttft_s=1.0, tpot_s=0.04, cv=3.0,
        why="as tight TPOT; bursts wait for prefill instead of stretching the steps of those that decode",
    ),
    Situation(
        name="code, tight TTFT, loose TPOT", profile=OPT_13B, lengths=CODE, ttft_s=0.125, tpot_s=0.2,
        why="short prompts hardly disturb decoding",
    ),
    Situation(
        name="code, tight TPOT", profile=OPT_13B, lengths=CODE, ttft_s=0.25, tpot_s=0.03,
        why="short prompts, but a step with one is longer than the target",
    ),
    Situation(
        name="long prompts, short answers", profile=OPT_13B, lengths=LONG, ttft_s=1.5, tpot_s=0.06,
        why="a prompt takes ten decode steps",
    ),
    Situation(
        name="long prompts, loose TTFT", profile=OPT_66B, lengths=LONG, ttft_s=15.0, tpot_s=0.15,
        cluster=Cluster(num_nodes=2), why="DistServe's summaries",
    ),
    Situation(
        name="chat, large model", profile=OPT_66B, lengths=CHAT, ttft_s=2.5, tpot_s=0.15, cluster=Cluster(num_nodes=2),
        why="DistServe's chat of OPT-66B: both targets leave room for mixed steps",
    ),
    Situation(
        name="grouped-query model, tight TPOT", profile=LLAMA, lengths=CHAT, ttft_s=0.5, tpot_s=0.02,
        why="KV of a sixth of the size: the hand-over is cheap, batches are large",
    ),
    Situation(
        name="grouped-query model, loose", profile=LLAMA, lengths=CHAT, ttft_s=2.0, tpot_s=0.1,
        why="mixed steps stay within the target",
    ),
    Situation(
        name="long answers", profile=LLAMA, lengths=FixedLengths(prompt_tokens=128, output_tokens=1024), ttft_s=0.5,
        tpot_s=0.03, why="prefill has almost nothing to do; an instance for it would idle",
    ),
)  # fmt: skip


def answer(situation: Situation, seeds: int, mapper: Mapper) -> tuple[Plan | str, float]:
    """The plan, or why there is none, and the seconds it took."""
    profile = load_profile(situation.profile)
    loads = tuple(
        make_workload(situation.lengths, num_requests=20_000, seed=seed, arrivals=Arrivals(cv=situation.cv))
        for seed in range(seeds)
    )
    pool = Pool(profile=profile)
    longest = max(int((load.prompt_tokens + load.output_tokens).max()) for load in loads)
    resources = Resources(
        prefill=pool, decode=pool, cluster=situation.cluster, options=EngineOptions(), longest_tokens=longest
    )
    question = Question(
        resources=resources, workloads=loads, slo=SLO(ttft_s=situation.ttft_s, tpot_s=situation.tpot_s),
        rate=situation.rate,
    )  # fmt: skip
    begin_s = time.perf_counter()
    try:
        plan: Plan | str = make_plan(question, mapper)
    except NoFeasiblePlacement as error:
        plan = str(error)
    return plan, time.perf_counter() - begin_s


def best(plan: Plan, kind: str) -> Score | None:
    return next((score for score in plan.ranking if score.candidate.kind == kind), None)


def interval(score: Score) -> tuple[float, float]:
    """The 95 % interval of its goodput per device."""
    wide = score.goodput.half_width / score.price
    return score.per_price - wide, score.per_price + wide


def apart(plan: Plan) -> bool:
    """Whether the intervals of the best split and the best colocated placement do not overlap."""
    pair = [best(plan, kind) for kind in ("split", "colocated")]
    if pair[0] is None or pair[1] is None:
        return True
    (a, b), (c, d) = interval(pair[0]), interval(pair[1])
    return b < c or d < a


def row(situation: Situation, plan: Plan | str) -> list[str]:
    head = [
        situation.name, situation.profile.removesuffix("-a100-80g"),
        f"{situation.ttft_s * 1e3:g} / {situation.tpot_s * 1e3:g}",
    ]  # fmt: skip
    if isinstance(plan, str):
        return [*head, "none", plan, "", "", "", situation.why]
    cells = []
    for kind in ("split", "colocated"):
        score = best(plan, kind)
        if score is None:
            cells.append("misses the targets")
        else:
            low, high = interval(score)
            cells.append(f"{score.per_price:.3f} ({low:.3f}-{high:.3f}), {score.candidate.name}; {score.limit}")
    gain = "" if plan.gain is None else f"{plan.gain.ratio:.2f} ± {plan.gain.half_width:.2f}"
    verdict = "**split**" if plan.choice == "split" else "**stay colocated**"
    if situation.rate is not None:
        verdict += f" at {situation.rate:g}/s"
    return [*head, verdict, gain, *cells, "yes" if apart(plan) else "no", situation.why]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--out", type=Path, help="write PATH.md")
    arguments = parser.parse_args()
    rows, sentences = [], []
    with OtherLoad() as other_load, ThreadPoolExecutor(2) as pool:
        for situation in SITUATIONS:
            plan, seconds = answer(situation, arguments.seeds, pool.map)
            rows.append(row(situation, plan))
            said = plan if isinstance(plan, str) else plan.verdict
            sentences.append(f"- {situation.name}: *{said}*")
            print(f"{situation.name} ({seconds:.1f} s): {said}", flush=True)
    text = "\n".join(
        [
            "# Split or stay colocated",
            "",
            f"Goodput in requests/s per device with its 95 % interval over {arguments.seeds} seeds: the best placement "
            "of each kind and what limits it. `gain` is split over colocated on the same requests. The verdict is "
            "split where the interval of the gain lies above 1, or, with a rate, where it costs less.",
            "",
            table(
                ("situation", "model", "TTFT / TPOT, ms", "verdict", "gain", "best split", "best colocated",
                 "intervals apart", "why"),
                rows,
            ),
            "",
            *sentences,
            "",
            fact_list(facts("benchmarks.verdicts", other_load)),
            "",
        ]
    )  # fmt: skip
    if arguments.out is not None:
        arguments.out.with_suffix(".md").write_text(text)


if __name__ == "__main__":
    main()
