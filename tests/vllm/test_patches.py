"""Each patch applies to the vLLM it names and does what its entry in the ledger says."""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

PATCHES = Path(__file__).parents[2] / "patches"
CLI_VERSION = "0001-cli-version-without-a-vllm-distribution.patch"

pytestmark = pytest.mark.vllm


def vllm_folder() -> Path:
    spec = importlib.util.find_spec("vllm")
    if spec is None or not spec.submodule_search_locations:
        pytest.skip("vLLM is not installed")
    return Path(next(iter(spec.submodule_search_locations)))


def patched(name: str, target: str, folder: Path) -> Path:
    """A copy of one of vLLM's files with a patch applied. Fails when it does not apply cleanly."""
    copy = folder / "vllm" / target
    copy.parent.mkdir(parents=True)
    shutil.copy(vllm_folder() / target, copy)
    subprocess.run(
        ["git", "apply", "--verbose", str(PATCHES / name)],
        cwd=folder, check=True, env={**os.environ, "GIT_CEILING_DIRECTORIES": str(folder.parent)},
    )  # fmt: skip
    assert copy.read_bytes() != (vllm_folder() / target).read_bytes()
    return copy


def test_every_patch_is_in_the_ledger() -> None:
    ledger = (PATCHES / "README.md").read_text(encoding="utf-8")
    for patch in PATCHES.glob("*.patch"):
        entry = ledger.partition(f"## {patch.name}\n")[2].partition("\n## ")[0]
        for word in ("Target", "Why", "How", "Upstream", "Remove when"):
            assert f"**{word}**" in entry, f"{patch.name}: {word} is missing"


def test_the_patched_command_line_starts_without_a_vllm_distribution(tmp_path: Path) -> None:
    main = patched(CLI_VERSION, "entrypoints/cli/main.py", tmp_path)

    shown = subprocess.run(
        [sys.executable, str(main), "--version"], capture_output=True, text=True, timeout=120, check=True
    )

    version = (vllm_folder() / "_version.py").read_text(encoding="utf-8")
    assert shown.stdout.strip().partition("+")[0] in version
