"""What an engine is, as far as its step times depend on it: written by a recording engine beside its log of steps."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec

from vllm_disagg.core.profile import ModelShape
from vllm_disagg.errors import ConfigError

SUFFIX = ".engine.json"


class EngineFacts(msgspec.Struct, frozen=True, kw_only=True):
    """One engine.

    Attributes:
        model: its shape.
        device: kind of device, such as `NVIDIA H200` or a CPU's name and number of cores.
        device_memory_bytes: of one device.
        tp: tensor-parallel degree.
        kv_capacity_tokens: tokens whose KV fits.
        block_size: tokens per KV block.
        step_tokens: most new tokens of a step (`--max-num-batched-tokens`).
        max_seqs: most requests of a step (`--max-num-seqs`).
        dtype: of weights and activations.
        versions: of the software, by name.
        emulated: the profile that is emulated; empty for a real device.
        fills_kv: the engine takes a request's KV as given where it is asked to (`profiler/fill.py`).
    """

    model: ModelShape
    device: str
    device_memory_bytes: int
    tp: int
    kv_capacity_tokens: int
    block_size: int
    step_tokens: int
    max_seqs: int
    dtype: str = ""
    versions: dict[str, str] = {}
    emulated: str = ""
    fills_kv: bool = False

    def plain(self) -> dict[str, Any]:
        """For JSON."""
        found: dict[str, Any] = msgspec.to_builtins(self)
        return found


def facts_file(log: Path) -> Path:
    """Where an engine that writes its steps to `log` says what it is."""
    return log.with_name(log.name + SUFFIX)


def write_facts(facts: EngineFacts, log: Path) -> None:
    """Say it; whoever reads sees all of it or nothing."""
    file = facts_file(log)
    draft = file.with_suffix(".draft")
    draft.write_bytes(msgspec.json.encode(facts))
    draft.replace(file)


def read_facts(log: Path) -> EngineFacts | None:
    """What the engine that writes to `log` has said; None if nothing.

    Raises:
        ConfigError: it is malformed.
    """
    file = facts_file(log)
    try:
        return msgspec.json.decode(file.read_bytes(), type=EngineFacts)
    except FileNotFoundError:
        return None
    except (OSError, msgspec.DecodeError) as error:
        raise ConfigError(f"{file} does not say what the engine is: {error}") from error
