"""Settings of an emulated engine. They travel to its processes in vLLM's `additional_config`."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final, Literal, get_args

from vllm_disagg.config import setting
from vllm_disagg.errors import ConfigError

CONFIG_KEY: Final = "vllm_disagg_emulation"
"""Where the settings lie in `additional_config`."""

FAULTS_ENV: Final = "VLLM_DISAGG_FAULTS"
"""Environment variable that names the file of faults to inject; see `faults`."""

LinkName = Literal["none", "nvlink", "pcie5", "200g", "25g"]
HookOrder = Literal["v1", "v2"]
HostTime = Literal["hidden", "shown"]


@dataclass(frozen=True, slots=True, kw_only=True)
class EmulationSettings:
    """What replaces the device of one engine."""

    emulate: str = setting(
        "", "Emulate the device instead of computing: a profile by name, or the path of a JSON file. See `--dilation`."
    )
    emulate_model: str = setting(
        "", "Which model of the profile's file, where it holds several. Default: the model's name."
    )
    dilation: float = setting(
        1.0,
        "How many times slower than the profile the emulated device runs, so that the host's own time weighs less. "
        "Divide measured times by it, and multiply rates. 0 does not wait at all: for tests of logic, not of time.",
    )
    emulate_link: LinkName = setting(
        "none", "Link over which KV of full size would travel, whose time a transfer then takes at least."
    )
    emulate_link_ledger: str = setting(
        "", "File in which the emulated engines of one host note when their links are busy. Default: each for itself."
    )
    emulate_host: HostTime = setting(
        "hidden",
        "Whether what the host does between two steps delays the device: shown, as with synchronous scheduling on "
        "CPUs, or hidden while it takes no longer than a step, as with asynchronous scheduling on GPUs.",
    )
    emulate_overhead_ms: float = setting(0.0, "Device time added to every step, milliseconds.")
    emulate_jitter: float = setting(0.0, "Spread of step times: the standard deviation of their logarithm.")
    emulate_seed: int = setting(0, "Seed of the jitter.")
    emulate_hook_order: HookOrder = setting("v1", "Order of the connector's hooks: of vLLM's model runner v1 or v2.")
    emulate_layer_groups: int = setting(
        2, "How many layer groups stand for the model's layers; a multiple of every pipeline degree in use."
    )
    emulate_output_tokens: float = setting(256.0, "Mean length of an answer that nothing else ends, tokens.")

    def __post_init__(self) -> None:
        for name in ("dilation", "emulate_overhead_ms", "emulate_jitter"):
            if not (math.isfinite(getattr(self, name)) and getattr(self, name) >= 0):
                raise ConfigError(f"--{name.replace('_', '-')} must be 0 or more, not {getattr(self, name)}")
        if not (math.isfinite(self.emulate_output_tokens) and self.emulate_output_tokens >= 1):
            raise ConfigError(f"--emulate-output-tokens must be at least 1, not {self.emulate_output_tokens}")
        if self.emulate_layer_groups < 1:
            raise ConfigError(f"--emulate-layer-groups must be at least 1, not {self.emulate_layer_groups}")
        for name, kind in (("emulate_link", LinkName), ("emulate_hook_order", HookOrder), ("emulate_host", HostTime)):
            if getattr(self, name) not in get_args(kind):
                raise ConfigError(
                    f"--{name.replace('_', '-')} must be one of {', '.join(get_args(kind))}, "
                    f"not {getattr(self, name)!r}"
                )

    def to_config(self) -> dict[str, Any]:
        """The plain dict that `additional_config` carries."""
        return dataclasses.asdict(self)

    @classmethod
    def from_config(cls, additional_config: Any) -> EmulationSettings | None:
        """Read them back inside an engine; None for an engine that is not emulated.

        Raises:
            ConfigError: a value is missing or out of range.
        """
        values = additional_config.get(CONFIG_KEY) if isinstance(additional_config, Mapping) else None
        if values is None:
            return None
        try:
            return cls(**values)
        except TypeError as error:
            raise ConfigError(f"{CONFIG_KEY} in additional_config: {error}") from error


def label_of(settings: EmulationSettings) -> str:
    """What everything an emulated engine prints is marked with."""
    return f"emulated {settings.emulate} dilation={settings.dilation:g}"
