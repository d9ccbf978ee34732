"""Settings of `vllm-disagg doctor`."""

from __future__ import annotations

from dataclasses import dataclass

from vllm_disagg.config import KEY_ENV, engine_url, setting
from vllm_disagg.errors import ConfigError


@dataclass(frozen=True, slots=True, kw_only=True)
class DoctorSettings:
    """Whom to examine, and how to tell."""

    prefill: tuple[str, ...] = setting((), "URL of a prefill instance. May be given several times.")
    decode: tuple[str, ...] = setting((), "URL of a decode instance. May be given several times.")
    up: str | None = setting(
        None,
        "Log folder of a running `vllm-disagg up`, instead of URLs. With neither: the only one that this user runs.",
    )
    key_file: str | None = setting(
        None, f"File with the deployment key. Default: ${KEY_ENV}, else the file that engines of this user use."
    )
    json: bool = setting(False, "Print one JSON object instead of text.")

    def __post_init__(self) -> None:
        for name in ("prefill", "decode"):
            object.__setattr__(self, name, tuple(engine_url(f"--{name}", url) for url in getattr(self, name)))
        if bool(self.prefill) != bool(self.decode):
            raise ConfigError("give at least one --prefill and one --decode URL, or none of either for a running `up`")
        if self.prefill and self.up is not None:
            raise ConfigError("--up names a running deployment, so leave --prefill and --decode out")
        if twice := sorted({url for url in self.prefill + self.decode if (self.prefill + self.decode).count(url) > 1}):
            raise ConfigError(f"{twice[0]} is listed twice; list every instance once, under its role")
