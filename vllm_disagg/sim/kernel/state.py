"""Where everything lies.

A run needs a few arrays only, since every array that is handed to a compiled function costs time: `R` has a row of
whole numbers per request and `T` a row of times, `E` and `F` the same per engine, `S` and `X` hold what there is once,
`parts` the steps under way, `ids` and `left` the prefix cache. `W` has a row per engine with what it has seen: recent
prompts, and the lengths of past answers. `G` is scratch paper. Where no prompt shares its beginning with another, `ids`
and `left` are None, and where every engine takes prompts as they come so is `ranks`: numba then leaves out what works
on them, and has less to compile. Names of columns are the constants below.
"""

from __future__ import annotations

from typing import Final

import numpy as np

from vllm_disagg.core.scheduling.growth import WINDOW
from vllm_disagg.core.scheduling.reserve import RECENT_PROMPTS
from vllm_disagg.sim import outcome
from vllm_disagg.sim.reference import state as reference


def _numbers(count: int) -> list[np.int64]:
    """0, 1, 2, ... numba gives each plain number among the globals a type of its own, and compiles every function once
    for each of those that it is called with; numbers of numpy all have one type."""
    return [np.int64(number) for number in range(count)]


DISPATCH, FINISH, PREEMPTION, STEP, TRANSFER = (
    np.int64(getattr(outcome, name)) for name in ("DISPATCH", "FINISH", "PREEMPTION", "STEP", "TRANSFER")
)
HANDED_OVER, PULLED, QUEUED, STAGE_FREE, STEP_END, WAKE = (
    np.int64(getattr(reference, name)) for name in ("HANDED_OVER", "PULLED", "QUEUED", "STAGE_FREE", "STEP_END", "WAKE")
)

# Columns of R, one row per request, eight to a line of the processor's cache: first those of all who wait or run, then
# those of each step. Pairs are for the prefill and for the decode instance.
# After NEXT and NEXT_AWAY comes the way back. HOLDS and GROWS are what was last found of one that holds blocks: true as
# long as it is expected to end at ENDS_AT tokens, and has KV of at most HOLDS_FOR tokens and not of a block less. That
# it ends there was found when FOUND_AT answers were known, and with these is true up to FOUND_TO tokens.
(
    KNOWN, COMPUTED, ROOM, ROOM_D, EPOCH, NEXT, PREVIOUS, NUM_CHUNKS,
    TOTAL, SPLIT, ON_DECODE, PROMPT, FOUND_AT, FOUND_TO, HOLDS_FOR, LONGER,
    KIND, MOST, ENDS_AT, HOLDS, GROWS, FIRST_CHUNK, REMOTE, EARLY,
    PULLING, PREEMPTIONS, NEXT_AWAY, PREVIOUS_AWAY, OWN, OWN_D, CHUNKS, CHUNKS_D,
    HELD, HELD_D, P, D, PULL_FAILED, NEXT_HOLD, CACHED, REFUSED, PASSES, NUM_R,
) = _numbers(42)  # fmt: skip

# Columns of T, likewise. AHEAD and COST are of the moment in which victims are chosen.
(
    LAST_TOKEN, LONGEST_GAP, FIRST_DECODE, PREFILL_END, AHEAD, COST, QUANTILE, FIRST_TOKEN, ARRIVAL, HOLD_UNTIL,
    PREFILL_START, TRANSFER_START, TRANSFER_END, DECODE_START, FINISHED, QUEUED_AT, NUM_T,
) = _numbers(17)  # fmt: skip

# Columns of E, one row per engine. From NUM_E on: its running requests. After the first of a queue comes its last.
# NUM_AWAY and NUM_LOCAL count those that wait, NUM_COMING those whose KV comes early, NUM_HERE those parked whose KV is
# here. ANSWERED counts the answers that were learned from. HOLDERS to MOST_GROWTH are of those who hold blocks; none of
# them grows by more than MOST_GROWTH, and BY_GROWTH is where W counts them.
(
    BLOCKS, BLOCK_SIZE, STAGES, POLICY, BUDGET, MAX_SEQS, WATERMARK, CHUNK_TOKENS, SIDE, END,
    FREE, RUNNING, WAITING, WAITING_LAST, AWAY, AWAY_LAST, PARKED, PARKED_LAST, NUM_PARKED, STEP_FIRST, STEP_COUNT,
    HOLD, HOLD_LAST, LOAD_TOKENS, LOAD_REQUESTS, LAST_CHOSEN, LEFT_FIRST, LEFT_LAST, LEFT_BLOCKS, HELD_BLOCKS,
    NUM_QUEUED, NUM_FORMED, NUM_PREEMPTED, PROMISED, PROMISED_TO, RESERVED, LENT, LONGEST, NUM_RECENT, ORDER,
    BATCH_TOKENS, MOST_BATCH, NUM_AWAY, NUM_LOCAL, NUM_COMING, NUM_HERE, ANSWERED, HOLDERS, HOLDERS_HELD,
    HOLDERS_ALL, MOST_GROWTH, BY_GROWTH, NUM_E,
) = _numbers(53)  # fmt: skip

# Columns of F. From NUM_F on: when each stage is free.
(
    STEP_OVERHEAD, REQUEST_OVERHEAD, HOP, WAKE_AT, HEADROOM, HELD_SHARE, PATIENCE, TTFT, TPOT, NUM_F,
) = _numbers(10)  # fmt: skip

# Places in S. From NUM_S on: the engines that may form a step. TOKENS to CONTEXT are of the step that is being formed,
# and PACED to FETCH_ONLY are its plan.
(
    PUSHED, CHOICES, STEPS, EVENTS, LOGGED, HEAP, DIRTY, NUM_PREFILL, FIRST_FROM_PREFILL, MIN_SPLIT, PHASE, KV_BYTES,
    READS_EARLY, TOKENS, AREA, PREFILLS, DECODES, CONTEXT, PACED, PROMPT_TOKENS, LOCAL_TOKENS, FETCH_ONLY,
    NUM_S,
) = _numbers(23)  # fmt: skip

# Places in X. From NUM_X on: when each link end is free to send, and to receive.
BANDWIDTH, LATENCY, HANDOFF, DISPATCH_S, HOLD_CAP, PULL_TIMEOUT, NUM_X = _numbers(7)

# Places in a row of W: blocks of recent prompts, then a window of answers for all kinds, and one for each kind. A
# window has how many answers it holds, where the next one goes, the answers by length, and the answers in their order.
# From BY_GROWTH of the engine on: for each growth from 0 to all blocks what those hold who will grow by so many, and
# then how many they are.
FIRST_WINDOW = np.int64(RECENT_PROMPTS)
ANSWERS = np.int64(WINDOW)
COUNT, FOLLOWING, BY_LENGTH, BY_ORDER, WINDOW_SIZE = (
    np.int64(number) for number in (0, 1, 2, 2 + WINDOW, 2 + 2 * WINDOW)
)

# Rows of G: the first of a line, what they cost, and who is chosen.
LINE, TOKENS_OF, BLOCKS_OF, CHOSEN, NUM_G = _numbers(5)

# Rows of `ranks`.
RUN_S, DEADLINE, KEPT, WHO, NUM_RANKS = _numbers(5)

# The last axis of `left`, one entry per chunk and then one per request: its neighbours in the line of leftovers, its
# blocks (NONE for one that is not in line), and the references on a chunk (NONE for one that is not cached).
BEFORE, AFTER, SIZE, REFS = _numbers(4)

CHUNKED, WHOLE, PREFILL_FIRST, OURS_PREFILL, OURS_DECODE = _numbers(5)
DECODE_ONLY = np.int64(2)

# Columns of a regime in the table of latencies.
UP_TO, CONSTANT, PER_TOKEN, PER_AREA, PER_PREFILL, PER_DECODE, PER_CONTEXT, NUM_REGIME = _numbers(8)

# The second axis of the table of latencies.
OF_PREFILL, OF_DECODE, OF_MIXED = _numbers(3)

NONE: Final = np.int64(-1)
ZERO: Final = np.int64(0)
