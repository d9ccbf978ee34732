"""Where the user's own files lie, by the XDG base directory specification, and folders that are written once."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Literal

_PLACES = {
    "config": ("XDG_CONFIG_HOME", ".config"),
    "cache": ("XDG_CACHE_HOME", ".cache"),
    "state": ("XDG_STATE_HOME", ".local/state"),
}


def user_folder(kind: Literal["config", "cache", "state"]) -> Path:
    """Our folder for this kind of file. May not exist yet."""
    variable, default = _PLACES[kind]
    base = os.environ.get(variable)
    return (Path(base) if base else Path.home() / default) / "vllm-disagg"


_MARKER = "vllm_disagg.complete"


def prepared_folder(folder: Path, write: Callable[[Path], None]) -> Path:
    """`folder`, filled by `write` unless an earlier call completed it. Safe when several processes ask at once: it is
    written under another name and renamed when it is complete, so that nobody sees half of it."""
    if (folder / _MARKER).exists():
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    draft = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
    try:
        write(draft)
        draft.chmod(0o755)
        (draft / _MARKER).touch()
        _rename_unless_there(draft, folder)
    finally:
        shutil.rmtree(draft, ignore_errors=True)
    return folder


def _rename_unless_there(draft: Path, folder: Path) -> None:
    if folder.exists() and not (folder / _MARKER).exists():
        shutil.rmtree(folder)  # only someone's tampering leaves it without the marker: the marker is renamed with it
    try:
        draft.rename(folder)
    except OSError:
        if not (folder / _MARKER).exists():
            raise
