"""An engine's fingerprint, read off vLLM's configuration: the factors another engine must share."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from vllm_disagg.core.fingerprint import digest_of

WEIGHT_SUFFIXES = (".safetensors", ".bin", ".pt", ".gguf")
_SAMPLES_PER_FILE, _SAMPLE_BYTES = 16, 4096


def config_fingerprint(vllm_config: Any) -> dict[str, str]:
    """The factors known from the configuration alone, in API server and engine alike. Keys are named as a user would
    change them."""
    from vllm import __version__ as vllm_version

    model, cache = vllm_config.model_config, vllm_config.cache_config
    return {
        "vllm version": vllm_version,
        "model": _model_digest(model),
        "dtype": str(model.dtype).removeprefix("torch."),
        "kv cache dtype": str(cache.cache_dtype),
        "block size": str(cache.block_size),
        "kv heads": str(model.get_total_num_kv_heads()),
        "head size": str(model.get_head_size()),
        "layers": str(model.get_total_num_hidden_layers()),
        "speculative config": _speculative(vllm_config),
        "weights": weights_digest(model.model, _revision(model)),
    }


def engine_fingerprint(vllm_config: Any, *, isa: str, heads: object, transport: str) -> dict[str, str]:
    """The same, with what only a running engine knows.

    Args:
        vllm_config: vLLM's `VllmConfig`.
        isa: instruction set that packs CPU blocks, or the platform's name elsewhere.
        transport: how its KV travels, `auto` resolved.
        heads: what its KV heads keep of a block, from `layout.describe_heads`.
    """
    return {
        **config_fingerprint(vllm_config),
        "kv transport": transport,
        "instruction set": isa,
        "kv cache layout": f"{vllm_config.cache_config.kv_cache_layout} {digest_of(heads)}",
    }


def weights_digest(model: str, revision: str, *, suffixes: Sequence[str] = WEIGHT_SUFFIXES) -> str:
    """Tells two checkpoints of one architecture apart: files by samples of what is in them, a hub model by its name
    and revision."""
    path = Path(model)
    if path.is_dir():
        files = sorted(item for item in path.iterdir() if item.suffix in suffixes)
    elif path.is_file():
        files = [path]
    else:
        return f"{model} at {revision}"
    digest = hashlib.blake2b(digest_size=8)
    for file in files:
        size = file.stat().st_size
        digest.update(f"{size}:".encode())
        with file.open("rb") as stream:
            for index in range(_SAMPLES_PER_FILE):
                stream.seek(max(0, size - _SAMPLE_BYTES) * index // max(1, _SAMPLES_PER_FILE - 1))
                digest.update(stream.read(_SAMPLE_BYTES))
    return digest.hexdigest()


def _revision(model: Any) -> str:
    """The commit a hub model was loaded from, where the library knows it."""
    return str(getattr(model.hf_config, "_commit_hash", None) or model.revision or "its default revision")


def _model_digest(model: Any) -> str:
    config = model.hf_config.to_dict()
    kept = {key: value for key, value in config.items() if not key.startswith("_") and key not in _IRRELEVANT}
    name = "/".join(config.get("architectures") or ["model"])
    return f"{name} {digest_of(_plain(kept))} quantization={model.quantization}"


_IRRELEVANT = frozenset({"transformers_version", "torch_dtype", "dtype", "name_or_path"})
"""Written by whoever saved the model; `dtype` is a factor of its own, as the engine resolved it."""


def _plain(value: Any) -> Any:
    """JSON-able form of a Hugging Face configuration value."""
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple, set)):
        return [_plain(item) for item in value]
    return value if isinstance(value, (str, int, float, bool, type(None))) else str(value)


def _speculative(vllm_config: Any) -> str:
    speculative = vllm_config.speculative_config
    return "none" if speculative is None else f"{speculative.method} {speculative.model}"
