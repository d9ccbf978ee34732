"""Two checkpoints of one architecture are told apart."""

from __future__ import annotations

from pathlib import Path

from vllm_disagg.connector.engine_fingerprint import weights_digest


def folder(root: Path, name: str, content: bytes) -> str:
    path = root / name
    path.mkdir()
    (path / "model.safetensors").write_bytes(content)
    (path / "config.json").write_text(name)
    return str(path)


def test_copies_of_a_checkpoint_are_equal_wherever_they_lie(tmp_path: Path) -> None:
    weights = bytes(range(256)) * 1000

    assert weights_digest(folder(tmp_path, "a", weights), "") == weights_digest(folder(tmp_path, "b", weights), "")


def test_other_weights_of_the_same_size_differ(tmp_path: Path) -> None:
    weights = bytes(range(256)) * 1000

    assert weights_digest(folder(tmp_path, "a", weights), "") != weights_digest(
        folder(tmp_path, "b", weights[::-1]), ""
    )


def test_a_single_file_is_looked_into(tmp_path: Path) -> None:
    for name, byte in (("a.gguf", b"1"), ("b.gguf", b"2")):
        (tmp_path / name).write_bytes(byte * 10_000)

    assert weights_digest(str(tmp_path / "a.gguf"), "") != weights_digest(str(tmp_path / "b.gguf"), "")


def test_hub_models_are_told_apart_by_name_and_revision() -> None:
    assert weights_digest("org/base", "main") != weights_digest("org/tuned", "main")
    assert weights_digest("org/base", "main") != weights_digest("org/base", "v2")
