"""What requests are expected to take yet: `scheduler/decode.py` asks the same functions."""

from __future__ import annotations

from vllm_disagg.core.scheduling.growth import PROMISE_STEPS, has_room, holding, promised_blocks
from vllm_disagg.sim.reference.state import Engine, Holders, Request


def remaining(engine: Engine, request: Request) -> int:
    """Tokens that it is expected to generate yet. No request outgrows the KV cache."""
    most = min(request.most, engine.pool.num_blocks * engine.spec.block_size - request.prompt)
    return engine.lengths.remaining(request.kind, quantile=request.quantile, generated=request.generated, most=most)


def holders_of(engine: Engine) -> Holders:
    """Everybody who holds blocks now, as the decode scheduler counts them: not those with early KV."""
    size = engine.spec.block_size
    return Holders(
        [
            holding(request.known, request.computed, remaining(engine, request), size)
            for request in (*engine.running, *engine.parked)
        ]
    )


def promise_is_due(engine: Engine) -> bool:
    """Whether promised blocks are reckoned anew."""
    return engine.num_formed % PROMISE_STEPS == 0 or len(engine.running) + len(engine.parked) != engine.promised_to


def promise(engine: Engine, holders: Holders) -> None:
    """By how many blocks those who hold some will grow."""
    engine.promised_to, engine.promised = len(holders.blocks), promised_blocks(holders.blocks)


def may_come_in(engine: Engine, holders: Holders, request: Request, free: int) -> bool:
    """Whether there is room for it and for its growth. Then it is counted among those who hold blocks.

    Args:
        engine: the decode instance.
        holders: those who hold blocks.
        request: who wants to come in.
        free: blocks that nobody holds, and those with its own early KV.
    """
    usable = holders.held + free
    expected = holding(request.known, request.known, remaining(engine, request), engine.spec.block_size)
    return has_room(holders.blocks, expected, usable_blocks=int(usable * (1 - engine.headroom)))


def came_in(engine: Engine, holders: Holders, request: Request) -> None:
    """It has its blocks."""
    expected = holding(request.known, request.known, remaining(engine, request), engine.spec.block_size)
    holders.blocks.append(expected)


def learn(engine: Engine, request: Request) -> None:
    """An answer has come to its end."""
    if engine.spec.policy == "decode":
        engine.lengths.add(request.kind, request.generated)
