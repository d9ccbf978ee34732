"""Imports point one way, and the parts that run on a laptop need neither torch nor vLLM."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import vllm_disagg

ROOT = Path(vllm_disagg.__file__).parent
HEAVY = ("torch", "vllm", "nixl", "nixl_cu12", "ray", "transformers")

ALLOWED: dict[str, set[str]] = {
    "errors": set(),
    "config": {"errors"},
    "folders": set(),
    "core": {"errors", "config", "folders"},
    "profiles": {"errors", "core"},
    "sim": {"errors", "core", "profiles"},
    "planner": {"errors", "core", "profiles", "sim"},
    "transport": {"errors", "config", "core"},
    "connector": {"errors", "config", "core", "transport"},
    "scheduler": {"errors", "config", "folders", "core", "profiles", "connector", "seams"},
    "proxy": {"errors", "config", "core"},
    "launcher": {"errors", "config", "folders", "core", "profiles"},
    "emulation": {"errors", "config", "folders", "core", "profiles", "transport", "connector"},
    "doctor": {"errors", "config", "core", "launcher"},
    "profiler": {
        "errors",
        "config",
        "folders",
        "core",
        "profiles",
        "planner",
        "launcher",
        "doctor",
        "emulation",
        "__version__",
    },
}
"""Part -> the parts it may import (itself always)."""

LIGHT = (
    "vllm_disagg.core",
    "vllm_disagg.profiles",
    "vllm_disagg.sim.run",
    "vllm_disagg.sim.traces",
    "vllm_disagg.planner.plan",
    "vllm_disagg.planner.drift",
    "vllm_disagg.planner.fit",
    "vllm_disagg.diagnose_command",
    "vllm_disagg.plan_command",
    "vllm_disagg.proxy",
    "vllm_disagg.proxy.app",
    "vllm_disagg.launcher",
    "vllm_disagg.doctor.run",
    "vllm_disagg.cli",
)


def imports_of(file: Path) -> set[str]:
    """Parts of this project that a module imports, wherever in the file."""
    found = set()
    for node in ast.walk(ast.parse(file.read_text())):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        for name in names:
            if name.startswith("vllm_disagg."):
                found.add(name.split(".")[1])
    return found


@pytest.mark.parametrize("part", sorted(ALLOWED))
def test_a_part_imports_only_what_lies_below_it(part: str) -> None:
    path = ROOT / part
    files = sorted(path.rglob("*.py")) if path.is_dir() else [path.with_suffix(".py")]

    strays = {
        str(file.relative_to(ROOT)): extra for file in files if (extra := imports_of(file) - ALLOWED[part] - {part})
    }

    assert strays == {}


@pytest.mark.parametrize("module", LIGHT)
def test_it_imports_where_torch_and_vllm_are_not_installed(module: str) -> None:
    script = f"import sys\nfor name in {HEAVY!r}: sys.modules[name] = None\nimport {module}\n"

    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60, check=False)

    assert done.returncode == 0, done.stderr
