"""Settings of `vllm-disagg up`."""

from __future__ import annotations

import math
from dataclasses import dataclass

from vllm_disagg.config import ProxySettings, default_of, setting
from vllm_disagg.errors import ConfigError

OWNED_FLAGS: tuple[str, ...] = (
    "--host",
    "--port",
    "--kv-role",
    "--kv-control-host",
    "--kv-control-port",
    "--kv-key-file",
    "--tensor-parallel-size",
    "-tp",
    "--emulate",
    "--dilation",
    "--emulate-link",
    "--emulate-link-ledger",
)
"""Engine flags that `up` itself sets on every engine; given by hand they would contradict it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class UpSettings:
    """What the user asks `vllm-disagg up` for."""

    model: str | None = None
    prefill: int = setting(1, "Number of prefill instances.")
    decode: int = setting(1, "Number of decode instances.")
    tp: int = setting(1, "Tensor-parallel size of every instance: that many GPUs, or core sets, each.")
    emulate: str | None = setting(
        None,
        "Emulate the devices instead of computing: a profile by name, or the path of a JSON file. No GPU is needed, "
        "and the model may be left out.",
    )
    dilation: float = setting(
        1.0, "With --emulate: how many times slower than the profile the devices run. Divide measured times by it."
    )
    emulate_link: str = setting(
        "none", "With --emulate: link whose time KV transfers take: none, nvlink, pcie5, 200g or 25g."
    )
    host: str = setting(default_of(ProxySettings, "host"), "Address the proxy listens on. Engines stay on loopback.")
    port: int = setting(default_of(ProxySettings, "port"), "Port the proxy listens on.")
    engine_arg: tuple[str, ...] = setting(
        (), "One argument for every engine, such as --engine-arg=--max-model-len=2048. May be given several times."
    )
    prefill_arg: tuple[str, ...] = setting((), "One argument for the prefill instances. May be given several times.")
    decode_arg: tuple[str, ...] = setting((), "One argument for the decode instances. May be given several times.")
    log_dir: str | None = setting(
        None, "Folder for the log of each process. Default: a new one in the user's state folder for each run."
    )
    start_timeout_s: float = setting(3600.0, "Seconds the engines may take to start, downloads included.")
    stop_grace_s: float = setting(15.0, "Seconds a process may take to stop before it is killed.")
    restart: bool = setting(
        False, "Restart an engine that dies during service, after 1 s, then twice that each time, up to 60 s."
    )

    def __post_init__(self) -> None:
        self._check_emulation()
        for name in ("prefill", "decode", "tp"):
            _at_least_one(name, getattr(self, name))
        for name in ("start_timeout_s", "stop_grace_s"):
            if not getattr(self, name) > 0:
                raise ConfigError(f"--{name.replace('_', '-')} must be positive, not {getattr(self, name)}")
        if not 0 < self.port < 65536:
            raise ConfigError(f"--port must be between 1 and 65535, not {self.port}")
        for name in ("engine_arg", "prefill_arg", "decode_arg"):
            for owned in OWNED_FLAGS:
                if has_flag(getattr(self, name), owned):
                    raise ConfigError(f"--{name.replace('_', '-')}={owned}: `up` sets {owned} itself; leave it out")

    def _check_emulation(self) -> None:
        if self.emulate is None:
            if self.model is None:
                raise ConfigError("name a model, or a profile with --emulate")
            for name in ("dilation", "emulate_link"):
                if getattr(self, name) != default_of(UpSettings, name):
                    raise ConfigError(f"--{name.replace('_', '-')} needs --emulate")
        elif not (math.isfinite(self.dilation) and self.dilation > 0):
            raise ConfigError(f"--dilation must be positive, not {self.dilation}")


def has_flag(arguments: tuple[str, ...], flag: str) -> bool:
    """Whether `flag` is among engine arguments, as `--flag`, `--flag=value` or spelled with underscores."""
    names = (argument.split("=", 1)[0] for argument in arguments if argument.startswith("-"))
    return any((name.replace("_", "-") if name.startswith("--") else name) == flag for name in names)


def _at_least_one(name: str, value: int) -> None:
    if value < 1:
        raise ConfigError(f"--{name} must be at least 1, not {value}; for plain vLLM without a split use `vllm serve`")
