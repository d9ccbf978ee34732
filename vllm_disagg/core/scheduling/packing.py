"""Which waiting prompts make up the next step of a prefill instance: whole prompts, up to L_m new tokens.

Below L_m new tokens a device is not yet busy, and prompts computed together cost hardly more than one; above it they
only wait for each other (DistServe, sections 3.1 and 4.3).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

MAX_PASSES = 8
"""How many steps may pass a first prompt that finds no memory."""


@dataclass(frozen=True, slots=True)
class Packed:
    """What a step computes.

    Args:
        chosen: places of the prompts, in their order.
        head_passed: the first prompt found no memory, and others go before it in this step.
    """

    chosen: tuple[int, ...]
    head_passed: bool = False


def pack(
    prompts: Sequence[tuple[int, int]],
    *,
    limit_tokens: int,
    free_blocks: int,
    passes: int = 0,
    max_passes: int = MAX_PASSES,
) -> Packed:
    """Choose whole prompts for one step.

    The first prompt goes if there is memory for it, however long it is; each later one goes if it still fits, so that
    short ones fill what a long one leaves. Since the first one always goes, passing never makes anybody wait longer:
    with unchanged order, the k-th in line runs within k steps. A first prompt that finds no memory is passed by at most
    `max_passes` steps; then nobody goes before it, and the memory that is given back becomes its own.

    Args:
        prompts: `(tokens, blocks)` of each in order: new tokens to compute, KV blocks it needs.
        limit_tokens: L_m, less what this step computes anyway.
        free_blocks: KV blocks that may be used.
        passes: how many steps have passed the first prompt already.
        max_passes: see above.

    Returns:
        At most max(`limit_tokens`, tokens of the first one chosen) new tokens in all, at most `free_blocks` blocks, and
        nothing left out that would still fit.
    """
    if not prompts or limit_tokens <= 0:
        return Packed(())
    blocked = prompts[0][1] > free_blocks
    if blocked and passes >= max_passes:
        return Packed(())
    chosen: list[int] = []
    tokens_left, blocks_left = limit_tokens, free_blocks
    for place, (tokens, blocks) in enumerate(prompts):
        if blocks > blocks_left or (chosen and tokens > tokens_left):
            continue
        chosen.append(place)
        tokens_left, blocks_left = tokens_left - tokens, blocks_left - blocks
        if tokens_left <= 0:
            break
    return Packed(tuple(chosen), head_passed=blocked and bool(chosen))


def even_limit(total_tokens: int, *, limit_tokens: int, stages: int) -> int:
    """The limit under which a pipeline's steps are as equal as can be.

    A stage waits for the longest step around it. So what waits is cut into as many steps as L_m asks for, but of equal
    size, instead of full ones and a rest; DistServe equalises the new tokens of batches for the same reason
    (section 4.3). With one stage nothing waits for another step, and the limit stays.
    """
    if stages <= 1 or total_tokens <= limit_tokens:
        return limit_tokens
    steps = -(-total_tokens // limit_tokens)
    return -(-total_tokens // steps)
