"""Shapes of models that are often planned for, from their public configurations."""

from __future__ import annotations

from typing import Final

from vllm_disagg.core.profile import ModelShape


def _opt(name: str, *, num_layers: int, num_heads: int, weight_gb: float) -> ModelShape:
    """OPT keeps all heads in its KV (multi-head attention); fp16 weights as DistServe's paper gives them."""
    hidden_size = num_heads * 128
    return ModelShape(
        name=name,
        num_layers=num_layers,
        num_heads=num_heads,
        num_kv_heads=num_heads,
        head_size=128,
        hidden_size=hidden_size,
        weight_bytes=int(weight_gb * 1e9),
        kv_bytes_per_token=2 * num_layers * hidden_size * 2,
        max_model_len=2048,
    )


SHAPES: Final[dict[str, ModelShape]] = {
    shape.name: shape
    for shape in (
        _opt("facebook/opt-13b", num_layers=40, num_heads=40, weight_gb=26),
        _opt("facebook/opt-66b", num_layers=64, num_heads=72, weight_gb=132),
        _opt("facebook/opt-175b", num_layers=96, num_heads=96, weight_gb=350),
        ModelShape(
            name="llama-3-8b",
            num_layers=32,
            num_heads=32,
            num_kv_heads=8,
            head_size=128,
            hidden_size=4096,
            weight_bytes=16_060_000_000,
            kv_bytes_per_token=131_072,
            max_model_len=8192,
        ),
        ModelShape(
            name="tiny",
            num_layers=4,
            num_heads=4,
            num_kv_heads=4,
            head_size=64,
            hidden_size=256,
            weight_bytes=8_000_000,
            kv_bytes_per_token=4096,
            max_model_len=4096,
        ),
    )
}
"""Model name to its shape. `llama-3-8b` and `tiny` are names of our own; the others are the models' own."""
