"""KV on its way from prefill to decode, the hold that keeps it until then, and the blocks set aside for it."""

from __future__ import annotations

from vllm_disagg.core.scheduling.reserve import reserve_target
from vllm_disagg.sim.outcome import TRANSFER
from vllm_disagg.sim.reference.state import NAN, PULLED, WAKE, Engine, Request, Run


def keep_reserve(engine: Engine) -> None:
    """Before each step: set more blocks aside, or give some back."""
    target = reserve_target(
        engine.pool.free, engine.reserved, engine.lent, max(engine.recent, default=0), len(engine.running),
        engine.promised if engine.spec.policy == "decode" else 0,
    )  # fmt: skip
    engine.pool.set_aside(target - engine.reserved)
    engine.reserved = target


def fetch_early(run: Run, engine: Engine, request: Request, now_s: float) -> None:
    """It came while a step runs: the fetch need not wait for that, if the blocks in reserve are enough."""
    pool = engine.pool
    if not run.reads_early or request.hold_until_s <= now_s:
        return
    found = pool.find(request.chunks)
    hit = pool.hit_tokens(found, request.known)
    if request.prompt - hit <= 1:
        return
    engine.recent.append(pool.blocks(request.prompt) - hit // engine.spec.block_size)
    price = pool.price(request.chunks, found, request.known)
    if price > engine.reserved:
        return
    pool.set_aside(-price)
    engine.holdings[request.index] = pool.admit(request.chunks, found, request.known)
    engine.reserved -= price
    engine.lent += engine.holdings[request.index].own
    request.early = True
    start_pull(run, engine, request, hit, now_s)


def start_pull(run: Run, engine: Engine, request: Request, hit: int, now_s: float) -> None:
    """Reserve both ends of the link. With no prefill instance the KV is there at once."""
    request.remote, request.pulling, request.computed = False, True, request.prompt
    run.at["transfer_start_s"][request.index] = now_s
    sender = int(run.count["prefill_instance"][request.index])
    end_s, blocks = now_s, engine.pool.blocks(request.prompt) - hit // engine.spec.block_size
    if sender >= 0:
        out, into = run.system.ends[sender], run.system.ends[engine.number]
        begin_s = max(now_s, run.send_free_s[out], run.receive_free_s[into])
        end_s = begin_s + run.system.link.seconds(blocks * engine.spec.block_size * run.system.kv_bytes_per_token)
        run.send_free_s[out] = run.receive_free_s[into] = end_s
    limit_s = now_s + run.system.pull_timeout_s
    request.pull_failed = end_s > limit_s or end_s > request.hold_until_s
    run.note(TRANSFER, now_s, end_s, engine.number, request.index, sender, blocks, not request.pull_failed)
    run.push(min(end_s, limit_s), PULLED, request.index)


def end_pull(run: Run, request: Request, now_s: float) -> None:
    """Its KV is here, or will not come."""
    engine = run.place(request)
    release_hold(run, request)
    request.pulling = False
    if request.pull_failed:
        _lose(run, engine, request)
        return
    request.computed = min(request.prompt, request.known - 1)
    run.at["transfer_end_s"][request.index] = now_s
    own = engine.holdings[request.index].own
    engine.pool.publish(engine.holdings[request.index], request.chunks, request.prompt)
    if request.early:
        engine.lent += engine.holdings[request.index].own - own


def _lose(run: Run, engine: Engine, request: Request) -> None:
    """Its prompt is computed here: next if it was parked, else when its turn comes."""
    request.computed = 0
    run.at["transfer_start_s"][request.index] = NAN
    if request.early:
        request.early = False
        engine.lent -= engine.holdings[request.index].own
    else:
        engine.parked.remove(request)
        engine.waiting.appendleft(request)
    engine.pool.release(engine.holdings.pop(request.index), request.chunks, request.index)


def hold(run: Run, engine: Engine, request: Request, now_s: float) -> None:
    """Prefill keeps the prompt's KV for decode."""
    request.hold_until_s = now_s + run.system.hold_cap_s
    engine.holds.append((request.hold_until_s, request))
    engine.held_blocks += engine.pool.blocks(request.prompt)


def release_hold(run: Run, request: Request) -> None:
    """Prefill may let go of the prompt's KV, if it has not already."""
    number = int(run.count["prefill_instance"][request.index])
    if number >= 0 and request.index in run.engines[number].holdings:
        _let_go(run.engines[number], request)
        run.dirty.add(number)


def expire_holds(engine: Engine, now_s: float) -> None:
    """Holds that have come to their end."""
    while engine.holds and engine.holds[0][0] <= now_s:
        _, request = engine.holds.popleft()
        if request.index in engine.holdings:
            _let_go(engine, request)


def wake_at_expiry(run: Run, engine: Engine) -> None:
    """Nothing else may happen here until a hold ends by itself."""
    while engine.holds and engine.holds[0][1].index not in engine.holdings:
        engine.holds.popleft()
    if engine.holds and engine.wake_s != engine.holds[0][0]:
        engine.wake_s = engine.holds[0][0]
        run.push(engine.wake_s, WAKE, engine.number)


def _let_go(engine: Engine, request: Request) -> None:
    engine.held_blocks -= engine.pool.blocks(request.prompt)
    engine.pool.release(engine.holdings.pop(request.index), request.chunks, request.index)
