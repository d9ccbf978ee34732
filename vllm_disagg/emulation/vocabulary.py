"""Which tokens an emulated model says."""

from __future__ import annotations

from typing import Any

from vllm_disagg.emulation.sampler import Vocabulary


def vocabulary_of(model_config: Any, mean_output_tokens: float) -> Vocabulary:
    """The middle three quarters of a model's vocabulary, which leaves out special tokens and single bytes.

    Args:
        model_config: vLLM's `ModelConfig`.
        mean_output_tokens: mean length of an answer that nothing else ends.
    """
    size = model_config.get_vocab_size()
    eos = getattr(model_config.hf_text_config, "eos_token_id", None)
    eos = eos[0] if isinstance(eos, list) and eos else eos
    return Vocabulary(
        size=size,
        words=range(size // 8, size - size // 8),
        eos=eos if isinstance(eos, int) else size - 1,
        eos_probability=1.0 / mean_output_tokens,
    )
