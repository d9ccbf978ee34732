"""Which placements there are: shapes of instances that a model allows and that fit memory, and how they combine."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cache
from typing import Literal

from vllm_disagg.core.link import Link
from vllm_disagg.core.profile import ModelShape, Profile
from vllm_disagg.core.scheduling.rules import Rules
from vllm_disagg.errors import ConfigError
from vllm_disagg.planner.cluster import Cluster, EngineOptions, Pool, critical_length
from vllm_disagg.sim.system import EngineSpec, Policy, System

Kind = Literal["colocated", "split"]

_critical_length = cache(critical_length)
"""It is asked for with every candidate of a shape."""


@dataclass(frozen=True, slots=True, order=True)
class Shape:
    """Parallelism of one instance: tensor-parallel degree, then pipeline stages."""

    tp: int
    pp: int

    @property
    def num_devices(self) -> int:
        return self.tp * self.pp

    def __str__(self) -> str:
        return f"TP{self.tp} PP{self.pp}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Candidate:
    """A placement: so many instances of one shape per phase.

    Args:
        kind: whether the phases are divided.
        prefill, decode: shape of each phase's instances; `prefill` is None for a colocated one.
        num_prefill, num_decode: how many.
        segments: nodes over which each instance is cut at the same layers, so that KV moves inside nodes only
            (DistServe's Algorithm 2); 1 for instances that lie within a node. 0: anywhere, KV crosses nodes
            (Algorithm 1).
        budget: tokens per step of colocated instances.
    """

    kind: Kind
    decode: Shape
    num_decode: int = 1
    prefill: Shape | None = None
    num_prefill: int = 0
    segments: int = 1
    budget: int = 0

    @property
    def num_devices(self) -> int:
        return self.num_prefill_devices + self.num_decode * self.decode.num_devices

    @property
    def num_prefill_devices(self) -> int:
        return self.num_prefill * self.prefill.num_devices if self.prefill else 0

    @property
    def name(self) -> str:
        """How people say it."""
        if self.prefill is None:
            return f"{self.num_decode} x colocated {self.decode}, budget {self.budget}"
        where = "" if self.segments == 1 else " across nodes" if self.segments == 0 else f" in {self.segments} segments"
        return f"{self.num_prefill}P{self.num_decode}D, prefill {self.prefill}, decode {self.decode}{where}"

    def times(self, factor: int) -> Candidate:
        """So many of it."""
        return Candidate(
            kind=self.kind, decode=self.decode, num_decode=self.num_decode * factor, prefill=self.prefill,
            num_prefill=self.num_prefill * factor, segments=self.segments, budget=self.budget,
        )  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class Resources:
    """All that turns a candidate into a system that can be simulated.

    Args:
        prefill, decode: devices and profile of each phase; colocated instances use decode's.
        cluster: nodes and links.
        options: of the engines.
        longest_tokens: prompt and output of the longest request: KV has to hold at least that.
    """

    prefill: Pool
    decode: Pool
    cluster: Cluster
    options: EngineOptions
    longest_tokens: int

    def __post_init__(self) -> None:
        if self.prefill.profile.model != self.decode.profile.model:
            raise ConfigError(
                f"prefill's profile is of {self.prefill.profile.model.name} and decode's of "
                f"{self.decode.profile.model.name}: give profiles of the same model"
            )

    @property
    def model(self) -> ModelShape:
        return self.decode.profile.model

    def price(self, candidate: Candidate) -> float:
        """What its devices cost."""
        decode = candidate.num_decode * candidate.decode.num_devices
        return candidate.num_prefill_devices * self.prefill.price + decode * self.decode.price

    def prefill_engine(self, shape: Shape) -> EngineSpec:
        """An instance that ends requests with their prompt."""
        profile, options = self.prefill.profile, self.options
        l_m = options.rules.batch_tokens or _critical_length(
            profile.entry(shape.tp).latency, options.l_m_share, longest=self.model.max_model_len
        )
        match options.scheduling:
            case "phase":
                rules = replace(options.rules, batch_tokens=l_m, backlog=not options.rules.batch_tokens)
                return self._engine(profile, shape, "prefill", options.prefill_budget, rules)
            case "distserve":
                return self._engine(profile, shape, "whole", l_m)
            case _:
                return self._engine(profile, shape, "chunked", options.prefill_budget)

    def decode_engine(self, shape: Shape) -> EngineSpec:
        """An instance that decodes, and computes a prompt only where its KV was lost."""
        policy: Policy = "decode" if self.options.scheduling == "phase" else "chunked"
        return self._engine(self.decode.profile, shape, policy, max(self.options.chunk_budgets), self.options.rules)

    def colocated_engine(self, shape: Shape, budget: int) -> EngineSpec:
        """A plain vLLM instance with chunked prefill."""
        return self._engine(self.decode.profile, shape, "chunked", budget)

    def system(self, candidate: Candidate) -> System:
        """The candidate as it would run."""
        if candidate.prefill is None:
            engine = self.colocated_engine(candidate.decode, candidate.budget)
            return System(decode=(engine,) * candidate.num_decode, dispatch_s=self.options.dispatch_s)
        link, prefill_ends, decode_ends = self._links(candidate)
        options = self.options
        return System(
            prefill=(self.prefill_engine(candidate.prefill),) * candidate.num_prefill,
            decode=(self.decode_engine(candidate.decode),) * candidate.num_decode,
            link=link,
            prefill_ends=prefill_ends,
            decode_ends=decode_ends,
            kv_bytes_per_token=self.model.kv_bytes_per_token,
            handoff_s=options.handoff_s,
            dispatch_s=options.dispatch_s,
            first_token=options.first_token,
            early_reads=options.early_reads,
            hold_cap_s=options.hold_cap_s,
            pull_timeout_s=options.pull_timeout_s,
        )

    def _engine(
        self, profile: Profile, shape: Shape, policy: Policy, budget: int, rules: Rules | None = None
    ) -> EngineSpec:
        options, entry = self.options, profile.entry(shape.tp)
        measured_s, given_s = entry.between_steps_s or 0.0, options.step_overhead_s
        return EngineSpec(
            latency=entry.latency,
            kv_tokens=profile.kv_capacity_tokens(shape.tp, shape.pp),
            block_size=options.block_size,
            pp=shape.pp,
            policy=policy,
            rules=rules or options.rules,
            max_num_batched_tokens=budget,
            max_num_seqs=options.max_num_seqs,
            step_overhead_s=measured_s if given_s is None else given_s,
            request_overhead_s=options.request_overhead_s,
            hop_s=options.hop_s,
            num_devices=shape.num_devices,
        )

    def _links(self, candidate: Candidate) -> tuple[Link, tuple[int, ...] | None, tuple[int, ...] | None]:
        """Within nodes, every device of the smaller side has its own link to its counterpart. Across nodes, all devices
        of a node share one; instances fill node after node, decode's after prefill's."""
        assert candidate.prefill is not None
        if candidate.segments > 0 or self.cluster.num_nodes == 1:
            lanes = min(candidate.prefill.num_devices, candidate.decode.num_devices)
            intra = self.cluster.intra
            return Link(bytes_per_s=intra.bytes_per_s * lanes, latency_s=intra.latency_s), None, None
        per_node, first = self.cluster.devices_per_node, candidate.num_prefill_devices
        prefill = tuple(i * candidate.prefill.num_devices // per_node for i in range(candidate.num_prefill))
        decode = tuple((first + i * candidate.decode.num_devices) // per_node for i in range(candidate.num_decode))
        return self.cluster.inter, prefill, decode


def shapes(profile: Profile, cluster: Cluster, longest_tokens: int, *, max_devices: int | None = None) -> list[Shape]:
    """Shapes that the model can be cut into, that were profiled, that fit the cluster, and whose memory holds the
    weights and the KV of at least the longest request. Tensor parallelism stays within a node."""
    limit = min(cluster.num_devices, max_devices or cluster.num_devices)
    return [
        Shape(tp, pp)
        for tp in sorted(profile.entries)
        if tp <= cluster.devices_per_node and divides_heads(profile.model, tp)
        for pp in range(1, limit // tp + 1)
        if profile.model.num_layers % pp == 0 and _kv_tokens(profile, tp, pp) >= longest_tokens
    ]


def divides_heads(model: ModelShape, tp: int) -> bool:
    """Whether heads can be shared out over so many devices; few KV heads may be held more than once."""
    return model.num_heads % tp == 0 and (model.num_kv_heads % tp == 0 or tp % model.num_kv_heads == 0)


def colocated(resources: Resources) -> Iterator[Candidate]:
    """One instance of each shape and token budget."""
    for shape in shapes(resources.decode.profile, resources.cluster, resources.longest_tokens):
        for budget in resources.options.chunk_budgets:
            yield Candidate(kind="colocated", decode=shape, budget=budget)


def segmented(resources: Resources) -> Iterator[Candidate]:
    """Algorithm 2's: prefill and decode instances are cut into segments at the same layers, and the segments of a stage
    share a node. Extended to several instances of each phase per node. Divided by their greatest common number: two
    1P1D are found as one."""
    cluster, layers = resources.cluster, resources.model.num_layers
    of_prefill, of_decode = (
        shapes(pool.profile, cluster, resources.longest_tokens) for pool in (resources.prefill, resources.decode)
    )
    for segments in range(1, cluster.num_nodes + 1):
        if layers % segments:
            continue
        for prefill in of_prefill:
            for decode in of_decode:
                if prefill.pp % segments or decode.pp % segments:
                    continue
                yield from _ratios(prefill, decode, segments, cluster.devices_per_node)


def _ratios(prefill: Shape, decode: Shape, segments: int, per_node: int) -> Iterator[Candidate]:
    ours, theirs = prefill.num_devices // segments, decode.num_devices // segments
    for n in range(1, (per_node - theirs) // ours + 1):
        for m in range(1, (per_node - n * ours) // theirs + 1):
            if math.gcd(n, m) == 1:
                yield Candidate(
                    kind="split", prefill=prefill, num_prefill=n, decode=decode, num_decode=m, segments=segments
                )


def _kv_tokens(profile: Profile, tp: int, pp: int) -> int:
    try:
        return profile.kv_capacity_tokens(tp, pp)
    except ConfigError:  # the weights alone do not fit
        return 0
