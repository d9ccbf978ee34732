"""Profiles: what is read comes back the same, and what cannot be right is refused by name."""

from __future__ import annotations

import copy
import json
import math
from pathlib import Path
from typing import Any

import pytest

from vllm_disagg.core.latency import work_of
from vllm_disagg.core.profile import (
    from_distserve,
    is_distserve,
    kv_room_bytes,
    parse_profile,
    profile_document,
)
from vllm_disagg.errors import ConfigError
from vllm_disagg.profiles import builtin_profiles, load_profile
from vllm_disagg.profiles.shapes import SHAPES

DISTSERVE = {
    "source": "somebody's table",
    "a100_80g": {
        "distserve": {
            "facebook/opt-13b": {
                "1": {
                    "decoding_large_small_bs_threshold": 95,
                    "prefill": [18.0, 0.1, 7e-6],
                    "decoding_smallbs": [20.0, 6e-4, 0.04],
                    "decoding_largebs": [7.0, 5e-4, 0.16],
                }
            }
        }
    },
    "kv_capacity_tokens": [{"model": "facebook/opt-13b", "tp": 1, "pp": 1, "max_num_tokens": 66144}],
}


@pytest.fixture
def document() -> dict[str, Any]:
    return profile_document(load_profile("opt-13b-a100-80g"))


def put(document: dict[str, Any], path: tuple[Any, ...], value: Any) -> None:
    *parents, last = path
    target: Any = document
    for key in parents:
        target = target[key]
    if value is ...:
        del target[last]
    else:
        target[last] = value


@pytest.mark.parametrize("name", builtin_profiles())
def test_what_comes_with_the_project_can_be_read_written_and_read_again(name: str) -> None:
    profile = load_profile(name)
    again = parse_profile(json.loads(json.dumps(profile_document(profile))), origin=name)

    assert again.model == profile.model
    for tp, entry in profile.entries.items():
        for step in ([(0, 512)], [(300, 1)] * 40, [(300, 1)] * 200, [(0, 100), (300, 1)]):
            work = work_of(step)
            assert again.entry(tp).latency.step_s(work) == pytest.approx(entry.latency.step_s(work), rel=1e-12)
        assert again.entry(tp).kv_capacity_tokens == entry.kv_capacity_tokens


@pytest.mark.parametrize("name", builtin_profiles())
def test_those_that_come_with_the_project_are_plausible(name: str) -> None:
    for entry in load_profile(name).entries.values():
        times = [entry.latency.step_s(work_of([(0, length)])) for length in (64, 256, 1024, 2048)]
        assert times == sorted(times)
        assert 0 < times[0] < times[-1] < 10
        assert all(tokens > 2048 for tokens in entry.kv_capacity_tokens.values())


def test_the_published_13b_fit_is_in_milliseconds() -> None:
    latency = load_profile("opt-13b-a100-80g").entry(1).latency

    assert latency.step_s(work_of([(0, 512)])) == pytest.approx(0.0721, abs=1e-4)
    assert latency.step_s(work_of([(511, 1)] * 10)) == pytest.approx(0.0235, abs=1e-4)


@pytest.mark.parametrize(
    ("path", "value", "said"),
    [
        (("format",), "other", "expected format"),
        (("version",), 2, "version 2"),
        (("kind",), "certain", "measured, published, guess"),
        (("model",), ..., "model: missing"),
        (("model",), [], "expected an object"),
        (("model", "name"), 7, "model.name: expected a text"),
        (("model", "num_heads"), 0, "model.num_heads: expected a whole number from 1 on"),
        (("model", "num_heads"), 4.0, "model.num_heads: expected a whole number"),
        (("model", "num_layers"), True, "model.num_layers: expected a whole number"),
        (("model", "kv_bytes_per_token"), ..., "model.kv_bytes_per_token: missing"),
        (("device_memory_bytes",), -1, "device_memory_bytes"),
        (("entries",), {}, "entries: expected a list"),
        (("entries",), [], "`entries` is empty"),
        (("entries", 0, "tp"), "1", "entries[0].tp"),
        (("entries", 1, "tp"), 1, "same `tp`"),
        (("entries", 0, "prefill"), [], "`up_to` must rise"),
        (("entries", 0, "prefill", 0, "constant_ms"), math.nan, "expected a finite number, not nan"),
        (("entries", 0, "prefill", 0, "constant_ms"), math.inf, "expected a finite number, not inf"),
        (("entries", 0, "prefill", 0, "constant_ms"), None, "expected a finite number, not None"),
        (("entries", 0, "prefill", 0, "constant_ms"), 10**400, "expected a finite number, not 1000"),
        (("entries", 0, "prefill", 0, "constant_ms"), -1e9, "tokens takes 0 s; expected more than 0"),
        (("entries", 0, "prefill", 0, "per_tokens_ms"), 1.0, "per_tokens_ms: unknown"),
        (("entries", 0, "decode", 0, "up_to"), ..., "`up_to` must rise"),
        (("entries", 0, "decode", 1, "up_to"), 200, "the last must have none"),
        (("entries", 0, "decode", 0, "up_to"), math.nan, "expected a finite number"),
        (("entries", 0, "kv_capacity_tokens"), {"one": 5}, "degrees of parallelism"),
        (("entries", 0, "kv_capacity_tokens"), {"1": 0}, "whole number"),
        (("entries", 0, "residuals"), {"p90": "small"}, "residuals.p90"),
    ],
)
def test_what_makes_no_sense_is_named(document: dict[str, Any], path: tuple[Any, ...], value: Any, said: str) -> None:
    put(document, path, value)

    with pytest.raises(ConfigError) as error:
        parse_profile(document, origin="mine.json")

    assert said in str(error.value)
    assert str(error.value).startswith("mine.json")


@pytest.mark.parametrize("value", [None, 3, "text", []])
def test_a_document_that_is_no_object(value: Any) -> None:
    with pytest.raises(ConfigError, match="expected an object"):
        parse_profile(value, origin="mine.json")


def test_a_degree_that_was_not_measured_names_those_that_were() -> None:
    with pytest.raises(ConfigError, match="no tensor-parallel degree 3, only 1, 2, 4"):
        load_profile("opt-13b-a100-80g").entry(3)


def test_kv_capacity_that_is_not_listed_is_reckoned() -> None:
    profile = load_profile("opt-13b-a100-80g")
    shape = profile.model
    room = kv_room_bytes(shape, device_memory_bytes=profile.device_memory_bytes, num_devices=3)

    assert profile.kv_capacity_tokens(1, 1) == 66144
    assert profile.kv_capacity_tokens(1, 3) == room // shape.kv_bytes_per_token
    assert profile.kv_capacity_tokens(1, 2) < profile.kv_capacity_tokens(1, 3) < profile.kv_capacity_tokens(1, 4)


def test_the_rule_for_kv_room_comes_near_the_published_table() -> None:
    profile = load_profile("opt-13b-a100-80g")
    reckoned = kv_room_bytes(profile.model, device_memory_bytes=profile.device_memory_bytes, num_devices=2)

    assert reckoned / profile.model.kv_bytes_per_token == pytest.approx(163008, rel=0.02)


def test_a_model_that_does_not_fit_says_so(document: dict[str, Any]) -> None:
    document["model"]["weight_bytes"] = 10**12
    document["entries"][0]["kv_capacity_tokens"] = {}

    with pytest.raises(ConfigError, match="does not fit 1 x A100"):
        parse_profile(document, origin="big.json").kv_capacity_tokens(1, 1)


# DistServe's table.


def test_distserves_table_is_recognised() -> None:
    assert is_distserve(DISTSERVE)
    assert not is_distserve(profile_document(load_profile("tiny")))
    assert not is_distserve([DISTSERVE])


def test_distserves_columns_are_constant_context_batch() -> None:
    profile = from_distserve(DISTSERVE, SHAPES["facebook/opt-13b"], origin="table.json")
    latency = profile.entry(1).latency

    assert latency.step_s(work_of([(0, 100)])) == pytest.approx(0.018 + 0.0001 * 100 + 7e-9 * 10000)
    assert latency.step_s(work_of([(99, 1)] * 95)) == pytest.approx(0.020 + 6e-7 * 9500 + 0.04e-3 * 95)
    assert latency.step_s(work_of([(99, 1)] * 96)) == pytest.approx(0.007 + 5e-7 * 9600 + 0.16e-3 * 96)
    assert profile.kv_capacity_tokens(1, 1) == 66144
    assert profile.kind == "published"


@pytest.mark.parametrize(
    ("path", "value", "said"),
    [
        (("a100_80g",), ..., "a100_80g: missing"),
        (("a100_80g", "distserve", "facebook/opt-13b"), ..., "facebook/opt-13b: missing"),
        (("a100_80g", "distserve", "facebook/opt-13b", "1", "prefill"), [1.0, 2.0], "expected 3 numbers"),
        (("a100_80g", "distserve", "facebook/opt-13b", "1", "prefill"), [1.0, 2.0, math.nan], "not nan"),
        (("kv_capacity_tokens",), {}, "expected a list"),
    ],
)
def test_a_malformed_table_is_refused(path: tuple[str, ...], value: Any, said: str) -> None:
    table = copy.deepcopy(DISTSERVE)
    put(table, path, value)

    with pytest.raises(ConfigError) as error:
        from_distserve(table, SHAPES["facebook/opt-13b"], origin="table.json")

    assert said in str(error.value)


# Files.


def test_a_profile_that_is_not_there_names_those_that_come_along() -> None:
    with pytest.raises(ConfigError, match=r"no profile 'h900'.*opt-13b-a100-80g"):
        load_profile("h900")


def test_a_file_that_is_not_json(tmp_path: Path) -> None:
    file = tmp_path / "mine.json"
    file.write_text("{")

    with pytest.raises(ConfigError, match="is not JSON"):
        load_profile(str(file))


@pytest.mark.parametrize(("model", "said"), [(None, "holds several models"), ("gpt-9", "not 'gpt-9'")])
def test_a_table_of_several_models_wants_one_named(tmp_path: Path, model: str | None, said: str) -> None:
    file = tmp_path / "table.json"
    file.write_text(json.dumps(DISTSERVE))

    assert load_profile(str(file), model="facebook/opt-13b").model.name == "facebook/opt-13b"
    with pytest.raises(ConfigError, match=said):
        load_profile(str(file), model=model)


def test_the_profile_of_another_model_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"is of facebook/opt-13b.*not 'facebook/opt-66b'"):
        load_profile("opt-13b-a100-80g", model="facebook/opt-66b")
