"""The docs name what the code has: settings with their defaults, flags, variables, metrics, causes, reasons, files."""

from __future__ import annotations

import argparse
import ast
import dataclasses
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args

import click
import pytest

from vllm_disagg import cli, engine_flags, errors
from vllm_disagg.config import EngineSettings, ProxySettings, default_of
from vllm_disagg.connector import pull
from vllm_disagg.connector.holds import HoldEvent
from vllm_disagg.connector.peers import HELLO_TIMEOUT_S
from vllm_disagg.connector.secure import HANDSHAKE_S
from vllm_disagg.core import lifetime
from vllm_disagg.core.policy import LOCAL_REASONS, REFUSE_REASONS
from vllm_disagg.core.probe import PROBE_LIMIT_S
from vllm_disagg.doctor.settings import DoctorSettings
from vllm_disagg.emulation.settings import EmulationSettings
from vllm_disagg.frontend import RELEASE_TIMEOUT_S
from vllm_disagg.launcher.settings import UpSettings
from vllm_disagg.plan_settings import DiagnoseSettings, PlanSettings, SimulateSettings
from vllm_disagg.profiler.settings import ProfileSettings
from vllm_disagg.proxy.metrics import METRICS, ProxyMetrics
from vllm_disagg.proxy.upstream import Cause
from vllm_disagg.proxy.watch import MAX_STRIKES
from vllm_disagg.transport.base import CANCEL_BOUND_S

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "vllm_disagg"
PAGES = sorted(
    [
        *(ROOT / name for name in ("README.md", "CHANGELOG.md", "patches/README.md", "examples/README.md")),
        *(ROOT / "docs").glob("*.md"),
    ]
)


def page(name: str) -> str:
    return (ROOT / name).read_text(encoding="utf-8")


def section(name: str, heading: str) -> str:
    """What stands under a heading, up to the next one of any level."""
    return page(name).partition(f"\n{heading}\n")[2].partition("\n#")[0]


def tables(text: str) -> list[list[list[str]]]:
    """The rows of each table, without its head."""
    found: list[list[list[str]]] = []
    for block in re.split(r"\n\s*\n", text):
        lines = [line.strip() for line in block.splitlines() if line.startswith("|")]
        if lines:
            found.append([[cell.strip() for cell in line.strip("|").split("|")] for line in lines[2:]])
    return found


def columns(name: str, heading: str, *, table: int = 0) -> dict[str, str]:
    """First column, without backticks, to the second one."""
    return {row[0].strip("`"): row[1] for row in tables(section(name, heading))[table]}


def code_in(text: str) -> str:
    """Fenced blocks and code spans, a line each."""
    fences = re.findall(r"^```\w*\n(.*?)^```", text, re.DOTALL | re.MULTILINE)
    spans = re.findall(r"`([^`\n]+)`", re.sub(r"^```.*?^```", "", text, flags=re.DOTALL | re.MULTILINE))
    return "\n".join([*fences, *spans])


def shown(default: Any) -> str:
    """How a default is written in `docs/settings.md`."""
    if default is None or default == ():
        return "none"
    if isinstance(default, bool):
        return "on" if default else "off"
    return (
        f"`{default}`" if isinstance(default, str) else f"{default:g}" if isinstance(default, float) else str(default)
    )


def options_of(command: str, cls: type) -> dict[str, str]:
    """The real options of a command, with the defaults of its settings."""
    return {
        (item.name or "").upper() if isinstance(item, click.Argument) else item.opts[0]: (
            ("required" if item.required else "none")
            if isinstance(item, click.Argument)
            else shown(default_of(cls, item.name or ""))
        )
        for item in cli.cli.commands[command].params
    }


def engine_options() -> set[str]:
    """The flags that `vllm serve` gets."""
    parser = engine_flags.add_flags(argparse.ArgumentParser(add_help=False))
    return {flag for action in parser._actions for flag in action.option_strings[:1]}  # not `--no-...`


def trees(folder: Path) -> Iterator[ast.Module]:
    for file in sorted(folder.rglob("*.py")):
        yield ast.parse(file.read_text(encoding="utf-8"))


def texts_in(node: ast.AST) -> set[str]:
    return {item.value for item in ast.walk(node) if isinstance(item, ast.Constant) and isinstance(item.value, str)}


# Settings.


def test_engine_flags_and_their_defaults() -> None:
    expected = {"--kv-role": "required"} | {
        flag: shown(default_of(EngineSettings, name)) for name, (flag, _) in engine_flags._FLAGS.items()
    }

    emulated = {
        f"--{item.name.replace('_', '-')}": shown(item.default or None)
        if isinstance(item.default, str)
        else shown(item.default)
        for item in dataclasses.fields(EmulationSettings)
    }

    assert columns("docs/settings.md", "## Engines") == expected
    assert columns("docs/settings.md", "## Emulated devices") == emulated
    assert set(expected) | set(emulated) == engine_options()


@pytest.mark.parametrize("flag", engine_flags._CONFLICTS.values())
def test_flags_that_a_role_refuses(flag: str) -> None:
    assert f"`{flag}`" in section("docs/settings.md", "## Engines")


@pytest.mark.parametrize(
    ("command", "cls", "heading"),
    [
        ("proxy", ProxySettings, "## The proxy"),
        ("up", UpSettings, "## `vllm-disagg up`"),
        ("doctor", DoctorSettings, "## `vllm-disagg doctor`"),
        ("plan", PlanSettings, "## `vllm-disagg plan`"),
        ("simulate", SimulateSettings, "## `vllm-disagg simulate`"),
        ("profile", ProfileSettings, "## `vllm-disagg profile`"),
        ("diagnose", DiagnoseSettings, "## `vllm-disagg diagnose`"),
    ],
)
def test_options_of_commands_and_their_defaults(command: str, cls: type, heading: str) -> None:
    assert columns("docs/settings.md", heading) == options_of(command, cls)


def test_environment_variables() -> None:
    pattern = re.compile(r"(?:VLLM|UCX|XDG|CUDA|NIXL)_[A-Z_]+|PYTHON[A-Z]+")
    read = {text for tree in trees(PACKAGE) for text in texts_in(tree) if pattern.fullmatch(text)}
    documented = set(re.findall(r"`([A-Z_]+)`", section("docs/settings.md", "## Environment variables")))

    assert {"VLLM_DISAGG_KEY", "XDG_CONFIG_HOME", "UCX_LOG_LEVEL"} <= read  # the pattern still finds them
    assert read <= documented


@pytest.mark.parametrize(
    ("row", "value"),
    [
        ("greeting a prefill engine", HELLO_TIMEOUT_S),
        ("a stranger's connection", HANDSHAKE_S),
        ("one probe of", PROBE_LIMIT_S),
        ("a given-up read", CANCEL_BOUND_S),
        ("the engine's answer to a release", RELEASE_TIMEOUT_S),
        ("probes in a row", MAX_STRIKES),
    ],
)
def test_fixed_bounds(row: str, value: float) -> None:
    bounds = columns("docs/settings.md", "## Fixed bounds")

    assert [bound.split()[0] for name, bound in bounds.items() if name.startswith(row)] == [f"{value:g}"]


# Metrics, causes, reasons.


def engine_metrics() -> dict[str, str]:
    """Name to type, read off the tables of `stats.py` without importing it: it needs vLLM."""
    kinds = {
        "HISTOGRAMS": "histogram", "COUNTERS": "counter", "LABELLED_COUNTERS": "counter", "GAUGES": "gauge",
    }  # fmt: skip
    found: dict[str, str] = {}
    tree = ast.parse((PACKAGE / "connector/stats.py").read_text(encoding="utf-8"))
    for node in tree.body:
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name) and node.target.id in kinds:
            assert isinstance(node.value, ast.Dict)
            found |= {key.value: kinds[node.target.id] for key in node.value.keys if isinstance(key, ast.Constant)}
    assert set(found.values()) == set(kinds.values())
    return found


def test_metrics_of_engines() -> None:
    assert columns("docs/metrics.md", "## Engines") == engine_metrics()


def test_metrics_of_the_proxy() -> None:
    families = ProxyMetrics()._registry.collect()
    kinds = {family.name + ("_total" if family.type == "counter" else ""): family.type for family in families}

    assert kinds.keys() == METRICS.keys()
    assert columns("docs/metrics.md", "## The proxy") == kinds


def test_steps_of_lives() -> None:
    """`docs/transfer.md` lists and draws exactly the transitions there are."""
    for heading, table in (("## On prefill", lifetime.PREFILL), ("## On decode", lifetime.DECODE)):
        text = section("docs/transfer.md", heading)
        rows = {(row[0].strip("`"), row[1].strip("`")): row[2].strip("`") for row in tables(text)[0]}
        drawn = set(re.findall(r"^ +(\S+) --> (\S+): (\w+)$", text, re.MULTILINE))

        assert rows == {(item.before or "(new)", item.event): item.after for item in table}
        assert drawn == {(item.before or "[*]", item.after, item.event) for item in table}


def failure_causes() -> set[str]:
    """Every cause that a transfer's failure is counted under, and `client_left`, which is not."""
    return {*get_args(pull.Cause), errors.InvalidHandoff.cause, errors.TransportError.cause}


def test_causes_of_failed_transfers() -> None:
    causes, text = failure_causes(), section("docs/metrics.md", "### Causes of failure")

    assert {"invalid_handoff", "handshake_timeout", "peer_unreachable", "incompatible", "overdue"} <= causes
    assert [cause for cause in sorted(causes) if f"`{cause}`" not in text] == []
    assert columns("docs/metrics.md", "### Causes of failure").keys() <= causes  # none that the code no longer has


def test_events_of_holds() -> None:
    assert columns("docs/metrics.md", "### Events of holds").keys() == set(get_args(HoldEvent))


def test_causes_of_failed_legs() -> None:
    assert columns("docs/metrics.md", "### Causes of failed legs").keys() == set(get_args(Cause))


def test_reasons_of_local_runs_and_refusals() -> None:
    where = "docs/proxy.md", "## What runs locally, and why"

    assert columns(*where, table=0).keys() == LOCAL_REASONS.keys()
    assert columns(*where, table=1).keys() == REFUSE_REASONS.keys()


# Files and commands.


@pytest.mark.parametrize("file", PAGES, ids=lambda file: str(file.relative_to(ROOT)))
def test_links_and_paths_lead_to_files(file: Path) -> None:
    text = file.read_text(encoding="utf-8")
    links = [file.parent / link for link in re.findall(r"\]\((?![a-z]+:)([^)#\s]+)", text)]
    path = r"\b(?:vllm_disagg|docs|tests|examples|patches)/[\w./-]*\w\.(?:py|md|sh|yml|patch)\b"
    named = [ROOT / found for found in re.findall(path, text)]

    assert [str(target) for target in links + named if not target.exists()] == []


def test_readme_links_every_page() -> None:
    linked = set(re.findall(r"\]\(([^)#\s]+)", page("README.md")))

    assert {str(file.relative_to(ROOT)) for file in (ROOT / "docs").glob("*.md")} <= linked


def test_make_targets_exist() -> None:
    targets = set(re.findall(r"^([a-z][a-z-]*):", page("Makefile"), re.MULTILINE))
    used = set(re.findall(r"\bmake ([a-z][a-z-]*)", code_in(page("README.md"))))

    assert {"demo", "test"} <= used
    assert used <= targets


def test_commands_and_their_flags_exist() -> None:
    known = {
        name: {flag for item in command.params for flag in item.opts} for name, command in cli.cli.commands.items()
    }
    vllms_own = {"--kv-cache-memory-bytes", *engine_flags._CONFLICTS.values()}
    used: set[str] = set()
    for file in PAGES:
        for line in code_in(file.read_text(encoding="utf-8")).splitlines():
            for command, rest in re.findall(r"(?<![/\w])vllm-disagg ([a-z]+)([^`]*)", line):
                used.add(command)
                flags = set(re.findall(r"(?<!\S)(--[a-z-]+)", rest)) - {"--help"}
                assert command in known, f"{file.name}: {line}"
                assert command == "serve" or flags <= known[command], f"{file.name}: {line}"
            assert set(re.findall(r"(?<![\w-])--kv-[a-z-]+", line)) <= engine_options() | vllms_own, (
                f"{file.name}: {line}"
            )
    assert used == known.keys()
