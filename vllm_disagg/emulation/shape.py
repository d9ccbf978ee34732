"""The emulated KV cache of a model: how many heads and layer groups stand for the real ones, and who holds which."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from vllm_disagg.errors import ConfigError

CELL_BYTES: Final = 8
_MOST_HEADS: Final = 24
_USUAL_DEGREES: Final = (2, 4, 8, 3)


@dataclass(frozen=True, slots=True, kw_only=True)
class CacheShape:
    """Of a whole model, the same for every parallelism.

    Args:
        num_groups: layer groups, each with a KV cache of its own.
        num_heads: KV heads in each.
        block_size: tokens per block.
    """

    num_groups: int
    num_heads: int
    block_size: int

    @property
    def bytes_per_token(self) -> int:
        """Real memory of one token over all groups and heads."""
        return CELL_BYTES * self.num_groups * self.num_heads

    def groups_of(self, pp_rank: int, pp: int) -> range:
        """Layer groups of one pipeline stage.

        Raises:
            ConfigError: the stages cannot be equal.
        """
        if self.num_groups % pp:
            raise ConfigError(
                f"--emulate-layer-groups {self.num_groups} cannot be cut into {pp} pipeline stages: "
                f"give a multiple of {pp}, the same on all engines"
            )
        each = self.num_groups // pp
        return range(pp_rank * each, (pp_rank + 1) * each)

    def heads_of(self, tp_rank: int, tp: int) -> range:
        """KV heads of one tensor-parallel rank; ranks beyond the number of heads hold copies, as in vLLM.

        Raises:
            ConfigError: the ranks cannot be equal.
        """
        if tp > self.num_heads and tp % self.num_heads == 0:
            head = tp_rank * self.num_heads // tp
            return range(head, head + 1)
        if self.num_heads % tp:
            raise ConfigError(f"{self.num_heads} emulated KV heads cannot be shared by {tp} tensor-parallel ranks")
        each = self.num_heads // tp
        return range(tp_rank * each, (tp_rank + 1) * each)


def emulated_heads(num_kv_heads: int) -> int:
    """How many heads stand for a model's KV heads: all of them, or a divisor that the usual parallelisms divide."""
    if num_kv_heads <= 8:
        return num_kv_heads
    divisors = [count for count in range(1, _MOST_HEADS + 1) if num_kv_heads % count == 0]
    return max(divisors, key=lambda count: (sum(count % degree == 0 for degree in _USUAL_DEGREES), -count))
