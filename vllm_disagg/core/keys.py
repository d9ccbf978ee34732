"""The deployment key: one secret shared by the engines of a deployment, and what is derived from it.

Handoffs are signed with it and the control channel's key pairs come from it, so that an engine without it can neither
author a handoff nor speak to another engine.
"""

from __future__ import annotations

import contextlib
import hashlib
import hmac
import os
import secrets
from pathlib import Path

from vllm_disagg.config import KEY_ENV
from vllm_disagg.errors import KeyFileError
from vllm_disagg.folders import user_folder

_MIN_CHARS = 32


def load_key(key_file: str | None) -> bytes:
    """The deployment key from a file, from the environment, or from the user's own private file.

    Args:
        key_file: path given by the user; None means the environment variable `VLLM_DISAGG_KEY`, else the private
            file `vllm-disagg/deployment.key` in the user's configuration folder, which is made at first use.

    Raises:
        KeyFileError: the file is missing, unreadable, readable by others, or holds too little.
    """
    if key_file is not None:
        return _checked(_read_private(Path(key_file)), key_file)
    if text := os.environ.get(KEY_ENV):
        return _checked(text, f"${KEY_ENV}")
    path = default_key_path()
    if not path.exists():
        create_key_file(path)
    return _checked(_read_private(path), str(path))


def default_key_path() -> Path:
    """Where the user's own key lies when none is named."""
    return user_folder("config") / "deployment.key"


def create_key_file(path: Path) -> None:
    """Write a fresh key that only this user can read. A file that appears meanwhile is left as it is."""
    path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    draft = path.with_name(f".{path.name}.{secrets.token_hex(8)}")
    try:
        descriptor = os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with os.fdopen(descriptor, "w", encoding="ascii") as file:
            file.write(secrets.token_hex(32) + "\n")
        with contextlib.suppress(FileExistsError):
            os.link(draft, path)  # atomic, and fails where another process was first
    except OSError as error:
        raise KeyFileError(
            f"cannot write the deployment key {path}: {error.strerror}; name one with --kv-key-file"
        ) from error
    finally:
        draft.unlink(missing_ok=True)


def derive(key: bytes, purpose: str) -> bytes:
    """32 bytes that only holders of the deployment key can compute, another for each purpose."""
    return hmac.new(key, b"derive:" + purpose.encode(), hashlib.sha256).digest()


def _read_private(path: Path) -> str:
    try:
        mode = path.stat().st_mode
        text = path.read_text(encoding="ascii")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not text"
        raise KeyFileError(f"cannot read the deployment key {path}: {reason}") from error
    if mode & 0o077:
        raise KeyFileError(f"the deployment key {path} can be read by others: run `chmod 600 {path}`")
    return text


def _checked(text: str, source: str) -> bytes:
    stripped = text.strip()
    if len(stripped) < _MIN_CHARS:
        raise KeyFileError(
            f"the deployment key in {source} has {len(stripped)} characters; at least {_MIN_CHARS} are needed"
        )
    return hashlib.sha256(b"vllm-disagg:" + stripped.encode()).digest()
