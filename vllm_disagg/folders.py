"""Where the user's own files lie, by the XDG base directory specification."""

from __future__ import annotations

import os
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
