"""What an undivided emulated engine answers, in every parallelism, under preemption and with every kind of request."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("vllm")

from vllm.sampling_params import SamplingParams, StructuredOutputsParams

from tests.vllm.emulated import Answer, Engine, Requests, emulated, tiny_llama_profile
from vllm_disagg.core.latency import work_of
from vllm_disagg.demo.model import tiny_llama_path
from vllm_disagg.emulation.clock import DeviceClock
from vllm_disagg.emulation.executor import EmulatedExecutor, LazyFuture
from vllm_disagg.emulation.settings import FAULTS_ENV
from vllm_disagg.profiles import load_profile

pytestmark = pytest.mark.vllm

PROMPT = list(range(5000, 5040))
GREEDY = SamplingParams(temperature=0.0, max_tokens=8, ignore_eos=True)
PARALLEL = ("--tensor-parallel-size", "2", "--pipeline-parallel-size", "2")
SMALL = ("--num-gpu-blocks-override", "40", "--max-model-len", "400")

Start = Callable[..., Engine]


@pytest.fixture
def start() -> Iterator[Start]:
    """Starts undivided engines; at the end each must be as empty as it began."""
    engines = []

    def build(*flags: str, **options: Any) -> Engine:
        engines.append(emulated(*flags, **options))
        return engines[-1]

    yield build
    for engine in engines:
        engine.settle()
        engine.stop()
        pool = engine.scheduler.kv_cache_manager.block_pool
        assert pool.get_num_free_blocks() == pool.num_gpu_blocks - 1


def run_all(engine: Engine, seed: int, count: int) -> list[Answer]:
    """Requests of all kinds, all at once."""
    requests = Requests(seed)
    wanted = [(requests.prompt(), requests.sampling()) for _ in range(count)]
    return engine.run([engine.add(*request) for request in wanted])


@pytest.mark.parametrize(("tp", "pp"), [(2, 1), (1, 2), (2, 2), (4, 2)])
@pytest.mark.parametrize("flags", [(), ("--max-num-batched-tokens", "80"), SMALL], ids=["", "chunked", "small"])
def test_every_parallelism_answers_the_same(start: Start, tp: int, pp: int, flags: tuple[str, ...]) -> None:
    whole = start()
    engine = start("--tensor-parallel-size", str(tp), "--pipeline-parallel-size", str(pp), *flags)

    answers, expected = run_all(engine, 3, 60), run_all(whole, 3, 60)

    assert [answer.words for answer in answers] == [answer.words for answer in expected]
    assert (engine.core.batch_queue is not None) == (pp > 1)
    assert any(decision.preempted for decision in engine.decisions) == (flags == SMALL)


def test_stages_run_different_steps_at_once(start: Start) -> None:
    engine = start("--pipeline-parallel-size", "2", "--max-num-seqs", "2")
    for _ in range(4):
        engine.add(PROMPT, GREEDY)

    engine.step()
    engine.step()

    assert len(engine.core.batch_queue) == 1
    assert [len(decision.tokens) for decision in engine.decisions[:2]] == [2, 0]


@pytest.mark.parametrize("flags", [(), PARALLEL], ids=["", "parallel"])
def test_a_stop_token_ends_the_answer_and_comes_with_it(start: Start, flags: Sequence[str]) -> None:
    engine = start(*flags)
    whole = engine.answer(PROMPT, GREEDY)
    assert (len(whole.tokens), whole.finish_reason) == (8, "length")

    stopped = engine.answer(PROMPT, SamplingParams(temperature=0.0, max_tokens=8, stop_token_ids=[whole.tokens[3]]))

    assert stopped.tokens == whole.tokens[:4]
    assert (stopped.finish_reason, stopped.stop_reason) == ("stop", whole.tokens[3])


def test_answers_end_by_themselves_at_about_the_length_asked_for(start: Start) -> None:
    engine = start("--emulate-output-tokens", "10")
    wish = SamplingParams(temperature=0.0, max_tokens=200)

    answers = engine.run([engine.add([6000 + index, 7000], wish) for index in range(200)])

    assert all(answer.finish_reason == "stop" for answer in answers)
    assert np.mean([len(answer.tokens) for answer in answers]) == pytest.approx(10, abs=2)


# Clients that leave.


@pytest.mark.parametrize("flags", [(), PARALLEL], ids=["", "parallel"])
@pytest.mark.parametrize("steps", [0, 1, 2, 5])
def test_a_client_that_leaves_during_a_step_changes_nothing_for_the_others(
    start: Start, flags: Sequence[str], steps: int
) -> None:
    engine = start(*flags)
    expected = engine.answer(PROMPT, GREEDY)
    staying = engine.add(PROMPT, GREEDY)
    leaving = engine.add(PROMPT[5:], GREEDY)
    for _ in range(steps):
        engine.step()

    engine.core.aborts_queue.put_nowait([leaving])  # as the API server's thread does: seen while the step is under way
    (answer,) = engine.run([staying])

    assert answer.words == expected.words
    assert len(engine.answers[leaving].tokens) < 8
    assert engine.status(leaving) == "gone"


@pytest.mark.parametrize("flags", [(), PARALLEL], ids=["", "parallel"])
def test_the_device_forgets_requests_that_have_ended(start: Start, flags: Sequence[str]) -> None:
    engine = start(*flags)
    gone = engine.add(PROMPT[3:], GREEDY)
    engine.step()
    engine.core.abort_requests([gone])
    engine.answer(PROMPT, GREEDY)

    engine.answer(PROMPT[1:], GREEDY)
    engine.settle()

    assert isinstance(engine.core.model_executor, EmulatedExecutor)
    assert list(engine.core.model_executor._requests) == []


# Structured outputs.

SCHEMA = {
    "type": "object",
    "properties": {"kind": {"enum": ["plan", "note"]}, "done": {"type": "boolean"}},
    "required": ["kind", "done"],
    "additionalProperties": False,
}


@pytest.mark.parametrize("flags", [(), ("--pipeline-parallel-size", "2"), PARALLEL], ids=["", "pp", "parallel"])
def test_a_grammar_is_kept(start: Start, flags: Sequence[str]) -> None:
    engine = start(*flags)
    wanted = {
        "choice": StructuredOutputsParams(choice=["yes", "no", "maybe so"]),
        "json": StructuredOutputsParams(json=SCHEMA),
        "regex": StructuredOutputsParams(regex="[a-c]{3,5}"),
    }
    sampling = [{"temperature": 0.0}, *({"temperature": 1.0, "seed": seed} for seed in range(4))]
    plain = [engine.add(PROMPT, GREEDY) for _ in range(3)]  # in the same batches
    names = {
        (kind, index): engine.add([*PROMPT, index], SamplingParams(max_tokens=80, structured_outputs=params, **wish))
        for (kind, params), (index, wish) in itertools.product(wanted.items(), enumerate(sampling))
    }
    engine.run([*plain, *names.values()])

    tokenizer = engine.inputs.get_tokenizer()
    for (kind, _), name in names.items():
        answer = engine.answers[name]
        text = tokenizer.decode(answer.tokens, skip_special_tokens=True)
        assert answer.finish_reason == "stop"
        if kind == "choice":
            assert text in ("yes", "no", "maybe so")
        elif kind == "json":
            document = json.loads(text)
            assert document.keys() == {"kind", "done"}
            assert document["kind"] in ("plan", "note")
        else:
            assert 3 <= len(text) <= 5
            assert set(text) <= set("abc")
    assert len({tuple(engine.answers[name].tokens) for name in plain}) == 1


def test_a_grammar_gives_the_same_words_in_every_parallelism(start: Start) -> None:
    wish = SamplingParams(
        temperature=1.0, seed=3, max_tokens=80, structured_outputs=StructuredOutputsParams(json=SCHEMA)
    )

    answers = [start(*flags).answer(PROMPT, wish).words for flags in ((), PARALLEL)]

    assert answers[0] == answers[1]


# Log probabilities.


@pytest.mark.parametrize("flags", [(), PARALLEL], ids=["", "parallel"])
@pytest.mark.parametrize("count", [0, 1, 5, 20])
def test_each_token_has_as_many_log_probabilities_as_asked(start: Start, flags: Sequence[str], count: int) -> None:
    engine = start(*flags)
    other = engine.add(PROMPT, SamplingParams(temperature=0.0, max_tokens=8, logprobs=9, ignore_eos=True))

    answer = engine.answer(
        PROMPT[1:], SamplingParams(temperature=1.0, seed=4, max_tokens=8, logprobs=count, ignore_eos=True)
    )

    assert [ids[0] for ids, _, _ in answer.logprobs] == answer.tokens
    for ids, values, rank in answer.logprobs:
        assert len(ids) == len(values) == count + 1
        assert values[1:] == sorted(values[1:], reverse=True)
        assert rank > count or ids[rank] == ids[0]
        assert rank > count or values[rank] == values[0]
    engine.run([other])


@pytest.mark.parametrize("wish", [{"logprobs": -1}, {"prompt_logprobs": -1}, {"logprobs": 1000}])
def test_the_whole_vocabulary_can_be_asked_for(start: Start, wish: dict[str, int]) -> None:
    engine = start("--max-logprobs", "-1")

    answer = engine.answer(PROMPT[:5], SamplingParams(temperature=0.0, max_tokens=2, ignore_eos=True, **wish))

    assert len(answer.tokens) == 2
    if "prompt_logprobs" in wish:
        values = answer.prompt_logprobs[0].logprobs[:, 1:]
        assert values.shape == (4, engine.config.model_config.get_vocab_size())
        assert np.exp(values.numpy()).sum(axis=1) == pytest.approx(1.0, abs=1e-4)


@pytest.mark.parametrize("flags", [(), ("--max-num-batched-tokens", "64"), (*SMALL, *PARALLEL)], ids=["", "2", "3"])
def test_a_prompts_log_probabilities_come_once(start: Start, flags: Sequence[str]) -> None:
    engine, alone = start(*flags), start()
    wish = SamplingParams(temperature=0.0, max_tokens=60, prompt_logprobs=2, ignore_eos=True)
    prompts = [[6000 + index] * (30 + 7 * index) for index in range(12)]

    answers = engine.run([engine.add(prompt, wish) for prompt in prompts])

    assert any(decision.preempted for decision in engine.decisions) == (SMALL[0] in flags)
    for prompt, answer in zip(prompts, answers, strict=True):
        (found,) = answer.prompt_logprobs
        (expected,) = alone.answer(prompt, wish).prompt_logprobs
        assert found.logprob_token_ids.shape == (len(prompt) - 1, 3)
        assert found.logprob_token_ids[:, 0].tolist() == prompt[1:]
        assert (found.logprobs == expected.logprobs).all()


# The KV cache.


def test_copies_of_a_head_count_and_change_nothing_while_they_are_right(start: Start, tmp_path: Path) -> None:
    path = str(tiny_llama_profile(tmp_path, 1, 8))
    model = ("--model", str(tiny_llama_path()), "--tensor-parallel-size")
    prompt = list(range(100, 140))
    engine, alone = start(*model, "8", profile=path), start(*model, "1", profile=path)
    expected = alone.answer(prompt, GREEDY).tokens
    assert engine.answer(prompt, GREEDY).tokens == expected

    for rank, worker in enumerate(engine.workers):
        name = engine.add(prompt, GREEDY)
        engine.step()  # from the prefix cache, and the rest
        worker._cells[0][engine.blocks_of(name)[1], 0, 3] ^= np.uint64(1)
        assert engine.run([name])[0].tokens != expected, f"a wrong byte of rank {rank} has no effect"
        worker._cells[0][:] = engine.workers[rank ^ 1]._cells[0]
    assert engine.answer(prompt, GREEDY).tokens == expected


@pytest.mark.parametrize("order", ["v1", "v2"])
def test_a_cached_prefix_answers_as_a_computed_one(start: Start, order: str) -> None:
    engine = start("--emulate-hook-order", order)
    cold = [engine.answer(PROMPT[:length], GREEDY).words for length in (40, 33, 32, 17)]

    warm = [engine.answer(PROMPT[:length], GREEDY).words for length in (40, 33, 32, 17)]

    assert warm == cold
    assert sum(saved > 0 for decision in engine.decisions for _, saved in decision.new) == 7


# Time and faults.


def test_steps_take_what_the_profile_says(start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    engine, seen = start("--max-num-batched-tokens", "64"), list[float]()
    launch = DeviceClock.launch

    going_on = list[bool]()

    def spied(self: DeviceClock, step_s: float, now_s: float, *, goes_on: bool = False) -> float:
        seen.append(step_s)
        going_on.append(goes_on)
        return launch(self, step_s, now_s, goes_on=goes_on)

    monkeypatch.setattr(DeviceClock, "launch", spied)
    engine.add(list(range(5000, 5100)), SamplingParams(max_tokens=3, ignore_eos=True))
    engine.add(list(range(6000, 6020)), SamplingParams(max_tokens=2, ignore_eos=True))
    engine.settle()

    latency = load_profile("tiny").entry(1).latency
    steps = [[(0, 64)], [(64, 36), (0, 20)], [(100, 1), (20, 1)], [(101, 1)]]
    assert seen == [latency.step_s(work_of(step)) for step in steps]
    assert going_on == [False, True, True, True]


def faults(folder: Path, monkeypatch: pytest.MonkeyPatch, *items: dict[str, Any]) -> None:
    path = folder / "faults.json"
    path.write_text(json.dumps({"faults": items}), encoding="utf-8")
    monkeypatch.setenv(FAULTS_ENV, str(path))


def test_a_crash_comes_at_its_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    faults(tmp_path, monkeypatch, {"kind": "crash", "at_step": 3})
    engine = emulated()
    engine.add(PROMPT, GREEDY)
    engine.step()
    engine.step()

    with pytest.raises(RuntimeError, match="emulated crash at step 3, as asked for"):
        engine.step()

    engine.stop()


def test_slow_steps_and_stalls_change_times_and_no_tokens(
    start: Start, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = start().answer(PROMPT, GREEDY)
    slow = {"kind": "slow", "factor": 3.0, "from_step": 2, "to_step": 2}
    faults(tmp_path, monkeypatch, slow, {"kind": "stall", "at_step": 3, "seconds": 5.0})
    engine, seen = start(), list[float]()
    monkeypatch.setattr(DeviceClock, "launch", lambda self, step_s, now_s, goes_on: seen.append(step_s) or now_s)

    assert engine.answer(PROMPT, GREEDY).words == expected.words

    decode = load_profile("tiny").entry(1).latency
    plain = [decode.step_s(work_of([(40 + index, 1)])) for index in range(3)]
    assert seen[1:4] == [3 * plain[0], 5.0 + plain[1], plain[2]]


def test_a_result_is_made_once_by_whoever_asks_first() -> None:
    made = []
    future = LazyFuture(lambda: made.append(1) or len(made))

    assert not made
    assert [future.result(), future.result()] == [1, 1]


def test_a_result_that_cannot_be_made_fails_each_time() -> None:
    future = LazyFuture(lambda: 1 / 0)

    for _ in range(2):
        with pytest.raises(ZeroDivisionError):
            future.result()
