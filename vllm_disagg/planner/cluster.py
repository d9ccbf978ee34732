"""What there is to plan with: devices, nodes, links, and what engines cost beside their device's time."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Literal, get_args

from vllm_disagg.core.link import LINKS, Link
from vllm_disagg.core.profile import Profile
from vllm_disagg.core.scheduling.pace import L_M_SHARE
from vllm_disagg.core.scheduling.pace import critical_length as critical_length
from vllm_disagg.core.scheduling.rules import Rules
from vllm_disagg.errors import ConfigError
from vllm_disagg.sim.system import FirstToken

Scheduling = Literal["phase", "vllm", "distserve"]
"""How instances with a role schedule: `phase` and `vllm` as under `--kv-scheduling`; `distserve` as the paper's engine
does: prefill packs whole prompts up to L_m as they came, decode does as vLLM."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Cluster:
    """Nodes of equal size.

    Args:
        num_nodes: how many.
        devices_per_node: devices in each.
        intra: link of each device inside its node.
        inter: link of each node to the others, shared by its devices.
    """

    num_nodes: int = 1
    devices_per_node: int = 8
    intra: Link = field(default=LINKS["nvlink"])
    inter: Link = field(default=LINKS["25g"])

    def __post_init__(self) -> None:
        if self.num_nodes < 1 or self.devices_per_node < 1:
            raise ConfigError(
                f"a cluster needs at least one node with one device, not {self.num_nodes} x {self.devices_per_node}"
            )

    @property
    def num_devices(self) -> int:
        """All of them."""
        return self.num_nodes * self.devices_per_node


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineOptions:
    """How the planned engines would be started, and what they cost beside the profile's step times.

    Args:
        block_size: tokens per KV block.
        max_num_seqs: running requests.
        chunk_budgets: token budgets that colocated instances are tried with.
        l_m_share: prefill packs prompts up to the length at which a device computes this share of the most tokens per
            second that it can; with 0.88 about 500 tokens for OPT-13B on an A100, where DistServe says 512.
        scheduling: how instances with a role schedule.
        rules: of `phase`. Their L_m of 0 stands for the one that `l_m_share` gives.
        prefill_budget: tokens per step of prefill instances, beyond which vLLM cuts a prompt.
        step_overhead_s: see `EngineSpec`; None for what the profile has measured, 0 where its steps contain it.
        request_overhead_s, hop_s: see `EngineSpec`.
        early_reads, handoff_s, dispatch_s, first_token, hold_cap_s, pull_timeout_s: see `System`.
    """

    block_size: int = 16
    max_num_seqs: int = 1024
    chunk_budgets: tuple[int, ...] = (512, 2048, 8192)
    l_m_share: float = L_M_SHARE
    scheduling: Scheduling = "phase"
    rules: Rules = field(default_factory=Rules)
    prefill_budget: int = 2048
    step_overhead_s: float | None = 0.0
    request_overhead_s: float = 0.0
    hop_s: float = 0.0
    handoff_s: float = 0.0
    dispatch_s: float = 0.0
    first_token: FirstToken = "decode"  # noqa: S105
    early_reads: bool = True
    hold_cap_s: float = 300.0
    pull_timeout_s: float = 10.0

    def __post_init__(self) -> None:
        if not 0 < self.l_m_share < 1:
            raise ConfigError(f"l_m_share must lie between 0 and 1, not {self.l_m_share!r}")
        if self.scheduling not in get_args(Scheduling):
            raise ConfigError(
                f"the scheduling must be one of {', '.join(get_args(Scheduling))}, not {self.scheduling!r}"
            )
        if not self.chunk_budgets or min(self.chunk_budgets) < 1:
            raise ConfigError(f"colocated instances need token budgets from 1 on, not {self.chunk_budgets!r}")


@dataclass(frozen=True, slots=True, kw_only=True)
class Pool:
    """Devices of one kind, and the model's profile on them.

    Args:
        profile: of the model on this kind of device.
        price: of one device, in any unit: candidates are ranked by goodput per price.
    """

    profile: Profile
    price: float = 1.0

    def __post_init__(self) -> None:
        if not (math.isfinite(self.price) and self.price > 0):
            raise ConfigError(f"the price of a device must be a positive number, not {self.price!r}")
