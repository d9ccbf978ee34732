"""Model folders for engines that compute nothing: a configuration of the right shape and a tokenizer, no weights."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any, Final

from vllm_disagg.core.profile import ModelShape
from vllm_disagg.errors import ConfigError
from vllm_disagg.folders import prepared_folder, user_folder

_VERSION: Final = "1"
"""Raised whenever something else is written, so that an older folder is not used."""

_CONSONANTS, _VOWELS, _ENDINGS = "bdfgklmnprstvzhj", "aeiou", "nrsl"
_SPECIAL: Final = ("<|end|>", "<|im_start|>", "<|im_end|>")
_CHAT_TEMPLATE: Final = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def model_folder(shape: ModelShape) -> Path:
    """A folder that vLLM accepts as a model of this shape. Written at the first call."""

    def write(folder: Path) -> None:
        tokenizer = _tokenizer()
        _dump(folder / "tokenizer.json", tokenizer)
        _dump(folder / "tokenizer_config.json", _tokenizer_config(shape))
        _dump(folder / "config.json", _config(shape, vocab_size=len(tokenizer["model"]["vocab"])))

    name = shape.name.replace("/", "--")
    return prepared_folder(user_folder("cache") / f"emulated-{name}-{_VERSION}", write)


def check_shape(shape: ModelShape, folder: Path) -> None:
    """Compare the profile's model with a user's own.

    Raises:
        ConfigError: they differ; the text names the property.
    """
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    heads = config.get("num_attention_heads")
    found = {
        "num_layers": config.get("num_hidden_layers"),
        "num_heads": heads,
        "num_kv_heads": config.get("num_key_value_heads", heads),
        "hidden_size": config.get("hidden_size"),
    }
    for name, value in found.items():
        if value is not None and value != getattr(shape, name):
            raise ConfigError(
                f"the profile is of {shape.name} with {name} {getattr(shape, name)}, "
                f"the model at {folder} has {value}: give the profile of this model"
            )


def _config(shape: ModelShape, *, vocab_size: int) -> dict[str, Any]:
    """Whatever the model's own architecture, the shape of its KV and its context is what counts here."""
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": shape.hidden_size,
        "intermediate_size": 4 * shape.hidden_size,
        "num_hidden_layers": shape.num_layers,
        "num_attention_heads": shape.num_heads,
        "num_key_value_heads": shape.num_kv_heads,
        "head_dim": shape.head_size,
        "max_position_embeddings": shape.max_model_len,
        "vocab_size": vocab_size,
        "eos_token_id": 0,
        "rms_norm_eps": 1e-5,
        "tie_word_embeddings": True,
        "torch_dtype": "bfloat16",
        "hidden_act": "silu",
    }


def _tokenizer() -> dict[str, Any]:
    """Byte-level BPE whose merges spell made-up words of two syllables, so that text of an emulated model becomes the
    same tokens again. Everything else costs about a token per letter."""
    syllables = [consonant + vowel for consonant in _CONSONANTS for vowel in _VOWELS]
    merges = [tuple(syllable) for syllable in syllables]
    merges += [("Ġ", syllable) for syllable in syllables]
    merges += [(f"Ġ{first}", second) for first, second in itertools.product(syllables, repeat=2)]
    merges += [
        (f"Ġ{first}{second}", end) for first, second in itertools.product(syllables, repeat=2) for end in _ENDINGS
    ]
    vocab = [*_SPECIAL, *_byte_letters(), *("".join(pair) for pair in merges)]
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [
            {
                "id": index, "content": content, "single_word": False, "lstrip": False, "rstrip": False,
                "normalized": False, "special": True,
            }
            for index, content in enumerate(_SPECIAL)
        ],
        "normalizer": None,
        "pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True},
        "post_processor": None,
        "decoder": {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True},
        "model": {
            "type": "BPE", "dropout": None, "unk_token": None, "continuing_subword_prefix": None,
            "end_of_word_suffix": None, "fuse_unk": False, "byte_fallback": False, "ignore_merges": False,
            "vocab": {token: index for index, token in enumerate(vocab)},
            "merges": [list(pair) for pair in merges],
        },
    }  # fmt: skip


def _byte_letters() -> list[str]:
    """The printable letter that stands for each byte in byte-level BPE (as GPT-2 defined it)."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = itertools.count(256)
    return [chr(byte) if byte in printable else chr(next(others)) for byte in range(256)]


def _tokenizer_config(shape: ModelShape) -> dict[str, Any]:
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": _SPECIAL[0],
        "model_max_length": shape.max_model_len,
        "clean_up_tokenization_spaces": False,
        "chat_template": _CHAT_TEMPLATE,
    }


def _dump(path: Path, document: dict[str, Any]) -> None:
    path.write_text(json.dumps(document, ensure_ascii=False), encoding="utf-8")
