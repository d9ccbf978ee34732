"""What the demo reads off answers and metrics, and how it judges them."""

from __future__ import annotations

from pathlib import Path

import pytest

from vllm_disagg.demo import model
from vllm_disagg.demo.compare import Answer, Comparison, parse_counters, parse_server_timing
from vllm_disagg.demo.run import describe
from vllm_disagg.errors import ConfigError
from vllm_disagg.folders import prepared_folder


def make_comparison(*, split: tuple[int, ...], undivided: tuple[int, ...], num_kv_tokens: int = 37) -> Comparison:
    def answer(token_ids: tuple[int, ...]) -> Answer:
        return Answer(token_ids=token_ids, num_prompt_tokens=37, stages_ms={"prefill_run": 12.3})

    return Comparison(
        split=answer(split), undivided=answer(undivided), num_kv_tokens=num_kv_tokens, kv_transfer_s=0.0042
    )


def test_equal_answers_say_so_and_where_the_time_went() -> None:
    comparison = make_comparison(split=(1, 2), undivided=(1, 2))

    assert comparison.equal and comparison.crossed
    assert "split == undivided: yes (2 tokens)" in describe(comparison)
    assert "prefill run 12 ms" in describe(comparison)
    assert "KV of 37 of 37 prompt tokens crossed in 4 ms" in describe(comparison)


def test_nothing_equals_nothing_only_by_accident() -> None:
    assert not make_comparison(split=(), undivided=()).equal
    assert not make_comparison(split=(1,), undivided=(1, 2)).equal
    assert not make_comparison(split=(1,), undivided=(1,), num_kv_tokens=0).crossed


def test_server_timing_keeps_its_order() -> None:
    assert parse_server_timing("admit;dur=1.5, prefill_run;dur=20, handover; dur=3.0") == {
        "admit": 1.5,
        "prefill_run": 20.0,
        "handover": 3.0,
    }
    assert parse_server_timing("") == {}


def test_counters_are_summed_over_labels() -> None:
    page = '# HELP a_total x\na_total{engine="0",name="m x"} 3.0\na_total{engine="1"} 4\nb 5\na_other{} 9\n'

    assert parse_counters(page, ("a_total", "b", "c")) == {"a_total": 7.0, "b": 5.0, "c": 0.0}


def test_a_model_is_written_once_and_never_half(tmp_path: Path) -> None:
    written: list[Path] = []

    def write(folder: Path) -> None:
        written.append(folder)
        (folder / "config.json").touch()
        if len(written) == 1:
            raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        prepared_folder(tmp_path / "model", write)
    assert list(tmp_path.iterdir()) == []

    for _ in range(2):
        assert prepared_folder(tmp_path / "model", write) == tmp_path / "model"
    assert len(written) == 2
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["model"]


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match="needs surely_not_installed"):
        model._require("sys", "surely_not_installed")
