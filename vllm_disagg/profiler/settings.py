"""Settings of `vllm-disagg profile`."""

from __future__ import annotations

import math
from dataclasses import dataclass

from vllm_disagg.config import KEY_ENV, engine_url, setting
from vllm_disagg.errors import ConfigError
from vllm_disagg.launcher.settings import has_flag

OWNED_FLAGS: tuple[tuple[str, str], ...] = (
    ("--host", "the engine stays on loopback"),
    ("--port", "a free one is chosen"),
    ("--distributed-executor-backend", "the profiler's own executor records the steps"),
    ("--async-scheduling", "a step that overlaps the next one cannot be timed"),
    ("--kv-transfer-config", "the profiler's own connector fills contexts"),
    ("--kv-role", "an undivided engine is measured, whose steps are those of either role"),
    ("--enable-prefix-caching", "prompts have to be computed to be measured"),
    ("--pipeline-parallel-size", "measure without a pipeline; stages are reckoned from that"),
    ("-pp", "measure without a pipeline; stages are reckoned from that"),
    ("--data-parallel-size", "measure one replica"),
    ("-dp", "measure one replica"),
    ("--emulate", "give it before the model's flags, to `profile` itself"),
)
"""Engine flags that cannot be given, and why not."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ProfileSettings:
    """Which engine to measure, and how thoroughly."""

    engine: tuple[str, ...] = ()
    """Model and flags of `vllm serve`."""
    url: str | None = setting(None, "Measure the running engine at this URL, instead of starting one.")
    emulate: str | None = setting(
        None, "Start an emulated engine with this profile: measures what the profile says, to try the profiler out."
    )
    out: str = setting("profile.json", "File to write. Where it is a profile of this model and device, it gains a TP.")
    budget_min: float = setting(4.0, "Minutes that measuring may take, the engine's start not counted.")
    cores: int | None = setting(
        None, "On a machine without GPUs: cores of the engine and all its processes. Default: all there are."
    )
    steps: str | None = setting(
        None,
        "With --url: file to which that engine appends its steps (`--kv-step-log`). Without it they are told from when "
        "tokens come.",
    )
    shape: str | None = setting(
        None,
        "With --url: a profile whose model's shape is taken, where the model's config.json is not on this machine.",
    )
    device: str | None = setting(None, "With --url: kind of device the engine has, such as A100-SXM4-80GB.")
    device_memory_gib: float | None = setting(None, "With --url: memory of one device, GiB.")
    step_tokens: int = setting(2048, "With --url: the engine's --max-num-batched-tokens.")
    max_seqs: int = setting(128, "With --url: the engine's --max-num-seqs.")
    prefill: str | None = setting(
        None, "URL of a prefill instance: with --decode, measures the way of KV between them."
    )
    decode: str | None = setting(None, "URL of a decode instance.")
    key_file: str | None = setting(
        None, f"File with the deployment key of that pair. Default: ${KEY_ENV}, else the file that engines use."
    )
    start_timeout_s: float = setting(3600.0, "Seconds the engine may take to start, downloads included.")

    def __post_init__(self) -> None:
        if self.url is not None:
            object.__setattr__(self, "url", engine_url("--url", self.url))
        for name in ("prefill", "decode"):
            if (url := getattr(self, name)) is not None:
                object.__setattr__(self, name, engine_url(f"--{name}", url))
        if (self.prefill is None) != (self.decode is None):
            raise ConfigError("--prefill and --decode name a pair: give both or neither")
        self._check_source()
        for name in ("budget_min", "start_timeout_s"):
            if not (math.isfinite(getattr(self, name)) and getattr(self, name) > 0):
                raise ConfigError(f"--{name.replace('_', '-')} must be positive, not {getattr(self, name)}")
        if self.device_memory_gib is not None and not (
            math.isfinite(self.device_memory_gib) and self.device_memory_gib > 0
        ):
            raise ConfigError(f"--device-memory-gib must be positive, not {self.device_memory_gib}")
        for name in ("cores", "step_tokens", "max_seqs"):
            if (value := getattr(self, name)) is not None and value < 1:
                raise ConfigError(f"--{name.replace('_', '-')} must be at least 1, not {value}")
        for flag, reason in OWNED_FLAGS:
            if has_flag(self.engine, flag):
                raise ConfigError(f"{flag} cannot be given to `profile`: {reason}")

    def _check_source(self) -> None:
        if self.url is not None:
            if self.engine or self.emulate is not None:
                raise ConfigError("--url names a running engine: leave the model, its flags and --emulate out")
            return
        for name in ("steps", "shape", "device", "device_memory_gib"):
            if getattr(self, name) is not None:
                raise ConfigError(f"--{name.replace('_', '-')} needs --url: an engine of our own says it itself")
        if self.emulate is None and not (self.engine and not self.engine[0].startswith("-")):
            raise ConfigError("name a model to measure, a running engine with --url, or a profile with --emulate")
