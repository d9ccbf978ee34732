"""The deployment key: found, made, or refused with a reason."""

from __future__ import annotations

from pathlib import Path

import pytest

from vllm_disagg.config import KEY_ENV
from vllm_disagg.core.keys import create_key_file, default_key_path, derive, load_key
from vllm_disagg.errors import KeyFileError


@pytest.fixture(autouse=True)
def private_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    monkeypatch.delenv(KEY_ENV, raising=False)


def test_the_users_own_key_is_made_once_and_private() -> None:
    first = load_key(None)

    assert load_key(None) == first
    assert default_key_path().stat().st_mode & 0o777 == 0o600


def test_a_file_beats_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "key"
    create_key_file(file)
    from_file = load_key(str(file))
    monkeypatch.setenv(KEY_ENV, "e" * 40)

    assert load_key(str(file)) == from_file
    assert load_key(None) != from_file


def test_a_key_that_exists_is_never_overwritten(tmp_path: Path) -> None:
    file = tmp_path / "key"
    create_key_file(file)
    before = file.read_text()

    create_key_file(file)

    assert file.read_text() == before
    assert list(tmp_path.glob(".key.*")) == []


def test_a_key_others_can_read_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "key"
    create_key_file(file)
    file.chmod(0o640)

    with pytest.raises(KeyFileError, match="chmod 600"):
        load_key(str(file))


def test_a_missing_key_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(KeyFileError, match="No such file"):
        load_key(str(tmp_path / "nowhere"))


def test_a_short_key_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(KEY_ENV, "short")

    with pytest.raises(KeyFileError, match="5 characters"):
        load_key(None)


def test_derived_keys_differ_by_purpose() -> None:
    assert derive(b"key", "a") != derive(b"key", "b")
