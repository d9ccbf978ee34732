"""The answer: a ranking, one sentence, and a document that can be stored and started from."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Final, Literal

from vllm_disagg.core.latency import work_of
from vllm_disagg.core.profile import Kind
from vllm_disagg.core.queueing import crossover_load, inter_op_s, intra_op_s, one_device_s
from vllm_disagg.core.slo import SLO
from vllm_disagg.errors import ConfigError, NoFeasiblePlacement
from vllm_disagg.planner.candidates import Candidate, Shape, colocated, segmented
from vllm_disagg.planner.cluster import Scheduling
from vllm_disagg.planner.goodput import half_width
from vllm_disagg.planner.placement import (
    Mapper,
    Question,
    Score,
    algorithm_1,
    algorithm_2,
    best_colocated,
    measure,
    nearest_slo,
    require_shapes,
)

FORMAT: Final = "vllm-disagg-plan"
VERSION: Final = 1

Choice = Literal["split", "colocated"]

_CHOICES: Final[tuple[Choice, ...]] = ("colocated", "split")

_TRUST: Final[dict[Kind, str]] = {
    "measured": "step times measured",
    "published": "step times published by others, not measured here",
    "guess": "step times guessed, not measured",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Gain:
    """Goodput per price of the best split placement over that of the best colocated one, on the same requests.

    Args:
        ratio: mean over seeds.
        half_width: of its 95 % confidence interval.
    """

    ratio: float
    half_width: float

    @property
    def is_clear(self) -> bool:
        """Whether the interval lies on one side of 1."""
        return abs(self.ratio - 1.0) > self.half_width


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """What to run.

    Args:
        choice: the better kind. Where the two cannot be told apart it is `colocated`, which is simpler.
        chosen: its best placement; with a rate, as many of it as the rate needs.
        ranking: all that were measured, best first.
        gain: split over colocated; None where one of them cannot meet the targets at all.
        verdict: one sentence.
        rate: requests per second that were asked for.
        slo, goal: the targets.
        source: of the workload.
        kind: how far to trust the profile.
        scheduling: of instances with a role, as they were simulated.
    """

    choice: Choice
    chosen: Score
    ranking: tuple[Score, ...]
    gain: Gain | None
    verdict: str
    rate: float | None
    slo: SLO
    goal: float
    source: str
    kind: Kind
    scheduling: Scheduling


def make_plan(question: Question, mapper: Mapper = map) -> Plan:
    """Search, measure and decide.

    Raises:
        NoFeasiblePlacement: the model fits nowhere, no placement meets the targets, or none that fits the cluster
            serves the rate. The text names the nearest that can be.
    """
    require_shapes(question)
    found = [*algorithm_1(question, mapper), *algorithm_2(question, mapper)]
    split = sorted(_distinct(found), key=lambda score: score.rank)[: question.effort.finalists]
    every_plain = best_colocated(question, mapper)
    plain = every_plain[: max(1, question.effort.finalists // 2)]
    if not split and not plain:
        raise NoFeasiblePlacement(_infeasible(question))
    grown = _as_large(plain, split)
    alone = _alone(question, every_plain, grown)
    ranking = measure(question, [*split, *grown, *alone], mapper)
    ranking = [score for score in ranking if score.goodput.mean > 0]
    if not ranking:
        raise NoFeasiblePlacement(_infeasible(question))
    best = {kind: next((s for s in ranking if s.candidate.kind == kind), None) for kind in ("split", "colocated")}
    gain = _gain(best["split"], best["colocated"])
    choice: Choice = (
        "split" if best["colocated"] is None or (gain and gain.is_clear and gain.ratio > 1) else "colocated"
    )
    chosen = best[choice]
    dearer: Score | None = None
    if question.rate is not None:
        choice, chosen, dearer = _cheapest(question, choice, ranking)
    assert chosen is not None
    kinds = {question.resources.prefill.profile.kind, question.resources.decode.profile.kind}
    kind: Kind = next(kind for kind in ("guess", "published", "measured") if kind in kinds)
    return Plan(
        choice=choice,
        chosen=chosen,
        ranking=tuple(ranking),
        gain=gain,
        verdict=_verdict_at_rate(choice, chosen, dearer, question, kind)
        if dearer is not None
        else _verdict(choice, chosen, gain, best["split"], best["colocated"], question, kind),
        rate=question.rate,
        slo=question.slo,
        goal=question.search.goal,
        source=question.workloads[0].source,
        kind=kind,
        scheduling=question.resources.options.scheduling,
    )


def plan_document(plan: Plan) -> dict[str, Any]:
    """The JSON document of a plan."""
    return {
        "format": FORMAT,
        "version": VERSION,
        "verdict": plan.verdict,
        "choice": plan.choice,
        "placement": _placement(plan.chosen.candidate),
        "rate": plan.rate,
        "slo": {"ttft_s": plan.slo.ttft_s, "tpot_s": plan.slo.tpot_s, "goal": plan.goal},
        "workload": plan.source,
        "profile_kind": plan.kind,
        "scheduling": plan.scheduling,
        "gain": None if plan.gain is None else {"ratio": plan.gain.ratio, "half_width": _finite(plan.gain.half_width)},
        "ranking": [
            {
                **_placement(score.candidate),
                "algorithm": score.algorithm,
                "goodput": score.goodput.mean,
                "goodput_half_width": _finite(score.goodput.half_width),
                "goodput_per_price": score.per_price,
                "price": score.price,
                "limit": score.limit,
                "limit_share": score.limit_share,
            }
            for score in plan.ranking
        ],
    }


def parse_placement(document: Any, *, origin: str) -> Candidate:
    """The placement of a stored plan.

    Raises:
        ConfigError: it is not a plan, or of another version.
    """
    if not isinstance(document, dict) or document.get("format") != FORMAT or document.get("version") != VERSION:
        raise ConfigError(f"{origin}: expected a plan: format {FORMAT!r}, version {VERSION}")
    try:
        values = document["placement"]
        prefill = values["prefill"]
        return Candidate(
            kind=values["kind"],
            decode=Shape(int(values["decode"]["tp"]), int(values["decode"]["pp"])),
            num_decode=int(values["decode"]["num"]),
            prefill=Shape(int(prefill["tp"]), int(prefill["pp"])) if prefill else None,
            num_prefill=int(prefill["num"]) if prefill else 0,
            segments=int(values["segments"]),
            budget=int(values["budget"]),
        )
    except (KeyError, TypeError, ValueError) as error:
        raise ConfigError(f"{origin}: placement is incomplete: {error!r}") from error


def explain(question: Question, rate: float | None = None) -> list[str]:
    """DistServe's equations 1 to 3 with this model's numbers: what parallelism does to prefill at a rate per instance.
    They hold for prompts of one length that are not batched: here the mean length. Without a rate: at half of the load
    that one device bears."""
    profile = question.resources.prefill.profile
    length = round(sum(float(w.prompt_tokens.mean()) for w in question.workloads) / len(question.workloads))
    base = min(profile.entries)
    d_s = profile.entry(base).latency.step_s(work_of([(0, length)]))
    rate = rate or 0.5 / d_s
    lines = [
        f"A prompt of {length} tokens takes D = {d_s * 1e3:.1f} ms on TP{base}; at R = {rate:.3g}/s the load is "
        f"R D = {rate * d_s:.2f}.",
        _line("eq. 1", f"TP{base} PP1", lambda: one_device_s(d_s, rate)),
        _line("eq. 2", f"TP{base} PP2, twice the devices", lambda: inter_op_s(d_s, rate)),
    ]
    if base * 2 in profile.entries:
        k = d_s / profile.entry(base * 2).latency.step_s(work_of([(0, length)]))
        lines.append(_line("eq. 3", f"TP{base * 2} PP1, speed-up K = {k:.2f}", lambda: intra_op_s(d_s, rate, k)))
        crossing = crossover_load(k) if 1 < k < 2 else None
        if crossing is not None:
            lines.append(
                f"Tensor parallelism is better below R D = {crossing:.2f}, {crossing / d_s:.1f} prompts/s, "
                "and a pipeline above."
            )
    return lines


def _line(equation: str, what: str, formula: Any) -> str:
    try:
        return f"{equation}: mean TTFT {formula() * 1e3:.1f} ms with {what}"
    except ConfigError as error:
        return f"{equation}: {error}, with {what}"


def _distinct(scores: Sequence[Score]) -> list[Score]:
    """Each candidate once, whichever algorithm found it."""
    return list({score.candidate: score for score in scores}.values())


def _as_large(plain: Sequence[Score], split: Sequence[Score]) -> list[Score]:
    """Colocated instances on as many devices as the best split placement has: several share their load better."""
    if not split:
        return list(plain)
    devices = split[0].candidate.num_devices
    grown = []
    for score in plain:
        factor = max(1, round(devices / score.candidate.num_devices))
        goodput = replace(score.goodput, per_seed=tuple(value * factor for value in score.goodput.per_seed))
        grown.append(
            replace(score, candidate=score.candidate.times(factor), price=score.price * factor, goodput=goodput)
        )
    return grown


def _gain(split: Score | None, plain: Score | None) -> Gain | None:
    if split is None or plain is None:
        return None
    pairs = zip(split.goodput.per_seed, plain.goodput.per_seed, strict=True)
    ratios = [(ours / split.price) / (theirs / plain.price) for ours, theirs in pairs if theirs > 0]
    if not ratios:
        return None
    return Gain(ratio=sum(ratios) / len(ratios), half_width=half_width(ratios))


def _cheapest(question: Question, better: Choice, ranking: Sequence[Score]) -> tuple[Choice, Score, Score | None]:
    """What serves the rate for the least money. At equal prices the kind with more goodput per price.

    Returns:
        The kind, its placement, and the other kind's if that is dearer.

    Raises:
        NoFeasiblePlacement: the cluster is too small.
    """
    assert question.rate is not None
    served = {kind: _for_rate(question, kind, ranking) for kind in _CHOICES}
    able = [kind for kind in _CHOICES if served[kind] is not None]
    if not able:
        limit = question.resources.cluster.num_devices
        most = max((score.goodput.mean * (limit // score.candidate.num_devices) for score in ranking), default=0.0)
        raise NoFeasiblePlacement(
            f"{question.rate:g} requests/s are more than {limit} devices serve within the targets: "
            f"they serve about {most:.2f}"
        )
    prices = {kind: score.price for kind, score in served.items() if score is not None}
    choice = min(able, key=lambda kind: (prices[kind], kind != better))
    chosen, other = served[choice], served["colocated" if choice == "split" else "split"]
    assert chosen is not None
    return choice, chosen, other if other is not None and other.price > chosen.price else None


def _for_rate(question: Question, kind: Choice, ranking: Sequence[Score]) -> Score | None:
    """The cheapest of a kind that serves the rate, several of it where one is not enough; None where the cluster has no
    room for so many."""
    assert question.rate is not None
    options = []
    for score in ranking:
        factor = math.ceil(question.rate / score.goodput.mean)
        devices = factor * score.candidate.num_devices
        if score.candidate.kind == kind and devices <= question.resources.cluster.num_devices:
            options.append((score.price * factor, devices, factor, score))
    if not options:
        return None
    price, _, factor, score = min(options, key=lambda option: option[:2])
    goodput = replace(score.goodput, per_seed=tuple(value * factor for value in score.goodput.per_seed))
    return replace(score, candidate=score.candidate.times(factor), price=price, goodput=goodput)


def _alone(question: Question, plain: Sequence[Score], grown: Sequence[Score]) -> list[Score]:
    """With a rate the cheapest single instances that serve it by a short run, a few of them since that may err: a small
    rate needs no more."""
    if question.rate is None:
        return []
    known = {score.candidate for score in grown}
    able = [score for score in plain if score.goodput.mean >= question.rate and score.candidate not in known]
    return sorted(able, key=lambda score: (score.price, score.rank))[: max(1, question.effort.finalists // 2)]


def _verdict_at_rate(choice: Choice, chosen: Score, dearer: Score, question: Question, kind: Kind) -> str:
    lead = "disaggregate" if choice == "split" else "stay colocated"
    other = "split" if choice == "colocated" else "colocated"
    return (
        f"{lead}: {chosen.candidate.name} serves {question.rate:g} requests/s for a price of {chosen.price:g}; the "
        f"cheapest {other} placement that does, {dearer.candidate.name}, costs {dearer.price:g} ({_TRUST[kind]})"
    )


def _verdict(
    choice: Choice, chosen: Score, gain: Gain | None, split: Score | None, plain: Score | None, question: Question,
    kind: Kind,
) -> str:  # fmt: skip
    what = chosen.candidate.name
    devices = chosen.candidate.num_devices
    tail = f" ({devices} device{'s' if devices > 1 else ''}; {_TRUST[kind]})"
    if gain is None:
        other = "colocated" if choice == "split" else "split"
        lead = "disaggregate" if choice == "split" else "stay colocated"
        return f"{lead}: {what}; no {other} placement meets the targets" + tail
    ratio = f"{gain.ratio:.2f}x" + (f" ± {gain.half_width:.2f}" if math.isfinite(gain.half_width) else "")
    if choice == "split":
        return f"disaggregate: {what} gives {ratio} the goodput per device of colocated instances" + tail
    assert split is not None
    if gain.is_clear:
        return f"stay colocated: {what}; the best split, {split.candidate.name}, gives only {ratio} of it" + tail
    return f"stay colocated: {what}; the best split gives {ratio}, which is no clear difference" + tail


def _infeasible(question: Question) -> str:
    candidates = [*segmented(question.resources), *colocated(question.resources)]
    asked = f"TTFT {question.slo.ttft_s:g} s and TPOT {question.slo.tpot_s:g} s for {question.search.goal:.0%}"
    nearest = nearest_slo(question, candidates)
    if nearest is None:
        return f"no placement meets {asked} of the requests: some of them fit no instance"
    slo, candidate = nearest
    return (
        f"no placement meets {asked} of the requests, not even of those that come one at a time; the nearest that can "
        f"be met is TTFT {slo.ttft_s:.3g} s and TPOT {slo.tpot_s:.3g} s, with {candidate.name}"
    )


def _placement(candidate: Candidate) -> dict[str, Any]:
    def phase(shape: Shape, num: int) -> dict[str, int]:
        return {"num": num, "tp": shape.tp, "pp": shape.pp}

    return {
        "name": candidate.name,
        "kind": candidate.kind,
        "prefill": phase(candidate.prefill, candidate.num_prefill) if candidate.prefill else None,
        "decode": phase(candidate.decode, candidate.num_decode),
        "segments": candidate.segments,
        "budget": candidate.budget,
        "num_devices": candidate.num_devices,
    }


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
