"""What an engine's settings say of how it schedules, as the simulator takes it."""

from __future__ import annotations

from dataclasses import dataclass

from vllm_disagg.config import EngineSettings, PrefillOrder, default_of
from vllm_disagg.errors import ConfigError


@dataclass(frozen=True, slots=True, kw_only=True)
class Rules:
    """The settings of one engine under `--kv-scheduling phase`, each with the engine's own default.

    Args:
        prefill_order, held_share, patience_s, slo_ttft_s, slo_tpot_s: as in `EngineSettings`, which checks them too.
        batch_tokens: L_m, likewise; 0 for as many tokens as a step can have.
        backlog: whether steps have more than L_m where many wait (`packing.backlog_limit`), as on engines that were not
            given it.
    """

    prefill_order: PrefillOrder = default_of(EngineSettings, "prefill_order")
    batch_tokens: int = default_of(EngineSettings, "batch_tokens")
    backlog: bool = False
    held_share: float = default_of(EngineSettings, "held_share")
    patience_s: float = default_of(EngineSettings, "patience_s")
    slo_ttft_s: float = default_of(EngineSettings, "slo_ttft_s")
    slo_tpot_s: float = default_of(EngineSettings, "slo_tpot_s")

    def __post_init__(self) -> None:
        if not isinstance(self.batch_tokens, int):
            raise ConfigError(f"kv batch tokens must be a whole number, not {self.batch_tokens!r}")
        EngineSettings(
            role="prefill", prefill_order=self.prefill_order, batch_tokens=self.batch_tokens,
            held_share=self.held_share, patience_s=self.patience_s, slo_ttft_s=self.slo_ttft_s,
            slo_tpot_s=self.slo_tpot_s,
        )  # fmt: skip
