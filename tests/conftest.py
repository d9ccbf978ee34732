"""The checks that ship with the package fail like tests: with the values that were compared. And a run that is asked to
end takes down what it has started."""

import signal

import pytest

pytest.register_assert_rewrite("vllm_disagg.testing.check_transport")


def pytest_configure() -> None:
    """Ctrl-C also ends a run in the background of a shell, which would ignore it; SIGTERM ends a run like Ctrl-C."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGTERM, lambda *_: signal.raise_signal(signal.SIGINT))
