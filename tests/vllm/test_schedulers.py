"""Our schedulers over vLLM's real one, on emulated engines whose tokens prove the KV: what is computed when, and that
it changes no answer and leaves no block behind."""

from __future__ import annotations

import random
import socket
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("vllm")

from vllm.sampling_params import SamplingParams

from tests.vllm.emulated import Answer, Engine, Requests, Split, emulated
from vllm_disagg.core.latency import LatencyModel, Regime, work_of
from vllm_disagg.core.scheduling.hints import PRIORITY, TPOT, TTFT
from vllm_disagg.core.types import new_transfer_id
from vllm_disagg.scheduler.decode import FLOOR_TOKENS

pytestmark = pytest.mark.vllm

BLOCK_SIZE = 16
STEP_S = 0.02
"""What a step takes where KV has to come while streams run, which otherwise could end before."""
LATENCY = LatencyModel(
    prefill=(Regime(constant_s=0.01, per_token_s=1e-4),),
    decode=(Regime(constant_s=0.01, per_decode_s=1e-5, per_context_s=1e-7),),
)
"""What the schedulers under test believe: 10 ms and 0.1 ms for each token of a prompt."""


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def greedy(max_tokens: int, **hints: Any) -> SamplingParams:
    return SamplingParams(temperature=0.0, max_tokens=max_tokens, ignore_eos=True, extra_args=hints or None)


def words(length: int, seed: int = 0) -> list[int]:
    rng = random.Random(1000 * seed + length)
    return [rng.randrange(4200, 28000) for _ in range(length)]


@pytest.fixture
def whole() -> Iterator[Engine]:
    """The undivided engine with vLLM's own scheduler."""
    engine = emulated("--emulate-output-tokens", "20")
    yield engine
    engine.settle()
    engine.stop()


@pytest.fixture
def split(tmp_path: Path) -> Iterator[Callable[..., Split]]:
    """Makes pairs; at the end they are at rest and their pools as full as at the beginning."""
    made: list[tuple[Split, list[int]]] = []

    def make(
        *flags: str,
        prefill_flags: tuple[str, ...] = (),
        decode_flags: tuple[str, ...] = (),
        asynchronous: bool = False,
    ) -> Split:
        folder = tmp_path / str(len(made))
        folder.mkdir()
        pair = Split(
            folder, free_port(), ["--emulate-output-tokens", "20", *flags], decode_flags, prefill_flags,
            asynchronous=asynchronous,
        )  # fmt: skip
        for engine in (pair.prefill, pair.decode):
            engine.scheduler.connector.scheduler_stats.reset = lambda: None  # `statistics` counts from the start
        made.append((pair, [free_blocks(pair.prefill), free_blocks(pair.decode)]))
        return pair

    yield make
    for pair, at_first in made:
        pair.settle()
        assert [free_blocks(pair.prefill), free_blocks(pair.decode)] == at_first
        assert pair.prefill.scheduler.facts == {} == pair.decode.scheduler.facts
        pair.stop()


def free_blocks(engine: Engine) -> int:
    return int(engine.scheduler.kv_cache_manager.block_pool.get_num_free_blocks())


def believe(engine: Engine, latency: LatencyModel = LATENCY) -> None:
    """Steps of engines that do not wait say nothing about time: fix what the scheduler knows."""
    measure = engine.scheduler.measure
    measure.done = lambda *args, **kwargs: None
    measure.latency, measure._times._profile = latency, latency


def statistics(engine: Engine) -> dict[str, Any]:
    return dict(engine.scheduler.connector.scheduler_stats.data)


def prompt_for_prefill(engine: Engine, tokens: list[int], **hints: Any) -> str:
    return engine.add(tokens, greedy(1, **hints))  # without a transfer: nothing is held


def order_of(engine: Engine, names: list[str]) -> list[int]:
    """In which order these requests had their first step, by their places."""
    first: dict[str, None] = {}
    for decision in engine.decisions:
        first.update((name, None) for name, _ in decision.new)
    return [names.index(name) for name in first if name in names]


# Prefill.


def test_whole_prompts_are_packed_up_to_l_m(split: Callable[..., Split]) -> None:
    pair = split("--no-enable-prefix-caching", prefill_flags=("--kv-batch-tokens", "128"))
    rng = random.Random(3)
    lengths = [rng.choice([5, 17, 60, 90, 128, 200, 300]) for _ in range(40)]
    names = [prompt_for_prefill(pair.prefill, words(length, seed)) for seed, length in enumerate(lengths)]
    pair.prefill.run(names)

    steps = [decision.tokens for decision in pair.prefill.decisions if decision.tokens]
    assert sorted(count for step in steps for _, count in step) == sorted(lengths)  # none is cut
    for step in steps:
        assert sum(count for _, count in step) <= 128 or len(step) == 1
    assert len(steps) <= 1.25 * sum(max(128, length) if length > 128 else length for length in lengths) / 128
    begun = {name: number for number, step in enumerate(steps) for name, _ in step}
    assert all(begun[name] <= place for place, name in enumerate(names))  # the k-th runs within k steps


def test_a_prompt_beyond_the_engines_limit_is_cut_and_blocks_nobody(split: Callable[..., Split]) -> None:
    pair = split(prefill_flags=("--kv-batch-tokens", "64", "--max-num-batched-tokens", "96"))
    names = [prompt_for_prefill(pair.prefill, words(length, length)) for length in (400, 50, 30, 20)]

    pair.prefill.run(names)

    assert max(sum(count for _, count in decision.tokens) for decision in pair.prefill.decisions) <= 96


@pytest.mark.parametrize(("policy", "expected"), [("fcfs", [0, 1, 2, 3]), ("sjf", [1, 3, 2, 0]), ("edf", [3, 2, 1, 0])])
def test_prompts_go_in_the_order_that_was_chosen(split: Callable[..., Split], policy: str, expected: list[int]) -> None:
    pair = split(prefill_flags=("--kv-prefill-order", policy, "--kv-batch-tokens", "16"))
    believe(pair.prefill)
    lengths, due_ms = (300, 20, 100, 50), (90_000, 60_000, 30_000, 10_000)
    names = [
        prompt_for_prefill(pair.prefill, words(length, 1), **{TTFT: due})
        for length, due in zip(lengths, due_ms, strict=True)
    ]
    pair.prefill.run(names)

    assert order_of(pair.prefill, names) == expected


def test_priority_goes_first_and_patience_before_priority(split: Callable[..., Split]) -> None:
    pair = split(prefill_flags=("--kv-batch-tokens", "16", "--kv-patience-s", "50"))
    names = [prompt_for_prefill(pair.prefill, words(40 + place, 1), **{PRIORITY: -place}) for place in range(4)]
    pair.prefill.scheduler.facts[names[1]].arrived_s -= 60

    pair.prefill.run(names)

    assert order_of(pair.prefill, names) == [1, 3, 2, 0]


def test_steps_of_a_pipeline_are_of_equal_size(split: Callable[..., Split], whole: Engine) -> None:
    """A stage waits for the longest step around it: 450 waiting tokens become four steps, not three full ones and a
    rest."""
    pair = split("--no-enable-prefix-caching", prefill_flags=("--kv-batch-tokens", "128", *TWO_STAGES))
    prompts = [words(15, seed) for seed in range(30)]
    names = [pair.prefill.add(tokens, greedy(1)) for tokens in prompts]
    answers = pair.prefill.run(names)

    steps = [sum(count for _, count in decision.tokens) for decision in pair.prefill.decisions if decision.tokens]
    assert len(steps) == 4
    assert max(steps) - min(steps) <= 15
    right = whole.run([whole.add(tokens, greedy(1)) for tokens in prompts])
    assert [answer.words for answer in answers] == [answer.words for answer in right]


@pytest.mark.parametrize(
    "scheduler",
    [(), ("--kv-scheduling", "vllm"), ("--scheduling-policy", "priority")],
    ids=["phase", "vllm", "priority"],
)
def test_prefill_stops_to_admit_while_it_holds_its_share(
    split: Callable[..., Split], scheduler: tuple[str, ...]
) -> None:
    flags = ("--num-gpu-blocks-override", "64", "--max-model-len", "400", "--max-num-batched-tokens", "160", *scheduler)
    pair = split(prefill_flags=(*flags, "--kv-held-share", "0.5", "--kv-batch-tokens", "160"))
    prompts = [words(160, seed) for seed in range(6)]  # ten blocks each: after the fourth 40 of 63 are held
    ids = [new_transfer_id() for _ in prompts]
    names = [
        pair.prefill.add(
            tokens, greedy(1), kv_params={"do_remote_decode": True, "do_remote_prefill": False, "transfer_id": number}
        )
        for tokens, number in zip(prompts, ids, strict=True)
    ]
    answers = pair.prefill.run(names[:4])
    for _ in range(50):
        pair.prefill.step()
    assert all(pair.prefill.status(name) == "WAITING" for name in names[4:])
    told = statistics(pair.prefill)
    assert told["vllm_disagg_sched_waiting_seconds_total{held_kv}"] > 0
    assert told["vllm_disagg_sched_admission_pauses_total"] == 1

    def fetch(answer: Answer, tokens: list[int], number: str) -> str:
        assert answer.kv_transfer_params is not None
        params = {"do_remote_prefill": True, "transfer_id": number, "handoff": answer.kv_transfer_params["handoff"]}
        return pair.decode.add(tokens, greedy(2), kv_params=params)

    pair.decode.run([fetch(*item) for item in zip(answers, prompts, ids, strict=False)])
    answers = pair.prefill.run(names[4:])  # what decode has fetched is held no more
    pair.decode.run([fetch(*item) for item in zip(answers, prompts[4:], ids[4:], strict=True)])


def test_a_prefill_instance_serves_whole_requests_too(split: Callable[..., Split], whole: Engine) -> None:
    pair = split(prefill_flags=("--kv-batch-tokens", "64"))
    prompts = [words(length, 9) for length in (10, 70, 33, 150, 64, 8)]
    names = [pair.prefill.add(tokens, greedy(12)) for tokens in prompts]

    right = whole.run([whole.add(tokens, greedy(12)) for tokens in prompts])

    assert [answer.words for answer in pair.prefill.run(names)] == [answer.words for answer in right]


# Decode.


def test_streams_go_on_while_prompts_are_computed_within_the_budget(split: Callable[..., Split]) -> None:
    pair = split("--no-enable-prefix-caching", decode_flags=("--kv-slo-tpot-s", "0.03"))
    believe(pair.decode)
    streams = [pair.decode.add(words(50, seed), greedy(80)) for seed in range(6)]
    pair.decode.run_until(lambda: all(pair.decode.answers[name].tokens for name in streams))
    before = len(pair.decode.decisions)
    prompts = [pair.decode.add(words(900, seed), greedy(2)) for seed in range(2)]
    pair.decode.run(prompts)

    steps = [dict(decision.tokens) for decision in pair.decode.decisions[before:] if decision.tokens]
    beside = [step for step in steps if any(count > 1 for count in step.values())]
    assert len(beside) >= 1800 / 200
    for step in beside:
        assert set(streams) <= step.keys()  # nobody waits
        tokens = sum(count for count in step.values() if count > 1)
        work = work_of([(0, tokens), *[(150, 1)] * len(streams)])
        assert tokens <= FLOOR_TOKENS or LATENCY.step_s(work) <= 0.03
    assert max(sum(count for count in step.values() if count > 1) for step in beside) > 150  # nor is it given away


def test_a_streams_own_target_binds_the_step(split: Callable[..., Split]) -> None:
    pair = split("--no-enable-prefix-caching", decode_flags=("--kv-slo-tpot-s", "1.0"))
    believe(pair.decode)
    stream = pair.decode.add(words(50), greedy(60, **{TPOT: 25}))
    pair.decode.run_until(lambda: bool(pair.decode.answers[stream].tokens))
    before = len(pair.decode.decisions)
    pair.decode.run([pair.decode.add(words(700), greedy(1))])

    most = max(count for decision in pair.decode.decisions[before:] for _, count in decision.tokens)
    assert 100 < most <= 150


def test_kv_is_fetched_while_all_run_slots_are_taken(split: Callable[..., Split], whole: Engine) -> None:
    pair = split(decode_flags=("--max-num-seqs", "2", "--no-kv-early-reads"))
    prompts = [words(60 + 7 * seed, seed) for seed in range(8)]
    wishes = [*[greedy(100)] * 2, *[greedy(40)] * 6]
    names = pair.hand_over(prompts[:2], wishes[:2])
    pair.decode.run_until(lambda: all(pair.decode.status(name) == "RUNNING" for name in names), "both slots taken")
    names += pair.hand_over(prompts[2:], wishes[2:])
    holds = pair.prefill.scheduler.connector._prefill._holds
    pair.decode.run_until(lambda: holds.usage()[0] == 0, "all KV fetched", step_s=STEP_S)

    assert sum(pair.decode.status(name) == "RUNNING" for name in names) <= 2
    assert not any(pair.decode.answers[name].finish_reason for name in names[2:])
    answers = pair.decode.run(names)
    assert statistics(pair.decode)["vllm_disagg_sched_fetched_ahead_total"] >= 5
    assert max(len(decision.tokens) for decision in pair.decode.decisions) == 2
    right = whole.run([whole.add(*item) for item in zip(prompts, wishes, strict=True)])
    assert [answer.words for answer in answers] == [answer.words for answer in right]


@pytest.mark.parametrize("scheduling", ["phase", "vllm"])
def test_streams_alone_are_left_to_vllm(
    split: Callable[..., Split], scheduling: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It asks two of its methods about each stream in each step, so that whatever ours took would be taken as often."""
    pair = split(decode_flags=("--max-num-seqs", "2", "--kv-scheduling", scheduling))
    names = [pair.decode.add(words(60, seed), greedy(30)) for seed in range(3)]  # the third one has no slot
    pair.decode.run_until(lambda: all(pair.decode.answers[name].tokens for name in names[:2]), "two streams")
    asked: list[str] = []
    for method in ("_allocate", "_within_budget"):
        monkeypatch.setattr(pair.decode.scheduler, method, lambda *args, method=method, **kwargs: asked.append(method))
    for _ in range(10):
        pair.decode.step()
    monkeypatch.undo()

    assert not asked
    assert not pair.decode.scheduler._without_token
    assert all(len(answer.tokens) == 30 for answer in pair.decode.run(names))


TWO_STAGES = ("--pipeline-parallel-size", "2")
SMALL = ("--num-gpu-blocks-override", "61", "--max-model-len", "400", "--no-enable-prefix-caching")


def preempted_tokens(split: Callable[..., Split], scheduling: str) -> int:
    """Many answers of 60 tokens through a small cache, some of them known already."""
    pair = split(decode_flags=(*SMALL, "--kv-scheduling", scheduling, "--no-kv-back-pressure"))
    wishes = [greedy(60)] * 20
    pair.answers([words(33, seed) for seed in range(20)], wishes)
    pair.answers([words(33, 50 + seed) for seed in range(20)], wishes)
    return int(statistics(pair.decode).get("vllm_disagg_sched_preempted_tokens_total", 0))


def test_who_is_admitted_has_room_to_grow(split: Callable[..., Split]) -> None:
    stock, ours = preempted_tokens(split, "vllm"), preempted_tokens(split, "phase")

    assert stock > 500
    assert ours * 5 <= stock


@pytest.mark.parametrize("scheduling", ["phase", "vllm"])
@pytest.mark.parametrize("early", ["--kv-early-reads", "--no-kv-early-reads"])
def test_kv_is_fetched_only_with_room_for_the_prompt_and_its_growth(
    split: Callable[..., Split], whole: Engine, scheduling: str, early: str
) -> None:
    """60 blocks: three prompts of 10 blocks that grow by 10 each fit, a fourth prompt would fit for now. When one of
    the three has ended any three fit, at whatever steps they began."""
    pair = split(decode_flags=(*SMALL, "--kv-scheduling", scheduling, early))
    scheduler, holds = pair.decode.scheduler, pair.prefill.scheduler.connector._prefill._holds
    prompts, wishes = [words(150, seed) for seed in range(4)], [greedy(160)] * 4
    scheduler._lengths.remaining = lambda kind, *, quantile, generated, most: most - generated  # each uses all it may
    names = pair.hand_over(prompts[:1], wishes[:1])
    pair.decode.run_until(lambda: pair.decode.status(names[0]) == "RUNNING", "a stream, and with it a reserve")
    names += pair.hand_over(prompts[1:], wishes[1:])
    pair.decode.run_until(lambda: holds.usage()[0] == 1, "the second and third one", step_s=STEP_S)
    for _ in range(2):
        pair.decode.step()
    told = statistics(pair.decode)

    assert [pair.decode.status(name) for name in names[3:]] == ["WAITING"]
    assert told["vllm_disagg_sched_without_room_requests"] == 1
    assert told["vllm_disagg_sched_without_room_tokens"] == 150
    answers = pair.decode.run(names)
    told = statistics(pair.decode)
    assert told.get("vllm_disagg_sched_preempted_tokens_total", 0) == 0
    assert told["vllm_disagg_sched_waiting_seconds_total{kv_growth}"] > 0
    assert told["vllm_disagg_sched_without_room_requests"] == told["vllm_disagg_sched_without_room_tokens"] == 0
    right = whole.run([whole.add(*item) for item in zip(prompts, wishes, strict=True)])
    assert [answer.words for answer in answers] == [answer.words for answer in right]


def test_a_plan_that_fails_costs_nothing_but_its_order(split: Callable[..., Split], whole: Engine) -> None:
    pair = split()

    def broken(*_: Any) -> Any:
        raise RuntimeError("broken")

    pair.prefill.scheduler.plan = pair.decode.scheduler.plan = broken
    prompts, wishes = [words(40 + seed, seed) for seed in range(5)], [greedy(5)] * 5
    answers = pair.answers(prompts, wishes)

    right = whole.run([whole.add(*item) for item in zip(prompts, wishes, strict=True)])
    assert [answer.words for answer in answers] == [answer.words for answer in right]
    assert statistics(pair.decode)["vllm_disagg_sched_plan_failures_total"] > 0


def test_bad_hints_are_counted_and_cost_nothing(split: Callable[..., Split]) -> None:
    pair = split()
    (answer,) = pair.decode.run([pair.decode.add(words(20), greedy(3, **{TTFT: "soon", TPOT: -1, "other": 5}))])

    assert len(answer.tokens) == 3
    found = statistics(pair.decode)
    assert found["vllm_disagg_sched_hints_total{ignored}"] == found["vllm_disagg_sched_hints_total{clamped}"] == 1


def test_steps_are_logged_as_the_profiler_reads_them(split: Callable[..., Split], tmp_path: Path) -> None:
    from vllm_disagg.core.steps import read_steps

    log = tmp_path / "steps.jsonl"
    pair = split(decode_flags=("--kv-step-log", str(log)))
    pair.decode.run([pair.decode.add(words(50), greedy(5))])

    steps = read_steps(log)
    assert [step.requests for step in steps] == [((0, 50),), *[((50 + n, 1),) for n in range(4)]]
    assert all(step.step_s > 0 for step in steps)


# Clients that leave, in every state that a plan knows, and memory that ends.


Asked = dict[str, tuple[list[int], SamplingParams]]


@dataclass
class Scene:
    """Engines at some moment: the one in question, the request whose client leaves, and what everybody has asked."""

    pair: Split
    engine: Engine
    leaves: str
    asked: Asked


State = Callable[[Callable[..., Split], bool], Scene]


def add(engine: Engine, *items: tuple[list[int], SamplingParams]) -> Asked:
    return {engine.add(*item): item for item in items}


def hand_over(pair: Split, *items: tuple[list[int], SamplingParams]) -> Asked:
    names = pair.hand_over([tokens for tokens, _ in items], [wish for _, wish in items])
    return dict(zip(names, items, strict=True))


def beside_a_stream(split: Callable[..., Split], asynchronous: bool) -> tuple[Split, Asked]:
    """A stream, and two prompts of which a step may only have 64 tokens beside it."""
    pair = split("--no-enable-prefix-caching", decode_flags=("--kv-slo-tpot-s", "0.001"), asynchronous=asynchronous)
    believe(pair.decode)
    stream = add(pair.decode, (words(50), greedy(60)))
    pair.decode.run_until(lambda: all(pair.decode.answers[name].tokens for name in stream))
    prompts = add(pair.decode, (words(300, 1), greedy(9)), (words(300, 2), greedy(9)))
    first = next(iter(prompts))
    pair.decode.run_until(lambda: 0 < pair.decode.scheduler.requests[first].num_computed_tokens < 200)
    return pair, {**stream, **prompts}


def kept_from_a_streams_pace(split: Callable[..., Split], asynchronous: bool) -> Scene:
    pair, names = beside_a_stream(split, asynchronous)
    leaves = list(names)[2]
    assert pair.decode.status(leaves) == "WAITING"
    return Scene(pair, pair.decode, leaves, names)


def with_a_part_of_its_prompt(split: Callable[..., Split], asynchronous: bool) -> Scene:
    pair, names = beside_a_stream(split, asynchronous)
    leaves = list(names)[1]
    assert pair.decode.status(leaves) == "RUNNING"
    return Scene(pair, pair.decode, leaves, names)


def generating(split: Callable[..., Split], asynchronous: bool) -> Scene:
    pair, names = beside_a_stream(split, asynchronous)
    leaves = next(iter(names))
    assert pair.decode.status(leaves) == "RUNNING"
    assert bool(pair.decode.core.batch_queue) == asynchronous  # then one of its steps is under way
    return Scene(pair, pair.decode, leaves, names)


def without_room_to_grow(split: Callable[..., Split], asynchronous: bool) -> Scene:
    pair = split(decode_flags=SMALL, asynchronous=asynchronous)
    names = add(pair.decode, *((words(40, seed), greedy(200)) for seed in range(5)))
    pair.decode.run_until(lambda: "vllm_disagg_sched_waiting_seconds_total{kv_growth}" in statistics(pair.decode))
    leaves = next(name for name in names if pair.decode.status(name) == "WAITING")
    return Scene(pair, pair.decode, leaves, names)


def parked(split: Callable[..., Split], asynchronous: bool) -> Scene:
    pair = split(decode_flags=("--no-kv-early-reads",), asynchronous=asynchronous)
    names = hand_over(pair, *((words(60 + seed, seed), greedy(9)) for seed in range(3)))
    leaves = next(iter(names))
    pair.decode.run_until(lambda: pair.decode.status(leaves) == "WAITING_FOR_REMOTE_KVS", "parked")
    return Scene(pair, pair.decode, leaves, names)


def fetched_and_without_a_slot(split: Callable[..., Split], asynchronous: bool) -> Scene:
    pair = split(decode_flags=("--max-num-seqs", "2", "--no-kv-early-reads"), asynchronous=asynchronous)
    streams = add(pair.decode, *((words(50, seed), greedy(60)) for seed in range(2)))
    pair.decode.run_until(lambda: all(pair.decode.answers[name].tokens for name in streams))
    fetched = hand_over(pair, *((words(60 + seed, seed), greedy(9)) for seed in range(2)))
    leaves = next(iter(fetched))
    fetched_ids = pair.decode.scheduler.finished_recving_kv_req_ids
    pair.decode.run_until(lambda: leaves in fetched_ids, "KV without a slot", step_s=STEP_S)
    assert leaves not in {request.request_id for request in pair.decode.scheduler.running}
    return Scene(pair, pair.decode, leaves, {**streams, **fetched})


def out_of_memory(split: Callable[..., Split], asynchronous: bool, wanted: Callable[[Any], bool]) -> Scene:
    """A cache for half of what is admitted, since past answers of this kind were much shorter."""
    pair = split(decode_flags=(*SMALL, "--kv-slo-tpot-s", "0.001"), asynchronous=asynchronous)
    believe(pair.decode)
    for _ in range(32):
        pair.decode.scheduler._lengths.add((None, 6), 2)
    names = add(pair.decode, *((words(130, seed), greedy(33 if seed < 2 else 63)) for seed in range(6)))

    def found() -> list[str]:
        return [name for name, request in pair.decode.scheduler.requests.items() if wanted(request)]

    pair.decode.run_until(lambda: bool(found()))
    leaves = found()[0]
    return Scene(pair, pair.decode, leaves, names)


def preempted(split: Callable[..., Split], asynchronous: bool) -> Scene:
    return out_of_memory(split, asynchronous, lambda request: request.status.name == "PREEMPTED")


def computing_again(split: Callable[..., Split], asynchronous: bool) -> Scene:
    return out_of_memory(
        split,
        asynchronous,
        lambda request: (
            request.status.name == "RUNNING"
            and request.num_preemptions
            and 0 < request.num_computed_tokens < request.num_prompt_tokens
        ),
    )


def behind_l_m(split: Callable[..., Split], asynchronous: bool) -> Scene:
    pair = split(prefill_flags=("--kv-batch-tokens", "64"), asynchronous=asynchronous)
    names = add(pair.prefill, *((words(60 + seed, seed), greedy(1)) for seed in range(5)))
    pair.prefill.step()
    leaves = list(names)[3]
    assert pair.prefill.status(leaves) == "WAITING"
    return Scene(pair, pair.prefill, leaves, names)


def behind_held_kv(split: Callable[..., Split], asynchronous: bool) -> Scene:
    flags = ("--num-gpu-blocks-override", "64", "--max-model-len", "400", "--kv-held-share", "0.5")
    pair = split(prefill_flags=flags, asynchronous=asynchronous)
    fetched = hand_over(pair, *((words(160, seed), greedy(5)) for seed in range(4)))  # holds 40 of 63 blocks
    leaves, other = (pair.prefill.add(words(50, seed), greedy(1)) for seed in range(2))
    for _ in range(20):
        pair.prefill.step()
    assert pair.prefill.status(leaves) == pair.prefill.status(other) == "WAITING"
    pair.prefill.core.abort_requests([other])
    return Scene(pair, pair.prefill, leaves, fetched)


def cut_by_the_engines_limit(split: Callable[..., Split], asynchronous: bool) -> Scene:
    pair = split(prefill_flags=("--max-num-batched-tokens", "96"), asynchronous=asynchronous)
    names = add(pair.prefill, *((words(length), greedy(1)) for length in (390, 40, 50)))
    leaves = next(iter(names))
    pair.prefill.run_until(lambda: 0 < pair.prefill.scheduler.requests[leaves].num_computed_tokens < 300)
    return Scene(pair, pair.prefill, leaves, names)


def standing_in_for_decode(split: Callable[..., Split], asynchronous: bool) -> Scene:
    pair = split(prefill_flags=("--kv-batch-tokens", "64"), asynchronous=asynchronous)
    names = add(pair.prefill, *((words(50, seed), greedy(30)) for seed in range(3)))
    leaves = next(iter(names))
    pair.prefill.run_until(lambda: len(pair.prefill.answers[leaves].tokens) > 3)
    return Scene(pair, pair.prefill, leaves, names)


@pytest.mark.parametrize("asynchronous", [False, True], ids=["sync", "async"])
@pytest.mark.parametrize(
    "state",
    [
        kept_from_a_streams_pace, with_a_part_of_its_prompt, generating, without_room_to_grow, parked,
        fetched_and_without_a_slot, preempted, computing_again, behind_l_m, behind_held_kv, cut_by_the_engines_limit,
        standing_in_for_decode,
    ],
    ids=lambda state: state.__name__,
)  # fmt: skip
def test_a_client_may_leave_in_every_state(
    split: Callable[..., Split], whole: Engine, state: State, asynchronous: bool
) -> None:
    scene = state(split, asynchronous)
    scene.engine.core.abort_requests([scene.leaves])
    before = len(scene.engine.answers[scene.leaves].tokens)
    others = {name: item for name, item in scene.asked.items() if name != scene.leaves}
    serving = scene.pair.prefill if next(iter(others)) in scene.pair.prefill.answers else scene.pair.decode
    answers = serving.run(list(others))

    assert len(scene.engine.answers[scene.leaves].tokens) == before
    right = whole.run([whole.add(*item) for item in others.values()])
    assert [answer.words for answer in answers] == [answer.words for answer in right]


@pytest.mark.parametrize("asynchronous", [False, True], ids=["sync", "async"])
def test_who_loses_its_memory_is_computed_again_within_the_budget(
    split: Callable[..., Split], whole: Engine, asynchronous: bool
) -> None:
    scene = preempted(split, asynchronous)
    before = len(scene.engine.decisions)
    answers = scene.engine.run(list(scene.asked))

    again = [decision for decision in scene.engine.decisions[before:] if decision.resumed]
    assert again
    for decision in scene.engine.decisions[before:]:
        counts = [count for _, count in decision.tokens]
        if 1 in counts:  # beside streams a step computes no more than this of prompts
            assert sum(count for count in counts if count > 1) <= FLOOR_TOKENS
    assert statistics(scene.engine)["vllm_disagg_sched_preempted_tokens_total"] > 0
    right = whole.run([whole.add(*item) for item in scene.asked.values()])
    assert [answer.words for answer in answers] == [answer.words for answer in right]


# Random interleavings.


def interleave(pair: Split, whole: Engine, count: int, seed: int) -> list[str]:
    """Requests of all kinds arrive, are handed over, computed on decode or on prefill alone, and aborted on either, in
    random order. Returns what differed from the undivided engine's answers."""
    rng, requests = random.Random(seed), Requests(seed)
    wanted: dict[str, tuple[Engine, list[int], SamplingParams]] = {}
    on_prefill: dict[str, tuple[list[int], SamplingParams, str]] = {}
    gone: set[str] = set()
    left, deadline_s = count, time.monotonic() + 60

    def is_open(name: str) -> bool:
        return wanted[name][0].answers[name].finish_reason is None and name not in gone

    while left or on_prefill or any(is_open(name) for name in wanted):
        assert time.monotonic() < deadline_s, "it stands still"
        action = rng.random()
        if action < 0.3 and left:
            left -= 1
            tokens, wish = requests.prompt(), requests.sampling()
            wish.extra_args = {TTFT: rng.choice([1, 50, 5000]), TPOT: rng.choice([1, 50]), PRIORITY: rng.randint(-1, 1)}
            if requests.is_local():
                engine = rng.choice([pair.decode, pair.prefill])
                wanted[engine.add(tokens, wish)] = (engine, tokens, wish)
            else:
                number = new_transfer_id()
                params = {"do_remote_decode": True, "do_remote_prefill": False, "transfer_id": number}
                on_prefill[pair.prefill.add(tokens, greedy(1), kv_params=params)] = (tokens, wish, number)
        elif action < 0.33 and wanted:
            name = rng.choice(sorted(wanted))
            if is_open(name):
                gone.add(name)
                wanted[name][0].core.abort_requests([name])
        elif action < 0.34 and on_prefill:
            name = rng.choice(sorted(on_prefill))
            pair.prefill.core.abort_requests([name])
            del on_prefill[name]
        else:
            (pair.prefill if rng.random() < 0.5 else pair.decode).step()
        for name in [name for name in on_prefill if pair.prefill.answers[name].finish_reason]:
            tokens, wish, number = on_prefill.pop(name)
            given = pair.prefill.answers[name].kv_transfer_params
            assert given is not None
            params = {"do_remote_prefill": True, "transfer_id": number, "handoff": given["handoff"]}
            wanted[pair.decode.add(tokens, wish, kv_params=params)] = (pair.decode, tokens, wish)
    found = []
    right = whole.run([whole.add(tokens, wish) for _, tokens, wish in wanted.values()])
    for (name, (engine, tokens, wish)), expected in zip(wanted.items(), right, strict=True):
        answer = engine.answers[name]
        same = (
            expected.tokens[: len(answer.tokens)] == answer.tokens if name in gone else answer.words == expected.words
        )
        if not same:
            found.append(f"seed {seed} {tokens} {wish}: {answer.words} instead of {expected.words}")
    return found


def deployment(seed: int) -> dict[str, Any]:
    """Engines of all kinds: every order, synchronous and asynchronous, small caches, few slots, small steps."""
    rng = random.Random(seed)
    return {
        "asynchronous": seed % 2 == 1,
        "prefill_flags": (
            "--kv-prefill-order", ("fcfs", "sjf", "edf")[seed % 3],
            "--kv-batch-tokens", str(rng.choice([0, 48, 200])),
            "--kv-patience-s", str(rng.choice([0.01, 30.0])), "--num-gpu-blocks-override", str(rng.choice([60, 200])),
            "--max-model-len", "400", "--kv-held-share", str(rng.choice([0.4, 0.9])),
        ),
        "decode_flags": (
            "--num-gpu-blocks-override", str(rng.choice([56, 100, 300])), "--max-model-len", "400",
            "--max-num-seqs", str(rng.choice([3, 8, 64])), "--kv-slo-tpot-s", str(rng.choice([0.001, 0.1])),
            *rng.choice([(), ("--max-num-batched-tokens", "96")]), *rng.choice([(), ("--no-kv-early-reads",)]),
        ),
    }  # fmt: skip


@pytest.mark.parametrize("seed", range(6))
def test_random_interleavings_change_no_answer(split: Callable[..., Split], whole: Engine, seed: int) -> None:
    assert interleave(split(**deployment(seed)), whole, 60, seed) == []


@pytest.mark.full
@pytest.mark.parametrize("quarter", range(4))
def test_a_hundred_interleavings_of_two_hundred_requests(
    split: Callable[..., Split], whole: Engine, quarter: int
) -> None:
    found, preempted, begun_s = [], [0, 0], time.monotonic()
    for kind in range(5 * quarter, 5 * quarter + 5):
        made = deployment(kind)
        pair = split(**made)
        at_first = [free_blocks(pair.prefill), free_blocks(pair.decode)]
        for seed in range(5):
            found += interleave(pair, whole, 200, 100 * kind + seed)
            pair.settle()
            assert [free_blocks(pair.prefill), free_blocks(pair.decode)] == at_first
        preempted[made["asynchronous"]] += sum(len(decision.preempted) for decision in pair.decode.decisions)
    print(
        f"\n25 interleavings of 200 requests on 5 pairs of engines, preemptions: {preempted[0]} synchronous, "
        f"{preempted[1]} asynchronous; {len(found)} answers differ from stock vLLM's; "
        f"{time.monotonic() - begun_s:.0f} s"
    )
    assert found == []
    assert sum(preempted) > 0
