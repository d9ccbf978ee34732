"""What is simulated: engines, their roles, and the links between them."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Literal, get_args

from vllm_disagg.core.latency import LatencyModel
from vllm_disagg.core.link import LINKS, Link
from vllm_disagg.core.scheduling.rules import Rules
from vllm_disagg.errors import ConfigError

Policy = Literal["chunked", "whole", "prefill_first", "prefill", "decode"]
"""How an engine forms its steps.

`chunked`: vLLM 0.32, running requests first, then waiting ones, prompts cut to what the token budget leaves. `whole`:
the same without chunked prefill: prompts are computed whole, as they came, up to the budget, a longer one alone.
`prefill_first`: vLLM 0.2, a step of whole prompts if one can be admitted, else a decode step.

`prefill` and `decode`: the schedulers of this project for the two roles (docs/scheduling.md), over vLLM 0.32."""

FirstToken = Literal["decode", "prefill"]
"""Who sends a split request's first token. `decode`: the decode instance recomputes the last prompt token, so that
transfer and decode queue count in TTFT. `prefill`: the prefill instance, as in DistServe: they count in TPOT."""

Phase = Literal["both", "prefill", "decode"]
"""`prefill`: requests end with their prompt. `decode`: they come with their prompt computed, at no cost, and their
first token sent. Both are what DistServe's Algorithm 1 searches with."""


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineSpec:
    """One engine. Defaults are vLLM 0.32's where it has the setting.

    Args:
        latency: step times at pipeline degree 1.
        kv_tokens: tokens whose KV fits, over all its devices.
        block_size: tokens per KV block.
        pp: pipeline stages, each taking 1/pp of a step's time; up to so many steps are under way at once.
        policy: how it forms steps.
        rules: of the policies `prefill` and `decode`.
        max_num_batched_tokens: new tokens per step. Of these, `prefill` fills L_m, which is one of its rules.
        max_num_seqs: running requests.
        prefix_cache: whether shared beginnings are computed once.
        watermark: share of the blocks kept free when a waiting request is admitted beside running ones.
        step_overhead_s: host time per step during which the device waits.
        request_overhead_s: the same per request in the step.
        hop_s: added to every stage of every step.
        num_devices: what it occupies, for goodput per device.

    Raises:
        ConfigError: a value is out of range.
    """

    latency: LatencyModel
    kv_tokens: int
    block_size: int = 16
    pp: int = 1
    policy: Policy = "chunked"
    rules: Rules = field(default_factory=Rules)
    max_num_batched_tokens: int = 8192
    max_num_seqs: int = 1024
    prefix_cache: bool = True
    watermark: float = 0.0
    step_overhead_s: float = 0.0
    request_overhead_s: float = 0.0
    hop_s: float = 0.0
    num_devices: int = 1

    def __post_init__(self) -> None:
        for name in ("kv_tokens", "block_size", "pp", "max_num_batched_tokens", "max_num_seqs", "num_devices"):
            if getattr(self, name) < 1:
                raise ConfigError(f"an engine's {name} must be at least 1, not {getattr(self, name)!r}")
        for name in ("watermark", "step_overhead_s", "request_overhead_s", "hop_s"):
            if not (math.isfinite(getattr(self, name)) and getattr(self, name) >= 0):
                raise ConfigError(f"an engine's {name} must be 0 or more, not {getattr(self, name)!r}")
        if self.watermark >= 1:
            raise ConfigError(f"an engine's watermark must be below 1, not {self.watermark!r}")
        if self.policy not in get_args(Policy):
            raise ConfigError(f"the policy must be one of {', '.join(get_args(Policy))}, not {self.policy!r}")
        if self.num_blocks < 1:
            raise ConfigError(f"{self.kv_tokens} tokens of KV are less than one block of {self.block_size}")

    @property
    def num_blocks(self) -> int:
        """KV blocks it has."""
        return self.kv_tokens // self.block_size

    @property
    def batch_tokens(self) -> int:
        """L_m: prompt tokens of a step of policy `prefill`."""
        return min(self.max_num_batched_tokens, self.rules.batch_tokens or self.max_num_batched_tokens)

    @property
    def most_batch_tokens(self) -> int:
        """The most prompt tokens of such a step, however many wait."""
        return self.max_num_batched_tokens if self.rules.backlog else self.batch_tokens

    @property
    def watermark_blocks(self) -> int:
        """Blocks kept free at admission."""
        return int(self.watermark * self.num_blocks)


@dataclass(frozen=True, slots=True, kw_only=True)
class System:
    """A deployment. Without prefill instances every request runs wholly on one `decode` instance: colocated.

    Args:
        prefill, decode: its instances.
        link: what every link end carries; a transfer occupies the sender's and the receiver's end at once, one after
            the other in the order in which they were asked for.
        prefill_ends, decode_ends: number of each instance's link end; instances of one node may share one. None: each
            has its own.
        kv_bytes_per_token: what a token's KV weighs.
        handoff_s: from the end of a prompt to the request's arrival at the decode instance, without the KV.
        dispatch_s: from a request's arrival to an engine's queue.
        first_token: who sends it.
        hold_cap_s: how long prefill keeps KV that nobody fetched.
        pull_timeout_s: a transfer that takes longer fails; the decode instance then computes the prompt.
        early_reads: whether a busy decode instance begins to fetch when a request arrives, into blocks set aside for
            that (`core/scheduling/reserve.py`). Otherwise, as when it is idle, it does when it next forms a step.
        min_split_tokens: shorter prompts run wholly on a decode instance.
        phase: which part of a request is simulated.

    Raises:
        ConfigError: there is no decode instance, or a value is out of range.
    """

    decode: tuple[EngineSpec, ...]
    prefill: tuple[EngineSpec, ...] = ()
    link: Link = field(default=LINKS["none"])
    prefill_ends: tuple[int, ...] | None = None
    decode_ends: tuple[int, ...] | None = None
    kv_bytes_per_token: int = 0
    handoff_s: float = 0.0
    dispatch_s: float = 0.0
    first_token: FirstToken = "decode"  # noqa: S105
    hold_cap_s: float = 300.0
    pull_timeout_s: float = 10.0
    early_reads: bool = True
    min_split_tokens: int = 0
    phase: Phase = "both"

    def __post_init__(self) -> None:
        if not self.decode:
            raise ConfigError("a system needs at least one decode instance; colocated ones count as such")
        if self.phase != "both" and self.prefill:
            raise ConfigError(f"phase {self.phase!r} is simulated on `decode` instances alone")
        prompts, others = (self.decode, ()) if self.phase == "prefill" else (self.prefill, self.decode)
        if any(engine.policy == "prefill" for engine in others):
            raise ConfigError("policy 'prefill' is one of instances that end requests with their prompt")
        if any(engine.policy == "decode" for engine in prompts):
            raise ConfigError("policy 'decode' is one of instances that decode")
        for name in ("handoff_s", "dispatch_s", "min_split_tokens", "kv_bytes_per_token"):
            if not (math.isfinite(getattr(self, name)) and getattr(self, name) >= 0):
                raise ConfigError(f"{name} must be 0 or more, not {getattr(self, name)!r}")
        for name in ("hold_cap_s", "pull_timeout_s"):
            if not getattr(self, name) > 0:
                raise ConfigError(f"{name} must be positive, not {getattr(self, name)!r}")
        if not (self.link.bytes_per_s > 0 and math.isfinite(self.link.latency_s) and self.link.latency_s >= 0):
            raise ConfigError(f"a link needs a positive bandwidth and a latency from 0 on, not {self.link}")
        for engines, ends in ((self.prefill, self.prefill_ends), (self.decode, self.decode_ends)):
            if ends is not None and (len(ends) != len(engines) or min(ends, default=0) < 0):
                raise ConfigError(f"{len(engines)} instances need as many link ends from 0 on, not {ends}")

    @property
    def engines(self) -> tuple[EngineSpec, ...]:
        """All instances, prefill first; their position here is their number in results."""
        return self.prefill + self.decode

    @property
    def ends(self) -> tuple[int, ...]:
        """Each instance's link end. Prefill's ends send and decode's receive, so that equal numbers do not collide."""
        first = self.prefill_ends if self.prefill_ends is not None else tuple(range(len(self.prefill)))
        second = self.decode_ends if self.decode_ends is not None else tuple(range(len(self.decode)))
        return first + second

    @property
    def num_devices(self) -> int:
        """Devices of all instances."""
        return sum(engine.num_devices for engine in self.engines)
