"""Settings of every process, frozen, each default and its help text in one place.

A field's metadata carries its help text; command lines, docs and tests are derived from it. Durations are seconds.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any, Literal, get_args, get_type_hints
from urllib.parse import urlsplit

from vllm_disagg.errors import ConfigError

Role = Literal["prefill", "decode"]
TransportName = Literal["auto", "nixl", "nccl", "loopback"]
TransportChoice = TransportName

VerifyMode = Literal["off", "sample", "full"]
Scheduling = Literal["phase", "vllm"]
PrefillOrder = Literal["fcfs", "sjf", "edf"]

_WILDCARDS = ("", "*", "0.0.0.0")  # noqa: S104 - refused

ROLES: tuple[str, ...] = get_args(Role)

KEY_ENV = "VLLM_DISAGG_KEY"
"""Environment variable that may hold the deployment key itself instead of a file."""

EMULATED_HEADER = "x-vllm-disagg-emulated"
"""Response header that marks what an emulated engine answered; the proxy passes it on."""


def setting(default: Any, help_text: str) -> Any:
    """A dataclass field with its help text, the single source for `--help` and `docs/settings.md`."""
    return field(default=default, metadata={"help": help_text})


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineSettings:
    """What one engine needs beside vLLM's own flags. Travels to every process of the engine inside
    `kv_connector_extra_config`, which does not enter vLLM's compile-cache key."""

    role: Role
    transport: TransportChoice = setting(
        "auto",
        "How KV blocks travel between prefill and decode: nixl reads the other side's memory, nccl sends messages "
        "(gloo on CPU), auto chooses for each pair: nixl unless it would run over TCP. Both sides need the same.",
    )
    control_host: str = setting(
        "127.0.0.1",
        "Address on which a prefill instance listens for decode instances, and which it tells them. "
        "Use an address of a private network when they run on other hosts.",
    )
    control_port: int = setting(14579, "Port of that address. Each prefill instance of a host needs its own.")
    lease_s: float = setting(
        30.0,
        "Seconds that prefill keeps finished KV for a decode instance that has stopped renewing it. "
        "Renewals come every sixth of it, and no hold outlives ten of it.",
    )
    pull_timeout_s: float = setting(
        10.0, "Seconds after which decode gives up a KV transfer and computes the prompt itself."
    )
    early_reads: bool = setting(
        True,
        "Begin to fetch KV when a request arrives at a busy decode instance, into blocks set aside for that, instead "
        "of when the scheduler next looks: saves about one decode step of each first token.",
    )
    verify: VerifyMode = setting(
        "off",
        "Compare the content of KV blocks after their transfer: full compares all, sample about one in sixteen and "
        "each prompt's last, off none. A difference is a failed transfer. Set on prefill; the handoff tells decode.",
    )
    scheduling: Scheduling = setting(
        "phase",
        "How requests are scheduled: phase packs whole prompts on prefill, and on decode keeps the streams' pace and "
        "admits by expected growth; vllm leaves all of it to vLLM.",
    )
    back_pressure: bool = setting(
        True,
        "Also where vLLM schedules: prefill stops to admit prompts at its held share, and decode fetches KV only with "
        "room for the prompt and its expected growth. phase always does so.",
    )
    prefill_order: PrefillOrder = setting(
        "fcfs",
        "Order of waiting prompts on prefill: fcfs as they came, sjf short ones first (with ageing), edf by the time "
        "their first token is due.",
    )
    batch_tokens: int = setting(
        0,
        "L_m: prompt tokens that prefill computes in one step. 0: from --kv-profile, or learned from its steps, and "
        "more where many wait.",
    )
    held_share: float = setting(
        0.9, "Share of the KV cache that prefill may hold for decode before it stops to admit prompts."
    )
    patience_s: float = setting(
        30.0, "Seconds after which a waiting prompt goes before all that came later, whatever the order."
    )
    slo_ttft_s: float = setting(2.0, "Target for the time to first token of requests that name none.")
    slo_tpot_s: float = setting(
        0.1,
        "Target for the time per output token of requests that name none. Decode computes prompts only as fast as "
        "it allows.",
    )
    profile: str | None = setting(
        None,
        "Step times of the model on this device: a built-in profile or a file. Steps that are measured correct it. "
        "Without it they are learned, and kept for the next start.",
    )
    step_log: str | None = setting(
        None, "File to which each step's composition and time are appended, a JSON line each."
    )
    key_file: str | None = setting(
        None,
        "File with the deployment key, the same on all engines of a deployment. "
        f"Default: ${KEY_ENV}, else a private file in the user's configuration folder, made at first use.",
    )

    def __post_init__(self) -> None:
        _one_of("kv role", self.role, ROLES)
        _one_of("kv transport", self.transport, get_args(TransportChoice))
        _one_of("kv verify", self.verify, get_args(VerifyMode))
        _positive("kv lease", self.lease_s)
        _positive("kv pull timeout", self.pull_timeout_s)
        _one_of("kv scheduling", self.scheduling, get_args(Scheduling))
        _one_of("kv prefill order", self.prefill_order, get_args(PrefillOrder))
        for name in ("patience_s", "slo_ttft_s", "slo_tpot_s"):
            _positive(f"kv {name}", getattr(self, name))
        if self.batch_tokens < 0:
            raise ConfigError(f"kv batch tokens must be 0 or a positive number, not {self.batch_tokens!r}")
        if not 0 < self.held_share <= 1:
            raise ConfigError(f"kv held share must be above 0 and at most 1, not {self.held_share!r}")
        _port("kv control port", self.control_port)
        if self.control_host in _WILDCARDS or ":" in self.control_host:
            raise ConfigError(
                f"kv control host must be one IPv4 address or interface that decode instances can reach, "
                f"not {self.control_host!r}"
            )

    @property
    def hold_cap_s(self) -> float:
        """The longest that any hold lives, however often it is renewed."""
        return self.lease_s * 10

    @property
    def stall_s(self) -> float:
        """How long nothing may arrive from a prefill worker while reads are under way: then its engine is asked to
        serve, and after as long again the link is built anew."""
        return self.pull_timeout_s / 5

    def to_extra_config(self) -> dict[str, Any]:
        """The plain dict that `KVTransferConfig.kv_connector_extra_config` carries."""
        return dataclasses.asdict(self)

    @classmethod
    def from_extra_config(cls, extra: Mapping[str, Any]) -> EngineSettings:
        """Rebuild the settings inside an engine process.

        Raises:
            ConfigError: a key is unknown, or a value is of the wrong type or out of range.
        """
        settings: EngineSettings = _from_mapping(cls, extra, "kv_connector_extra_config")
        return settings


@dataclass(frozen=True, slots=True, kw_only=True)
class ProxySettings:
    """Settings of `vllm-disagg proxy`."""

    prefill: tuple[str, ...] = setting((), "URL of a prefill instance. May be given several times.")
    decode: tuple[str, ...] = setting((), "URL of a decode instance. May be given several times.")
    host: str = setting("127.0.0.1", "Address to listen on.")
    port: int = setting(8000, "Port to listen on.")
    connect_timeout_s: float = setting(5.0, "Seconds to wait for a TCP connection to an engine.")
    prefill_timeout_s: float = setting(
        120.0, "Seconds to wait for a prefill instance's answer before the request is served locally instead."
    )
    first_event_timeout_s: float = setting(
        600.0, "Seconds to wait for a decode instance's first event, or for its whole answer without streaming."
    )
    idle_timeout_s: float = setting(
        300.0, "Seconds a started response may stay silent, or its client may stop reading, before it is given up."
    )
    probe_interval_s: float = setting(1.0, "Seconds between two health probes of an instance.")
    probe_timeout_s: float = setting(2.0, "Seconds after which a health probe counts as failed.")
    body_timeout_s: float = setting(60.0, "Seconds that a client may take to send its request body.")
    drain_timeout_s: float = setting(30.0, "Seconds that running requests get to finish when the proxy is stopped.")
    max_body_bytes: int = setting(8 * 1024 * 1024, "Largest request body that is accepted.")
    max_requests: int = setting(1024, "Requests that may be in progress at once. More are answered with 503.")
    min_split_tokens: int = setting(
        0, "Prompts that are certainly shorter than this many tokens run locally, without a prefill instance."
    )

    def __post_init__(self) -> None:
        _port("port", self.port)
        for name in (
            "connect_timeout_s", "prefill_timeout_s", "first_event_timeout_s", "idle_timeout_s", "probe_interval_s",
            "probe_timeout_s", "body_timeout_s", "drain_timeout_s", "max_body_bytes", "max_requests",
        ):  # fmt: skip
            _positive(name, getattr(self, name))
        for name in ("prefill", "decode"):
            object.__setattr__(self, name, tuple(engine_url(name, url) for url in getattr(self, name)))
        if twice := sorted(url for url in {*self.prefill, *self.decode} if (self.prefill + self.decode).count(url) > 1):
            raise ConfigError(f"{twice[0]} is listed twice; list every instance once, under its role")


def help_of(cls: type, name: str) -> str:
    """The help text of one setting."""
    for item in fields(cls):
        if item.name == name:
            return str(item.metadata.get("help", ""))
    raise AttributeError(f"{cls.__name__} has no setting {name!r}")


def default_of(cls: type, name: str) -> Any:
    """The default of one setting."""
    for item in fields(cls):
        if item.name == name:
            return item.default
    raise AttributeError(f"{cls.__name__} has no setting {name!r}")


def _from_mapping(cls: Any, values: Mapping[str, Any], source: str) -> Any:
    known = {item.name for item in fields(cls)}
    if unknown := sorted(set(values) - known):
        raise ConfigError(f"{source}: unknown setting {unknown[0]!r}; known are {', '.join(sorted(known))}")
    hints = get_type_hints(cls)
    for name, value in values.items():
        if hints[name] is float and isinstance(value, int) and not isinstance(value, bool):
            continue
        allowed = {float: float, int: int, str: str, bool: bool}.get(hints[name])
        if allowed is not None and (not isinstance(value, allowed) or isinstance(value, bool) != (allowed is bool)):
            raise ConfigError(f"{source}: {name} must be of type {allowed.__name__}, not {value!r}")
    try:
        return cls(**values)
    except TypeError as error:  # a setting without a default is missing
        raise ConfigError(f"{source}: {error}") from error


def _one_of(what: str, value: str, accepted: tuple[str, ...]) -> None:
    if value not in accepted:
        raise ConfigError(f"{what} must be one of {', '.join(accepted)}, not {value!r}")


def _positive(what: str, value: float) -> None:
    if not value > 0 or value == float("inf"):
        raise ConfigError(f"{what} must be a positive number, not {value!r}")


def engine_url(what: str, url: str) -> str:
    """The URL of an engine without a final slash. Only its scheme, host, port and path may be given."""
    try:
        parts = urlsplit(url)
        port = parts.port
    except ValueError as error:
        raise ConfigError(f"{what} must be a URL like http://host:port, not {url!r}: {error}") from error
    extras = parts.username or parts.password or parts.query or parts.fragment
    if parts.scheme not in ("http", "https") or not parts.hostname or port == 0 or extras:
        raise ConfigError(f"{what} must be a URL like http://host:port, not {url!r}")
    return url.rstrip("/")


def _port(what: str, value: int) -> None:
    if not 0 < value < 65536:
        raise ConfigError(f"{what} must be between 1 and 65535, not {value!r}")
