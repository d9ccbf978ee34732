"""Settings refuse what they cannot mean, and say what they accept."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

import pytest

from vllm_disagg.config import EngineSettings, ProxySettings, help_of
from vllm_disagg.errors import ConfigError


def test_settings_survive_their_way_through_vllms_config() -> None:
    settings = EngineSettings(role="decode", lease_s=12.0, control_port=5)

    assert EngineSettings.from_extra_config(settings.to_extra_config()) == settings


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"role": "both"}, "prefill, decode"),
        ({"lease_s": 0}, "positive"),
        ({"lease_s": float("nan")}, "positive"),
        ({"pull_timeout_s": float("inf")}, "positive"),
        ({"control_port": 70000}, "between 1 and 65535"),
        ({"control_port": "80"}, "of type int"),
        ({"lease_s": True}, "of type float"),
        ({"leese_s": 3.0}, "unknown setting 'leese_s'"),
        ({"control_host": "0.0.0.0"}, "one IPv4 address"),
        ({"control_host": ""}, "one IPv4 address"),
        ({"control_host": "::1"}, "one IPv4 address"),
    ],
)
def test_a_bad_value_is_named(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        EngineSettings.from_extra_config({"role": "prefill", **changes})


def test_the_lease_derives_its_cap() -> None:
    settings = EngineSettings(role="prefill", lease_s=12.0)

    assert settings.hold_cap_s == 120.0


def test_a_missing_role_is_named() -> None:
    with pytest.raises(ConfigError, match="'role'"):
        EngineSettings.from_extra_config({})


@pytest.mark.parametrize("settings", [EngineSettings, ProxySettings])
def test_every_setting_but_the_role_has_a_help_text(settings: type) -> None:
    assert [item.name for item in fields(settings) if item.name != "role" and not help_of(settings, item.name)] == []
