"""What an engine's steps teach about it: how long each took, written down where that is wanted, and its L_m."""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections import deque
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

from vllm_disagg.core.latency import LatencyModel, Regime, work_of
from vllm_disagg.core.scheduling.pace import critical_length
from vllm_disagg.core.scheduling.refine import StepTimes
from vllm_disagg.core.steps import RecordedStep
from vllm_disagg.folders import user_folder

logger = logging.getLogger(__name__)

REFRESH_STEPS: Final = 64
"""After so many steps the latency model is reckoned anew."""

SAVE_STEPS: Final = 4096
"""After so many steps what was learned is saved for the next start."""

SPREAD: Final = 4
"""The largest step of prompts has to have so many times the tokens of the smallest one before they say what L_m is.
From steps of one size nobody can tell what a step costs in any case from what a token costs."""

_MAX_IN_FLIGHT: Final = 64


@dataclass(slots=True)
class _InFlight:
    step: Any
    at_s: float
    requests: tuple[tuple[int, int], ...]


class Measure:
    """The steps of one engine.

    Args:
        profile: step times that are believed at first; None to take what an earlier start learned, or to learn.
        longest: new tokens that a step can have.
        log: file to which each step is appended, in the format of `core/steps.py`.
        memory: file that keeps what was learned.
    """

    def __init__(
        self, *, profile: LatencyModel | None, longest: int, log: Path | None = None, memory: Path | None = None
    ) -> None:
        known = profile or (load_model(memory) if memory is not None else None)
        self._longest, self._memory = longest, memory if profile is None else None
        self._times = StepTimes(known)
        self._in_flight: deque[_InFlight] = deque(maxlen=_MAX_IN_FLIGHT)
        self._last_s = float("-inf")
        self._num_steps = 0
        self._log = log.open("a", buffering=1, encoding="utf-8") if log is not None else None
        self.latency: LatencyModel | None = self._times.model()
        self.batch_tokens: int | None = None
        self.most_prompt_tokens = 0
        self._least_prompt_tokens = longest
        self._is_saved = False
        self._reckon()

    @property
    def trusted(self) -> bool:
        """Whether the latency model may be asked about steps unlike those that were seen."""
        return self._times.has_profile

    def scheduled(self, step: Any, requests: tuple[tuple[int, int], ...], *, now_s: float) -> None:
        """A step goes to the workers.

        Args:
            step: what vLLM will hand to `done`.
            requests: `(computed, new)` of each request in it.
            now_s: on the monotonic clock.
        """
        if requests:
            self._in_flight.append(_InFlight(step, now_s, requests))

    def done(self, step: Any, *, now_s: float) -> None:
        """Its tokens are back. Where steps overlap, one begins when the one before it has ended."""
        while self._in_flight and self._in_flight[0].step is not step:
            if all(item.step is not step for item in self._in_flight):
                return
            self._in_flight.popleft()
        if not self._in_flight:
            return
        begun = self._in_flight.popleft()
        at_s = max(begun.at_s, self._last_s)
        self._last_s = now_s
        work = work_of(begun.requests)
        self._times.add(work, now_s - at_s)
        if work.num_prefills:
            self.most_prompt_tokens = max(self.most_prompt_tokens, work.prefill_tokens)
            self._least_prompt_tokens = min(self._least_prompt_tokens, work.prefill_tokens)
        if self._log is not None:
            self._log.write(RecordedStep(at_s=at_s, step_s=now_s - at_s, requests=begun.requests).line())
        self._num_steps += 1
        if self._num_steps % REFRESH_STEPS == 0:
            self._reckon()
        if self._num_steps % SAVE_STEPS == 0 or (self.batch_tokens is not None and not self._is_saved):
            self.save()

    def save(self) -> None:
        """Keep what was learned for the next start."""
        known = self.latency if self.batch_tokens is not None and self._num_steps >= REFRESH_STEPS else None
        if known is not None and self._memory is not None:
            save_model(known, self._memory)
        self._is_saved = True

    def close(self) -> None:
        """The engine ends."""
        self.save()
        if self._log is not None:
            self._log.close()

    def _reckon(self) -> None:
        self.latency = self._times.model()
        if self.latency is None or not self._tells_l_m():
            return
        found = critical_length(self.latency, longest=self._longest)
        if self.batch_tokens is None or abs(found - self.batch_tokens) > max(16, self.batch_tokens // 5):
            logger.info("l_m.reckoned tokens=%d steps=%d", found, self._num_steps)
            self.batch_tokens = found  # only when it has moved: a limit that flickers helps nobody

    def _tells_l_m(self) -> bool:
        return self.trusted or self.most_prompt_tokens >= SPREAD * self._least_prompt_tokens


def memory_file(*facts: object) -> Path:
    """Where what was learned about such an engine is kept: model, parallelism, device and what else its pace is of."""
    digest = hashlib.sha256(repr(facts).encode()).hexdigest()[:24]
    return user_folder("cache") / "step-times" / f"{digest}.json"


def save_model(model: LatencyModel, file: Path) -> None:
    """Write step times down. What goes wrong is logged: it costs the next start a few seconds of learning."""
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        draft = file.with_suffix(f".{os.getpid()}")
        document = {
            kind: [asdict(regime) for regime in getattr(model, kind)] for kind in ("prefill", "decode", "mixed")
        }
        draft.write_text(json.dumps(document), encoding="utf-8")
        draft.replace(file)
    except OSError as error:
        logger.warning("step_times.unsaved file=%s reason=%s", file, error)


def load_model(file: Path) -> LatencyModel | None:
    """Step times of an earlier start; None where there are none that can be used."""
    try:
        document = json.loads(file.read_text(encoding="utf-8"))
        model = LatencyModel(
            **{
                kind: tuple(
                    Regime(**{name: float(value) for name, value in regime.items()}) for regime in document[kind]
                )
                for kind in ("prefill", "decode", "mixed")
            }
        )
    except FileNotFoundError:
        return None
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        logger.warning("step_times.unreadable file=%s reason=%s", file, error)
        return None
    regimes = (*model.prefill, *model.decode, *model.mixed)
    sane = model.prefill and model.decode and all(value >= 0 for regime in regimes for value in asdict(regime).values())
    return model if sane and model.prefill[-1].up_to == model.decode[-1].up_to == float("inf") else None
