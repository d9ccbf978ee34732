"""KV blocks; see `sim/pool.py`."""

from __future__ import annotations

from vllm_disagg.sim.kernel.compiled import inner
from vllm_disagg.sim.kernel.state import (
    AFTER,
    BEFORE,
    BLOCK_SIZE,
    CHUNK_TOKENS,
    CHUNKS,
    FIRST_CHUNK,
    FREE,
    HELD,
    LEFT_BLOCKS,
    LEFT_FIRST,
    LEFT_LAST,
    NONE,
    NUM_CHUNKS,
    OWN,
    REFS,
    ROOM,
    SIDE,
    SIZE,
    ZERO,
)  # fmt: skip


@inner
def prefix_blocks(E, i, num_chunks):
    return num_chunks * E[i, CHUNK_TOKENS] // E[i, BLOCK_SIZE]


@inner
def chunk_blocks(E, i, k):
    return prefix_blocks(E, i, k + 1) - prefix_blocks(E, i, k)


@inner
def blocks(E, i, num_tokens):
    return (num_tokens + E[i, BLOCK_SIZE] - 1) // E[i, BLOCK_SIZE]


@inner
def line_up(E, left, i, node, blocks):
    left[i, node, BEFORE], left[i, node, AFTER], left[i, node, SIZE] = E[i, LEFT_LAST], NONE, blocks
    if E[i, LEFT_LAST] == NONE:
        E[i, LEFT_FIRST] = node
    else:
        left[i, E[i, LEFT_LAST], AFTER] = node
    E[i, LEFT_LAST] = node
    E[i, LEFT_BLOCKS] += blocks


@inner
def leave_line(E, left, i, node):
    before, after, blocks = left[i, node, BEFORE], left[i, node, AFTER], left[i, node, SIZE]
    if before == NONE:
        E[i, LEFT_FIRST] = after
    else:
        left[i, before, AFTER] = after
    if after == NONE:
        E[i, LEFT_LAST] = before
    else:
        left[i, after, BEFORE] = before
    left[i, node, SIZE] = NONE
    E[i, LEFT_BLOCKS] -= blocks
    return blocks


@inner
def overwrite(E, R, left, i):
    if left is None:
        return
    num_chunks = left.shape[1] - len(R)
    while E[i, LEFT_BLOCKS] > E[i, FREE]:
        node = E[i, LEFT_FIRST]
        blocks = left[i, node, SIZE]
        taken = min(blocks, E[i, LEFT_BLOCKS] - E[i, FREE])
        if node < num_chunks or taken == blocks:
            leave_line(E, left, i, node)
            if node < num_chunks:
                left[i, node, REFS] = NONE
        else:
            left[i, node, SIZE] = blocks - taken
            E[i, LEFT_BLOCKS] -= taken


@inner
def find(E, R, ids, left, i, r):
    if left is None:
        return ZERO
    found = ZERO
    if E[i, CHUNK_TOKENS] == 0:
        return found
    for k in range(R[r, FIRST_CHUNK], R[r, FIRST_CHUNK] + R[r, NUM_CHUNKS]):
        if left[i, ids[k], REFS] == NONE:
            break
        found += 1
    return found


@inner
def hit_tokens(E, i, num_chunks, known):
    if num_chunks == 0:
        return 0
    return min(prefix_blocks(E, i, num_chunks), (known - 1) // E[i, BLOCK_SIZE]) * E[i, BLOCK_SIZE]


@inner
def price(E, R, ids, left, i, r, num_chunks, num_tokens):
    taken = blocks(E, i, num_tokens) - prefix_blocks(E, i, num_chunks)
    if left is None:
        return taken
    for k in range(num_chunks):
        if left[i, ids[R[r, FIRST_CHUNK] + k], REFS] == 0:
            taken += chunk_blocks(E, i, k)
    return taken


@inner
def set_room(E, R, i, r):
    """How many tokens the blocks that it holds have room for."""
    side = E[i, SIDE]
    R[r, ROOM + side] = (R[r, OWN + side] + prefix_blocks(E, i, R[r, CHUNKS + side])) * E[i, BLOCK_SIZE]


@inner
def missing(E, R, i, r, num_tokens):
    room = R[r, ROOM + E[i, SIDE]]
    if num_tokens <= room:
        return 0
    return blocks(E, i, num_tokens - room)


@inner
def grow(E, R, left, i, r, num_tokens):
    more = missing(E, R, i, r, num_tokens)
    if more > 0:
        R[r, OWN + E[i, SIDE]] += more
        E[i, FREE] -= more
        set_room(E, R, i, r)
    if E[i, LEFT_BLOCKS] > E[i, FREE]:
        overwrite(E, R, left, i)


@inner
def hold(E, R, ids, left, i, r, num_chunks, num_tokens):
    """`Pool.admit`."""
    if left is not None:
        for k in range(num_chunks):
            chunk = ids[R[r, FIRST_CHUNK] + k]
            if left[i, chunk, REFS] == 0:
                leave_line(E, left, i, chunk)
                E[i, FREE] -= chunk_blocks(E, i, k)
            left[i, chunk, REFS] += 1
    side = E[i, SIDE]
    R[r, HELD + side], R[r, OWN + side], R[r, CHUNKS + side] = 1, 0, num_chunks
    set_room(E, R, i, r)
    grow(E, R, left, i, r, num_tokens)


@inner
def publish(E, R, ids, left, i, r, num_tokens):
    if left is None:
        return
    if E[i, CHUNK_TOKENS] == 0:
        return
    side = E[i, SIDE]
    count = R[r, NUM_CHUNKS]
    while R[r, CHUNKS + side] < count and (R[r, CHUNKS + side] + 1) * E[i, CHUNK_TOKENS] <= num_tokens:
        k = R[r, CHUNKS + side]
        chunk = ids[R[r, FIRST_CHUNK] + k]
        if left[i, chunk, REFS] == NONE:
            left[i, chunk, REFS] = 0
        else:
            if left[i, chunk, REFS] == 0:
                leave_line(E, left, i, chunk)
                E[i, FREE] -= chunk_blocks(E, i, k)
            E[i, FREE] += chunk_blocks(E, i, k)
        left[i, chunk, REFS] += 1
        R[r, OWN + side] -= chunk_blocks(E, i, k)
        R[r, CHUNKS + side] += 1


@inner
def leave_behind(E, R, ids, left, i, r):
    """What an ended request leaves in the cache."""
    if left is None:
        return
    if E[i, CHUNK_TOKENS] == 0:
        return
    side = E[i, SIDE]
    node = left.shape[1] - len(R) + r
    before = ZERO
    if left[i, node, SIZE] != NONE:
        before = leave_line(E, left, i, node)
    line_up(E, left, i, node, before + R[r, OWN + side])
    for k in range(R[r, CHUNKS + side] - 1, -1, -1):
        chunk = ids[R[r, FIRST_CHUNK] + k]
        left[i, chunk, REFS] -= 1
        if left[i, chunk, REFS] == 0:
            line_up(E, left, i, chunk, chunk_blocks(E, i, k))
            E[i, FREE] += chunk_blocks(E, i, k)


@inner
def release(E, R, ids, left, i, r):
    side = E[i, SIDE]
    E[i, FREE] += R[r, OWN + side]
    leave_behind(E, R, ids, left, i, r)
    R[r, OWN + side] = R[r, CHUNKS + side] = R[r, HELD + side] = R[r, ROOM + side] = 0


@inner
def set_aside(E, R, left, i, num_blocks):
    E[i, FREE] -= num_blocks
    if E[i, LEFT_BLOCKS] > E[i, FREE]:
        overwrite(E, R, left, i)
