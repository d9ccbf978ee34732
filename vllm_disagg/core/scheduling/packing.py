"""Which waiting prompts make up the next step of a prefill instance: whole prompts, up to L_m new tokens.

Below L_m new tokens a device is not yet busy, and prompts computed together cost hardly more than one; above it they
only wait for each other (DistServe, sections 3.1 and 4.3).
"""

from __future__ import annotations

import math
from collections.abc import MutableSequence, Sequence
from dataclasses import dataclass

MAX_PASSES = 8
"""How many steps may pass a first prompt that finds no memory."""

CONSTANT_SHARE = 1 / 3
"""What a step costs in any case, as prompt tokens that take as long: this share of L_m. With the step times of OPT-13B,
OPT-66B and Llama-3-8B on A100s it is 0.31 to 0.36, whatever the degree of parallelism."""

LOOK_AHEAD = 128
"""Prompts of the ordered line that a step looks at. With 16 tokens each they would fill the largest usual L_m."""


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
    tokens, blocks = [item[0] for item in prompts], [item[1] for item in prompts]
    chosen = [0] * len(prompts)
    count = choose(tokens, blocks, len(prompts), limit_tokens, free_blocks, passes, max_passes, chosen)
    return Packed(tuple(chosen[:count]), head_passed=count > 0 and blocks[0] > free_blocks)


def choose(
    tokens: Sequence[int], blocks: Sequence[int], num: int, limit_tokens: int, free_blocks: int, passes: int,
    max_passes: int, chosen: MutableSequence[int],
) -> int:  # fmt: skip
    """`pack` over the first `num` entries of two sequences. Writes the places into `chosen`, and returns how many."""
    if num == 0 or limit_tokens <= 0 or (blocks[0] > free_blocks and passes >= max_passes):
        return 0
    count = 0
    tokens_left, blocks_left = limit_tokens, free_blocks
    for place in range(num):
        if blocks[place] > blocks_left or (count > 0 and tokens[place] > tokens_left):
            continue
        chosen[count] = place
        count += 1
        tokens_left, blocks_left = tokens_left - tokens[place], blocks_left - blocks[place]
        if tokens_left <= 0:
            break
    return count


def is_full(held_blocks: int, held_share: float, num_blocks: int) -> bool:
    """Whether prefill holds so much for decode that it admits no prompt: its memory is the queue in front of decode,
    and this is where that ends."""
    return held_blocks >= held_share * num_blocks


def backlog_limit(waiting_tokens: int, limit_tokens: int, most_tokens: int, stages: int) -> int:
    """How many new tokens a step may have: L_m, and more where many wait.

    With few waiting a step of L_m tokens is short and hardly less efficient than a longer one. With many, each of them
    waits for what all steps before its own cost in any case, and so do those that come later. Let W tokens wait, and a
    step of b tokens cost as much time as c + b tokens take. In a pipeline of s stages the first tokens of all W come
    (W / b + 2 s - 1) * (c + b) / 2s later on average, least at b = sqrt(W * c / (2 s - 1)).

    Args:
        waiting_tokens: W, of the prompts in line, whatever the cache may hold of them.
        limit_tokens: L_m.
        most_tokens: what a step can have.
        stages: s.
    """
    best = int(math.sqrt(waiting_tokens * limit_tokens * CONSTANT_SHARE / (2 * stages - 1)))
    return min(most_tokens, max(limit_tokens, best))


def even_limit(total_tokens: int, limit_tokens: int, stages: int) -> int:
    """The limit under which a pipeline's steps are as equal as can be.

    A stage waits for the longest step around it. So what waits is cut into as many steps as L_m asks for, but of equal
    size, instead of full ones and a rest; DistServe equalises the new tokens of batches for the same reason
    (section 4.3). With one stage nothing waits for another step, and the limit stays.
    """
    if stages <= 1 or total_tokens <= limit_tokens:
        return limit_tokens
    steps = -(-total_tokens // limit_tokens)
    return -(-total_tokens // steps)
