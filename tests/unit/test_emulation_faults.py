"""Faults on demand: read strictly, read again, and never there by accident."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

from vllm_disagg.emulation import faults as faults_module
from vllm_disagg.emulation.faults import Fault, Faults, parse_faults
from vllm_disagg.emulation.settings import FAULTS_ENV
from vllm_disagg.errors import ConfigError


def write(path: Path, *faults: dict[str, Any]) -> None:
    """As a careful writer does: the reader sees one file or the other."""
    new = path.with_suffix(".new")
    new.write_text(json.dumps({"faults": faults}), encoding="utf-8")
    new.replace(path)


def test_without_the_variable_there_are_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(FAULTS_ENV, raising=False)
    faults = Faults.from_environment()

    assert (faults.step_factor(1), faults.stall_s(1), faults.crashes(1), faults.of_read(1)) == (1.0, 0.0, False, ())


def test_the_variable_names_the_file(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    path = tmp_path / "faults.json"
    monkeypatch.setenv(FAULTS_ENV, str(path))
    faults = Faults.from_environment()
    assert not faults.crashes(4)

    write(path, {"kind": "crash", "at_step": 4})

    assert [faults.crashes(step) for step in (3, 4, 5)] == [False, True, False]


def test_a_changed_file_is_read_again_and_a_missing_one_means_none(tmp_path: Path) -> None:
    path = tmp_path / "faults.json"
    faults = Faults(path)
    write(path, {"kind": "slow", "factor": 3.0})
    assert faults.step_factor(1) == 3.0

    write(path, {"kind": "slow", "factor": 4.0})
    assert faults.step_factor(1) == 4.0

    path.unlink()
    assert faults.step_factor(1) == 1.0


def test_an_unchanged_file_is_read_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "faults.json"
    path.write_text("not JSON", encoding="utf-8")
    told: list[str] = []
    monkeypatch.setattr(faults_module.logger, "warning", lambda text, *_: told.append(text))
    faults = Faults(path)

    results = [faults.step_factor(step) for step in range(10)]

    assert results == [1.0] * 10
    assert len(told) == 1


def test_a_broken_file_ends_the_faults_of_the_one_before(tmp_path: Path) -> None:
    path = tmp_path / "faults.json"
    faults = Faults(path)
    write(path, {"kind": "fail_read", "every": 1})
    assert faults.of_read(1)

    write(path, {"kind": "fail_read"})

    assert faults.of_read(1) == ()


def test_a_replaced_file_of_the_same_size_and_time_is_read(tmp_path: Path) -> None:
    path = tmp_path / "faults.json"
    faults = Faults(path)
    write(path, {"kind": "crash", "at_step": 4})
    status = path.stat()
    assert faults.crashes(4)

    write(path, {"kind": "crash", "at_step": 5})
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))

    assert faults.crashes(5)


def test_slow_steps_multiply_and_stalls_add(tmp_path: Path) -> None:
    path = tmp_path / "faults.json"
    write(
        path,
        {"kind": "slow", "factor": 2.0, "from_step": 3, "to_step": 5},
        {"kind": "slow", "factor": 1.5, "from_step": 5},
        {"kind": "stall", "at_step": 4, "seconds": 2.0},
        {"kind": "stall", "at_step": 4, "seconds": 0.5},
    )
    faults = Faults(path)

    assert [faults.step_factor(step) for step in (2, 3, 5, 6)] == [1.0, 2.0, 3.0, 1.5]
    assert [faults.stall_s(step) for step in (3, 4, 5)] == [0.0, 2.5, 0.0]


def test_reads_are_counted(tmp_path: Path) -> None:
    path = tmp_path / "faults.json"
    write(path, {"kind": "corrupt_read", "every": 3}, {"kind": "late_block", "every": 2, "seconds": 1.0})
    faults = Faults(path)

    kinds = [[fault.kind for fault in faults.of_read(read)] for read in range(1, 7)]

    assert kinds == [[], ["late_block"], ["corrupt_read"], ["late_block"], [], ["corrupt_read", "late_block"]]


def test_a_document_is_read() -> None:
    document = {"faults": [{"kind": "slow", "factor": 2}, {"kind": "crash", "at_step": 7}]}

    assert parse_faults(document) == (Fault(kind="slow", factor=2), Fault(kind="crash", at_step=7))
    assert parse_faults({"faults": []}) == ()


@pytest.mark.parametrize(
    ("document", "says"),
    [
        ([], "expected"),
        ({"faults": {}}, "expected"),
        ({"faults": ["crash"]}, r"faults\[0\].kind: expected one of slow, .*not None"),
        ({"faults": [{"kind": ["slow"]}]}, r"faults\[0\].kind"),
        ({"faults": [{"kind": "quake"}]}, r"not 'quake'"),
        ({"faults": [{"kind": "slow"}]}, r"faults\[0\]: slow needs factor"),
        ({"faults": [{"kind": "stall", "at_step": 1}]}, "stall needs seconds"),
        ({"faults": [{"kind": "slow", "factor": 2, "at_step": 1}]}, "at_step: slow has factor, from_step, to_step"),
        ({"faults": [{"kind": "slow", "factor": -1}]}, "expected a number of 0 or more, not -1"),
        ({"faults": [{"kind": "slow", "factor": True}]}, "not True"),
        ({"faults": [{"kind": "slow", "factor": float("nan")}]}, "not nan"),
        ({"faults": [{"kind": "slow", "factor": "2"}]}, "not '2'"),
        ({"faults": [{"kind": "fail_read", "every": 0}]}, "every: expected 1 or more, not 0"),
    ],
)
def test_what_cannot_be_meant_is_refused_by_name(document: Any, says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        parse_faults(document)
