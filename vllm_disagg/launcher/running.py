"""A note that a running `vllm-disagg up` leaves in its log folder, for commands that look for it."""

from __future__ import annotations

import os
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

import msgspec

from vllm_disagg.errors import ConfigError
from vllm_disagg.folders import user_folder

NOTE = "deployment.json"


class Running(msgspec.Struct, frozen=True, kw_only=True):
    """Where the engines of a deployment answer, and where its key lies.

    Attributes:
        pid: of `up`.
        prefill, decode: URLs of the engines.
        key_file: path of the deployment key; the key itself stays where it is.
    """

    pid: int
    prefill: tuple[str, ...]
    decode: tuple[str, ...]
    key_file: str


def write_note(folder: Path, *, prefill: Sequence[str], decode: Sequence[str], key_file: Path) -> Path:
    """Leave a note of this process's deployment, readable by this user only."""
    note = folder / NOTE
    note.unlink(missing_ok=True)
    running = Running(pid=os.getpid(), prefill=tuple(prefill), decode=tuple(decode), key_file=str(key_file))
    descriptor = os.open(note, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with os.fdopen(descriptor, "wb") as file:
        file.write(msgspec.json.encode(running))
    return note


def find_running(folder: str | None) -> Running:
    """The deployment whose log folder this is, or without one the only one that this user runs from here.

    Raises:
        ConfigError: there is none, or several.
    """
    folders = [Path(folder)] if folder is not None else sorted(user_folder("state").glob("up-*"))
    found = {each: running for each in folders if (running := _read(each / NOTE)) is not None}
    if len(found) == 1:
        return next(iter(found.values()))
    if folder is not None:
        raise ConfigError(f"no running `vllm-disagg up` has its log folder at {folder}: give what it prints as `logs:`")
    if found:
        raise ConfigError(f"several deployments run: choose one with --up, of {', '.join(map(str, found))}")
    raise ConfigError("no `vllm-disagg up` of this user runs here: give --prefill and --decode URLs, or --up FOLDER")


def _read(note: Path) -> Running | None:
    """A note whose writer lives."""
    with suppress(OSError, msgspec.DecodeError):
        running = msgspec.json.decode(note.read_bytes(), type=Running)
        os.kill(running.pid, 0)
        return running
    return None
