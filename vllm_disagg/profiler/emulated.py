"""An emulated engine that notes its steps, to compare them with the real one's."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

import msgspec

from vllm_disagg.emulation.executor import EmulatedExecutor
from vllm_disagg.emulation.settings import EmulationSettings, label_of
from vllm_disagg.profiler.facts import write_facts
from vllm_disagg.profiler.recorder import StepRecording, facts_of, log_path
from vllm_disagg.profiles import load_profile

if TYPE_CHECKING:
    from vllm.v1.kv_cache_interface import KVCacheConfig


class RecordingEmulatedExecutor(StepRecording, EmulatedExecutor):
    """Chosen by `--emulate PROFILE --distributed-executor-backend` and this path."""

    def initialize_from_config(self, kv_cache_configs: list[KVCacheConfig]) -> None:
        """It is what its profile says: the model it stands for, not the small one that vLLM has been given."""
        EmulatedExecutor.initialize_from_config(self, kv_cache_configs)
        settings = EmulationSettings.from_config(self.vllm_config.additional_config)
        assert settings is not None
        profile = load_profile(settings.emulate, model=settings.emulate_model or None)
        facts = facts_of(self.vllm_config, kv_cache_configs[0], weight_bytes=profile.model.weight_bytes)
        write_facts(
            msgspec.structs.replace(
                facts,
                model=dataclasses.replace(profile.model, max_model_len=facts.model.max_model_len),
                device=profile.device,
                device_memory_bytes=profile.device_memory_bytes,
                emulated=label_of(settings),
            ),
            log_path(),
        )
