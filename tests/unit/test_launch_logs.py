"""What is shown of a dead engine's log is what explains its death."""

from __future__ import annotations

from vllm_disagg.launcher.logs import last_words


def test_the_last_lines_are_shown() -> None:
    assert last_words("a\n\nb\nc\n", 2) == ["b", "c"]


def test_what_python_says_about_itself_at_the_end_is_left_out() -> None:
    log = "ValueError: no memory\nresource_tracker.py:254: leaked\n  warnings.warn('...')\n - leaked function x\n"

    assert last_words(log, 5) == ["ValueError: no memory"]


def test_the_first_error_is_shown_although_it_lies_further_up() -> None:
    log = "start\nValueError: no memory\n" + "frame\n" * 20 + "RuntimeError: see above\n"

    assert last_words(log, 2) == ["ValueError: no memory", "...", "frame", "RuntimeError: see above"]


def test_words_that_only_look_like_errors_are_not_taken_for_one() -> None:
    log = "loading with errors=0\nWARNING this may cause OSError: too many files\nlast\n"

    assert last_words(log, 1) == ["last"]
