"""Which placement gives the most goodput per device: DistServe's Algorithms 1 and 2, and colocated instances.

Candidates are looked at in the order of what they could give at most (`bounds`). A short run of one seed tells most of
them apart; only the best are then measured with all requests and seeds.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Final, Literal

from vllm_disagg.core.slo import SLO
from vllm_disagg.errors import ConfigError, NoFeasiblePlacement
from vllm_disagg.planner.bounds import decode_bound, load_of, prefill_bound
from vllm_disagg.planner.candidates import Candidate, Resources, Shape, colocated, segmented, shapes
from vllm_disagg.planner.goodput import Goodput, SearchSettings, attainment_at, find_goodput, slo_scale
from vllm_disagg.planner.limits import Limit, limit_of
from vllm_disagg.sim.run import simulate
from vllm_disagg.sim.system import System
from vllm_disagg.sim.workload import Workload

Mapper = Callable[[Callable[[Any], Any], Iterable[Any]], Iterable[Any]]
"""`map`, or that of a pool of processes."""

Algorithm = Literal["1", "2", "colocated"]

_Phase = Literal["prefill", "decode"]

_NEAR: Final = {"prefill": 0.6, "decode": 1.0, "both": 0.7}
"""The share of its bound at which the search for a goodput begins."""

_NEVER: Final = math.inf
_BATCH: Final = 8
_BOUND_SLACK: Final = 1.1
"""Bounds hold for means; a short run may do a little better by chance."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Effort:
    """How hard to search.

    Args:
        quick_requests, quick_spans, quick_tolerance: of the runs that tell candidates apart; see `SearchSettings`.
        finalists: split placements that are measured with everything, and half as many colocated ones.
    """

    quick_requests: int = 400
    quick_spans: float = 2.0
    quick_tolerance: float = 0.08
    finalists: int = 4


@dataclass(frozen=True, slots=True, kw_only=True)
class Question:
    """What is to be placed.

    Args:
        resources: model, devices and cluster.
        workloads: one per seed.
        slo: the targets.
        rate: requests per second that have to be served; None for the most per device.
        search: how goodput is searched.
        effort: how hard.
    """

    resources: Resources
    workloads: tuple[Workload, ...]
    slo: SLO
    rate: float | None = None
    search: SearchSettings = field(default_factory=SearchSettings)
    effort: Effort = field(default_factory=Effort)

    def __post_init__(self) -> None:
        if not self.workloads:
            raise ConfigError("a plan needs at least one workload")
        if self.rate is not None and not (math.isfinite(self.rate) and self.rate > 0):
            raise ConfigError(f"the rate must be a positive number, not {self.rate!r}")

    @property
    def quick(self) -> tuple[Workload, SearchSettings]:
        """What candidates are told apart with."""
        search = replace(
            self.search,
            min_requests=min(self.search.min_requests, self.effort.quick_requests),
            spans=min(self.search.spans, self.effort.quick_spans),
            tolerance=max(self.search.tolerance, self.effort.quick_tolerance),
        )
        return self.workloads[0], search


@dataclass(frozen=True, slots=True, kw_only=True)
class Score:
    """A candidate and what it can do.

    Args:
        candidate: the placement.
        algorithm: which search proposed it.
        goodput: of the whole candidate, requests per second.
        price: of its devices.
        limit: what keeps it from more.
        limit_share: of the misses that this stands for.
    """

    candidate: Candidate
    algorithm: Algorithm
    goodput: Goodput
    price: float
    limit: Limit = "nothing"
    limit_share: float = 0.0

    @property
    def per_price(self) -> float:
        """What candidates are ranked by: with prices of 1, requests per second and device."""
        return self.goodput.mean / self.price

    @property
    def rank(self) -> tuple[float, int]:
        """Ties go to fewer devices."""
        return (-self.per_price, self.candidate.num_devices)


def algorithm_1(question: Question, mapper: Mapper = map) -> list[Score]:
    """High node affinity: KV may cross nodes. Each phase's shapes are searched alone, prefill with TTFT as its only
    target and decode with TPOT, both with the workload's arrivals. Then numbers of instances n and m are chosen so that
    both phases keep up, n = ceil(R / goodput) with a rate R. The paper takes the shape with the most goodput per device
    before it rounds up; here shape and number are chosen together, which is the same in an unlimited cluster. Since
    90 % of 90 % is less than 90 %, the best combinations are measured jointly, and with a rate, instances are added to
    the phase that falls short.

    Returns:
        The best placements, best first, quickly measured; none where no shape of a phase meets its target.
    """
    resources, pools = question.resources, (question.resources.prefill, question.resources.decode)
    of_prefill, of_decode = (shapes(pool.profile, resources.cluster, resources.longest_tokens) for pool in pools)
    bounds = _PhaseBounds(question, mapper)
    bounds.measure("prefill", [(shape, 1) for shape in of_prefill])
    measured: set[Shape] = set()
    while True:  # only the decode shapes that may be part of the best combinations are simulated
        candidates = _combined(
            question,
            {shape: bounds.prefill(shape, 1) for shape in of_prefill if bounds.prefill(shape, 1) > 0},
            {shape: bounds.decode(shape, 1) for shape in of_decode if bounds.decode(shape, 1) > 0},
        )
        missing = {candidate.decode for candidate in candidates} - measured
        if not missing:
            break
        bounds.measure("decode", [(shape, 1) for shape in sorted(missing)])
        measured |= missing
    slim = _slim(question)
    grown = dict.fromkeys(mapper(_grown, [(slim, candidate) for candidate in candidates]))
    tasks = [(slim, candidate, 0.0, bounds.bound(candidate) * _BOUND_SLACK) for candidate in grown]
    scores = [
        Score(candidate=candidate, algorithm="1", goodput=goodput, price=resources.price(candidate))
        for candidate, goodput in zip(grown, mapper(_quick_goodput, tasks), strict=True)
        if goodput is not None and goodput.mean > 0
    ]
    return sorted(scores, key=lambda score: score.rank)


def algorithm_2(question: Question, mapper: Mapper = map) -> list[Score]:
    """Low node affinity: KV stays inside nodes. Every pair of shapes that shares nodes is simulated jointly, here with
    any ratio of instances that fits them.

    Returns:
        The best placements, best first, quickly measured.
    """
    return _search(question, list(segmented(question.resources)), "2", question.effort.finalists, mapper)


def best_colocated(question: Question, mapper: Mapper = map) -> list[Score]:
    """Plain instances with chunked prefill, each shape with each token budget.

    Returns:
        The best, best first, quickly measured. With a rate all that meet the targets: the cheapest that serves it need
        not be among those with the most goodput per price.
    """
    candidates = list(colocated(question.resources))
    keep = question.effort.finalists if question.rate is None else len(candidates)
    return _search(question, candidates, "colocated", keep, mapper)


def measure(question: Question, scores: Sequence[Score], mapper: Mapper = map) -> list[Score]:
    """Measure candidates with all requests and seeds, and tell what limits each. Best first."""
    return sorted(mapper(_measure, [(question, score) for score in scores]), key=lambda score: score.rank)


def nearest_slo(question: Question, candidates: Iterable[Candidate]) -> tuple[SLO, Candidate] | None:
    """The tightest targets, in the proportion of those asked for, that some candidate meets for requests that come one
    at a time; None where not even that can be."""
    found: list[tuple[float, Candidate]] = []
    for candidate in candidates:
        workload, search = question.quick
        spread = workload.head(200).at_rate(1e-3)
        scale = slo_scale(simulate(question.resources.system(candidate), spread), question.slo, search)
        found.append((scale, candidate))
    if not found or not math.isfinite(min(found, key=lambda pair: pair[0])[0]):
        return None
    scale, candidate = min(found, key=lambda pair: pair[0])
    return question.slo.scaled(scale), candidate


def require_shapes(question: Question) -> None:
    """Fail early where the model fits nowhere.

    Raises:
        NoFeasiblePlacement: no shape fits; the text says what would be needed.
    """
    resources = question.resources
    for name, pool in (("prefill", resources.prefill), ("decode", resources.decode)):
        if not shapes(pool.profile, resources.cluster, resources.longest_tokens):
            model, cluster = pool.profile.model, resources.cluster
            raise NoFeasiblePlacement(
                f"{model.name} ({model.weight_bytes / 1e9:.0f} GB of weights, {model.num_layers} layers, "
                f"{model.num_heads} heads) with KV for a request of {resources.longest_tokens} tokens fits no {name} "
                f"instance on {cluster.num_nodes} x {cluster.devices_per_node} {pool.profile.device}: give more "
                f"devices, or a profile with a higher tensor-parallel degree than {max(pool.profile.entries)}"
            )


# Workers: plain functions of one value, so that a pool of processes can run them.


def _phase_goodput(task: tuple[Question, _Phase, Shape, int, float]) -> float:
    """What so many instances give if the other phase costs nothing, at most the limit."""
    question, phase, shape, num, limit = task
    workload, search = question.quick
    slo, resources = question.slo, question.resources
    if phase == "prefill":
        engine, target = resources.prefill_engine(shape), SLO(ttft_s=slo.ttft_s, tpot_s=_NEVER)
    else:
        engine, target = resources.decode_engine(shape), SLO(ttft_s=_NEVER, tpot_s=slo.tpot_s)
    system = System(decode=(engine,) * num, phase=phase)
    # Decoding is mostly bound by memory or the targets, and then the bound is near; prompts queue before.
    return find_goodput(system, [workload], target, search, guess=_guess(limit, _NEAR[phase]), limit=limit).mean


def _quick_goodput(task: tuple[Question, Candidate, float, float]) -> Goodput | None:
    """None where it does not reach the rate to beat."""
    question, candidate, to_beat, limit = task
    workload, search = question.quick
    system = question.resources.system(candidate)
    if to_beat > 0 and attainment_at(system, workload, to_beat, question.slo, search) < search.goal:
        return None
    return find_goodput(
        system, [workload], question.slo, search, guess=max(to_beat, _guess(limit, _NEAR["both"])), limit=limit
    )


def _measure(task: tuple[Question, Score]) -> Score:
    question, score = task
    system = question.resources.system(score.candidate)
    goodput = find_goodput(system, question.workloads, question.slo, question.search, guess=score.goodput.mean or None)
    beyond = question.search.run_of(question.workloads[0], max(goodput.mean * 1.1, 1e-3), question.slo)
    outcome = simulate(system, beyond, backend=question.search.backend)
    limit, share = limit_of(outcome, question.slo, skip=question.search.skip)
    return replace(score, goodput=goodput, limit=limit, limit_share=share)


# Searching.


def _search(
    question: Question, candidates: list[Candidate], algorithm: Algorithm, keep: int, mapper: Mapper
) -> list[Score]:
    """The best candidates. Those whose bound lies below what the best already reach are left out."""
    price, of_phase = question.resources.price, _PhaseBounds(question, mapper)
    split = [candidate for candidate in candidates if candidate.prefill is not None]
    of_phase.measure("prefill", [(c.prefill, c.num_prefill) for c in split if c.prefill is not None])
    bounds = {candidate: of_phase.bound(candidate) for candidate in candidates}
    order = sorted(candidates, key=lambda c: (-bounds[c] / price(c), c.num_devices))
    best: list[Score] = []
    for begin in range(0, len(order), _BATCH):
        to_beat = best[-1].per_price if len(best) == keep else 0.0
        batch = [c for c in order[begin : begin + _BATCH] if bounds[c] * _BOUND_SLACK > to_beat * price(c)]
        if not batch and bounds[order[begin]] < math.inf:
            break
        tasks = [(_slim(question), c, to_beat * price(c), bounds[c] * _BOUND_SLACK) for c in batch]
        for candidate, goodput in zip(batch, mapper(_quick_goodput, tasks), strict=True):
            if goodput is not None and goodput.mean > 0:
                best.append(Score(candidate=candidate, algorithm=algorithm, goodput=goodput, price=price(candidate)))
        best = sorted(best, key=lambda score: score.rank)[:keep]
    return best


class _PhaseBounds:
    """The most that instances of one phase give: by their step times (`bounds`), and where it was simulated by that.

    Prompts alone are simulated in a millisecond, and queues make them miss a tight target long before the device is
    full. That leaves most pairs of shapes out before anything is decoded.
    """

    def __init__(self, question: Question, mapper: Mapper) -> None:
        self._question, self._mapper = _slim(question), mapper
        self._load = load_of(question.workloads)
        self._simulated: dict[tuple[_Phase, Shape, int], float] = {}
        self._by_step_times: dict[tuple[_Phase, Shape], float] = {}

    def measure(self, phase: _Phase, systems: Iterable[tuple[Shape, int]]) -> None:
        """Simulate these numbers of instances without the other phase."""
        tasks = [
            (self._question, phase, shape, num, num * self._one(phase, shape) * _BOUND_SLACK)
            for shape, num in dict.fromkeys(systems)
            if (phase, shape, num) not in self._simulated
        ]
        for task, goodput in zip(tasks, self._mapper(_phase_goodput, tasks), strict=True):
            self._simulated[task[1:4]] = goodput

    def prefill(self, shape: Shape, num: int) -> float:
        """Prompts per second."""
        return self._simulated.get(("prefill", shape, num), num * self._one("prefill", shape))

    def decode(self, shape: Shape, num: int) -> float:
        """Requests per second."""
        return self._simulated.get(("decode", shape, num), num * self._one("decode", shape))

    def bound(self, candidate: Candidate) -> float:
        """Requests per second that it can serve at most."""
        if candidate.prefill is not None:
            return min(
                self.prefill(candidate.prefill, candidate.num_prefill),
                self.decode(candidate.decode, candidate.num_decode),
            )
        engine = self._question.resources.colocated_engine(candidate.decode, candidate.budget)
        return candidate.num_decode * min(
            prefill_bound(engine, self._load), decode_bound(engine, self._load, self._question.slo)
        )

    def _one(self, phase: _Phase, shape: Shape) -> float:
        if (phase, shape) not in self._by_step_times:
            resources, load = self._question.resources, self._load
            self._by_step_times[phase, shape] = (
                prefill_bound(resources.prefill_engine(shape), load)
                if phase == "prefill"
                else decode_bound(resources.decode_engine(shape), load, self._question.slo)
            )
        return self._by_step_times[phase, shape]


def _guess(bound: float, share: float) -> float:
    """Where to begin."""
    return share * bound if 0 < bound < 1e6 else 1.0


def _slim(question: Question) -> Question:
    """Without the seeds that a quick run does not use: it travels to another process with every candidate."""
    return replace(question, workloads=question.workloads[:1])


def _combined(question: Question, prefill: dict[Shape, float], decode: dict[Shape, float]) -> list[Candidate]:
    """The combinations that promise the most: with a rate the cheapest that keep up with it, without one the most
    goodput per price of what fits the cluster."""
    resources = question.resources
    segments = 0 if resources.cluster.num_nodes > 1 else 1
    promises: list[tuple[float, int, Candidate]] = []
    for ours, of_prefill in prefill.items():
        for theirs, of_decode in decode.items():
            for n, m in _numbers(question, ours, of_prefill, theirs, of_decode):
                candidate = Candidate(
                    kind="split", prefill=ours, num_prefill=n, decode=theirs, num_decode=m, segments=segments
                )
                rate = min(n * of_prefill, m * of_decode, question.rate or math.inf)
                promises.append((-rate / resources.price(candidate), candidate.num_devices, candidate))
    promises.sort(key=lambda promise: promise[:2])
    return [candidate for _, _, candidate in promises[: question.effort.finalists]]


def _numbers(
    question: Question, prefill: Shape, prefill_rate: float, decode: Shape, decode_rate: float
) -> Iterable[tuple[int, int]]:
    """Pairs of n and m to consider: what the rate needs, or, for each n, as many m as keep up with it."""
    limit = question.resources.cluster.num_devices
    if question.rate is not None:
        pairs = [(math.ceil(question.rate / prefill_rate), math.ceil(question.rate / decode_rate))]
    else:
        pairs = [
            (n, m)
            for n in range(1, limit // prefill.num_devices + 1)
            for m in {max(1, math.floor(n * prefill_rate / decode_rate)), math.ceil(n * prefill_rate / decode_rate)}
        ]
    return [(n, m) for n, m in pairs if n * prefill.num_devices + m * decode.num_devices <= limit]


def _grown(task: tuple[Question, Candidate]) -> Candidate:
    """Check Algorithm 1's answer jointly: with a rate, add instances until it is reached or the cluster is full."""
    question, candidate = task
    resources, search, workload = question.resources, question.search, question.workloads[0]
    while question.rate is not None:
        outcome = simulate(
            resources.system(candidate), search.run_of(workload, question.rate, question.slo), backend=search.backend
        )
        if outcome.attainment(question.slo, skip=search.skip) >= search.goal:
            break
        limit, _ = limit_of(outcome, question.slo, skip=search.skip)
        more = (1, 0) if limit.startswith("prefill") else (0, 1)
        larger = replace(
            candidate, num_prefill=candidate.num_prefill + more[0], num_decode=candidate.num_decode + more[1]
        )
        if larger.num_devices > resources.cluster.num_devices:
            break
        candidate = larger
    return candidate
