"""A reader of vLLM's shared-memory queue goes to sleep soon, and misses nothing."""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest

pytest.importorskip("vllm")

from vllm.distributed.device_communicators.shm_broadcast import MessageQueue, SpinCondition

from vllm_disagg.connector import calm

pytestmark = pytest.mark.vllm


class Reader(threading.Thread):
    """Takes everything out of a queue. `None` ends it."""

    def __init__(self, handle: Any) -> None:
        super().__init__(daemon=True)
        self._handle = handle
        self.taken: list[tuple[Any, float]] = []
        self.busy_s = 0.0
        self.start()

    def run(self) -> None:
        source = MessageQueue.create_from_handle(self._handle, 0)
        source.wait_until_ready()
        while (item := source.dequeue(indefinite=True)) is not None:
            self.taken.append((item, time.monotonic()))
            self.busy_s = time.thread_time()
        self.busy_s = time.thread_time() - self.busy_s


@pytest.fixture
def queue() -> Iterator[MessageQueue]:
    calm.install()
    calm.install()
    yield MessageQueue(1, 1, max_chunk_bytes=4096)


def test_a_reader_sleeps_soon(queue: MessageQueue) -> None:
    reader = Reader(queue.export_handle())
    queue.wait_until_ready()
    queue.enqueue("a step")
    time.sleep(0.5)  # the idle time in question
    queue.enqueue(None)
    reader.join(5)
    assert not reader.is_alive()
    assert reader.busy_s < 0.1


def test_nothing_is_missed_whatever_lies_between(queue: MessageQueue) -> None:
    """Were a notification lost the reader would find the message only after 5 s."""
    rng = random.Random(1)
    reader = Reader(queue.export_handle())
    queue.wait_until_ready()
    sent = []
    for number in range(150):
        sent.append(time.monotonic())
        queue.enqueue(number)
        time.sleep(rng.choice((0, 0.0005, 0.002, calm.SPIN_S, 0.03)))
    queue.enqueue(None)
    reader.join(10)
    assert [item for item, _ in reader.taken] == list(range(150))
    assert max(at_s - since_s for (_, at_s), since_s in zip(reader.taken, sent, strict=True)) < 2.0


def test_a_shorter_spin_of_vllms_own_is_kept() -> None:
    calm.install()
    condition = SpinCondition.__new__(SpinCondition)
    condition.is_reader, condition.last_read, condition.busy_loop_s = True, time.monotonic() + 60, 0.001
    condition.wait()
    assert condition.busy_loop_s == 0.001
