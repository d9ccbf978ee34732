"""One request, from its admission to its last byte.

    decide --split--> prefill --handoff--> decode --> relay
       |                 `--failed, nothing held--.     ^
       `--local-----------------------------------+-----'

Where no decode instance is up, a prefill instance takes its place in the last two.

Until decode's first event nothing has been sent to the client, so that every failure before it can be made good.
Whatever happens, the `finally` of `run` gives back the slots and the KV that nobody will fetch.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import Any, Final

from starlette.types import Message, Send

from vllm_disagg.config import EMULATED_HEADER
from vllm_disagg.core.policy import Route
from vllm_disagg.core.scheduling.hints import after
from vllm_disagg.core.shapes import Api, certainly_shorter, estimate_tokens, unsplittable
from vllm_disagg.core.types import new_transfer_id
from vllm_disagg.proxy.bodies import decode_body, encode, prefill_body
from vllm_disagg.proxy.instances import Instance
from vllm_disagg.proxy.prefilled import Prefilled, read_prefill_answer
from vllm_disagg.proxy.relay import Events, strip_answer
from vllm_disagg.proxy.replies import ApiError, error_event, of_failure, send_error
from vllm_disagg.proxy.services import Hold, Services
from vllm_disagg.proxy.timing import StageClock
from vllm_disagg.proxy.upstream import LegFailed, Upstream

logger = logging.getLogger(__name__)

PATHS: Final[Mapping[Api, str]] = {"completions": "/v1/completions", "chat": "/v1/chat/completions"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Call:
    """One client's request, read and found acceptable.

    Attributes:
        api: which of OpenAI's interfaces.
        fields: the fields of its body that may reach an engine.
        hints: what it asks of the schedulers, cleaned; the engines read them in `vllm_xargs`.
        headers: the client's headers that may reach an engine.
        num_bytes: length of its body.
        request_id: what the engines, their answers and our logs call it.
        arrived_s: when it arrived, on the loop's clock.
    """

    api: Api
    fields: Mapping[str, Any]
    hints: Mapping[str, float]
    headers: Mapping[str, str]
    num_bytes: int
    request_id: str
    arrived_s: float


class ClientStalled(Exception):
    """The client has not taken any of its answer for `idle_timeout_s`."""


class Flow:
    """Serves one call. Cancelling `run` is how a client's departure is told.

    Attributes:
        route: where the call went; may change from split to local on the way.
        reason: why.
        phase: admit, prefill, decode, or stream: where a client was lost.
    """

    def __init__(self, services: Services, call: Call) -> None:
        self._services, self._call = services, call
        self._settings, self._pool = services.settings, services.pool
        self._loop = asyncio.get_running_loop()
        self._clock = StageClock(call.arrived_s)
        self._num_tokens = estimate_tokens(call.api, call.fields, call.num_bytes)
        self._stream = call.fields.get("stream") is True
        self._place = ExitStack()
        self._hold: Hold | None = None
        self._num_legs = 0
        self._emulated: str | None = None
        self.route: Route = "refuse"
        self.reason = "no_instance"
        self.phase = "admit"

    async def run(self, send: Send) -> None:
        """Serve the call, to its last byte or its error.

        Raises:
            ClientStalled: the client does not read; its connection must be closed.
        """
        try:
            await self._serve(send)
        except ApiError as error:
            await send_error(send, error, self._headers())
        finally:
            self._place.close()
            self._give_back()

    async def _serve(self, send: Send) -> None:
        call, pool = self._call, self._pool
        decision = pool.decide(
            shape=unsplittable(call.api, call.fields),
            short=certainly_shorter(call.api, call.fields, call.num_bytes, self._settings.min_split_tokens),
        )
        self.route, self.reason = decision.route, decision.reason
        if decision.decode is not None:
            answers = pool.decode[decision.decode]
        elif decision.prefill is not None:
            answers = pool.prefill[decision.prefill]
        else:
            raise ApiError(503, "no instance is available", reason=decision.reason)
        answers = self._take_place(answers)  # no prefill without a place to go on
        self._clock.lap("admit")
        prefilled = Prefilled()
        if decision.route == "split" and decision.prefill is not None:
            prefilled = await self._prefill(pool.prefill[decision.prefill], answers)
        await self._decode(answers, prefilled, send)

    # --- the prefill leg

    async def _prefill(self, first: Instance, decode: Instance) -> Prefilled:
        """Have the prompt computed: here, else on one other instance, else not at all."""
        self.phase = "prefill"
        deadline_s = self._loop.time() + self._settings.prefill_timeout_s
        try:
            return await self._prefill_on(first, deadline_s)
        except LegFailed:
            other = self._pool.another_prefill([first], decode=decode)
        if other is not None and self._loop.time() < deadline_s:
            try:
                return await self._prefill_on(other, deadline_s)
            except LegFailed:
                pass
        self._go_local("prefill_failed")
        return Prefilled()

    async def _prefill_on(self, instance: Instance, deadline_s: float) -> Prefilled:
        hold = Hold(prefill=instance, transfer_id=new_transfer_id())
        body = encode(prefill_body(self._call.api, self._call.fields, hold.transfer_id, hints=self._hints()))
        started_s = self._loop.time()
        self._hold = hold  # from here on it may hold KV, even if its answer never arrives
        try:
            with self._pool.carrying(instance, self._num_tokens):
                async with Upstream(self._services.http, instance) as leg:
                    await self._open(leg, body, deadline_s)
                    raw = await leg.read_all(deadline_s=deadline_s)
            prefilled = read_prefill_answer(self._call.api, raw) if leg.status == 200 else Prefilled()
        except LegFailed as failure:
            self._clock.lap("prefill_lost")
            self._note_failure("prefill", instance, failure)
            raise
        self._services.metrics.leg("prefill", self._loop.time() - started_s)
        self._clock.lap_prefill(prefilled.queue_s, prefilled.run_s)
        if prefilled.handoff is None:
            self._hold = None
            self._go_local("nothing_held" if leg.status == 200 else "prefill_rejected")
            return prefilled
        return replace(prefilled, prefill=instance, transfer_id=hold.transfer_id)

    # --- the decode leg

    async def _decode(self, decode: Instance, prefilled: Prefilled, send: Send) -> None:
        """Have the answer computed and relayed: here, else on another instance while nothing has been sent."""
        if not decode.up:  # it went down during the prefill leg
            other = self._pool.another_decode([decode], prefill=prefilled.prefill)
            decode = self._take_place(other) if other is not None else decode
        tried, num_sent = [decode], 0
        while True:
            try:
                return await self._decode_on(decode, prefilled, send)
            except LegFailed as failure:
                self._note_failure("decode", decode, failure)
                num_sent += failure.sent
                again = num_sent < 2 and failure.cause != "timeout"  # an answer that takes so long is not begun twice
                following = self._next_decode(tried, prefilled, failure) if again else None
                if following is None:
                    raise of_failure(failure) from failure
                decode, prefilled = following
                tried.append(decode)

    def _next_decode(
        self, tried: list[Instance], prefilled: Prefilled, failure: LegFailed
    ) -> tuple[Instance, Prefilled] | None:
        """Where to go on after a failed decode leg, and with what.

        A handoff works once. Only when the engine cannot have seen it is it used again; else the prompt is recomputed.
        """
        if prefilled.handoff is not None and not failure.sent:
            fitting = self._pool.another_decode(tried, prefill=prefilled.prefill)
            if fitting is not None:
                return self._take_place(fitting), prefilled
        other, reason = self._pool.another_decode(tried), "decode_failed"
        if other is None:
            other, reason = self._pool.stand_in(), "no_decode"
        if other is None or other in tried:
            return None
        if prefilled.handoff is not None or reason == "no_decode":
            self._give_back()
            self._go_local(reason)
        return self._take_place(other), Prefilled(token_ids=prefilled.token_ids)

    async def _decode_on(self, instance: Instance, prefilled: Prefilled, send: Send) -> None:
        self.phase = "decode"
        started_s = self._loop.time()
        deadline_s = started_s + self._settings.first_event_timeout_s
        body = decode_body(
            self._call.api, self._call.fields,
            token_ids=prefilled.token_ids, transfer_id=prefilled.transfer_id, handoff=prefilled.handoff,
            num_cached_tokens=prefilled.num_cached_tokens, hints=self._hints(),
        )  # fmt: skip
        async with Upstream(self._services.http, instance) as leg:
            await self._open(leg, encode(body), deadline_s)
            self._emulated = leg.header(EMULATED_HEADER)
            if leg.status == 200 and self._stream:
                events = Events(leg)
                first = await events.first(deadline_s=deadline_s)
                self._answered(started_s)
                return await self._relay(instance, events, first, send)
            answer = strip_answer(await leg.read_all(deadline_s=deadline_s))
            if leg.status == 200:
                self._answered(started_s)
            await self._start(send, leg.status, b"application/json", length=len(answer))
            return await self._send(send, answer, more=False)

    def _answered(self, started_s: float) -> None:
        """Decode has begun to answer, so it has taken the KV: from here on nothing is given back or tried again."""
        self._hold = None
        self._services.metrics.leg("decode", self._loop.time() - started_s)
        self._clock.lap("handover" if self.route == "split" else "local")

    async def _relay(self, instance: Instance, events: Events, block: bytes, send: Send) -> None:
        """Pass a stream on, block by block; each waits until the client has room for it."""
        self.phase = "stream"
        await self._start(send, 200, b"text/event-stream; charset=utf-8")
        tail = b""
        try:
            while block:
                await self._send(send, block, more=True)
                block = await events.next(deadline_s=self._loop.time() + self._settings.idle_timeout_s)
        except LegFailed as failure:
            self._note_failure("stream", instance, failure)
            tail = error_event(failure)
        await self._send(send, tail, more=False)

    # --- what both legs use

    async def _open(self, leg: Upstream, body: bytes, deadline_s: float) -> None:
        """Send a leg's request, under a name of its own: an engine must never see one name twice."""
        self._num_legs += 1
        name = f"{self._call.request_id}-{self._num_legs}"
        headers = {**self._call.headers, "Content-Type": "application/json", "X-Request-Id": name}
        await leg.open("POST", PATHS[self._call.api], deadline_s=deadline_s, headers=headers, body=body)

    def _hints(self) -> dict[str, float]:
        return after(self._call.hints, self._loop.time() - self._call.arrived_s)

    def _take_place(self, instance: Instance) -> Instance:
        """Count the request as outstanding on this decode instance and no other."""
        self._place.close()
        self._place.enter_context(self._pool.carrying(instance, self._num_tokens))
        return instance

    def _go_local(self, reason: str) -> None:
        self.route, self.reason = "local", reason

    def _give_back(self) -> None:
        """Have KV released that nobody will fetch, or that may be on its way to being held."""
        if self._hold is not None:
            self._services.release(self._hold, self._call.headers)
            self._hold = None

    def _note_failure(self, leg: str, instance: Instance, failure: LegFailed) -> None:
        logger.warning(
            "leg.failed request=%s leg=%s url=%s cause=%s", self._call.request_id, leg, instance.url, failure.cause
        )
        self._services.metrics.leg_failed(leg, failure.cause)
        if failure.cause == "connect":
            self._pool.suspect(instance)
        elif failure.cause == "disconnect":
            instance.nudged.set()  # it may have been this one connection: look at once
        if failure.sent:
            self._give_back()
        elif leg == "prefill":
            self._hold = None  # it never heard of it

    # --- towards the client

    async def _start(self, send: Send, status: int, content_type: bytes, *, length: int | None = None) -> None:
        headers = [(name.lower().encode(), value.encode()) for name, value in self._headers().items()]
        headers.append((b"content-type", content_type))
        if length is not None:
            headers.append((b"content-length", str(length).encode()))
        await self._deliver(send, {"type": "http.response.start", "status": status, "headers": headers})

    async def _send(self, send: Send, body: bytes, *, more: bool) -> None:
        await self._deliver(send, {"type": "http.response.body", "body": body, "more_body": more})

    async def _deliver(self, send: Send, message: Message) -> None:
        try:
            async with asyncio.timeout(self._settings.idle_timeout_s):
                await send(message)
        except TimeoutError as error:
            raise ClientStalled from error

    def _headers(self) -> dict[str, str]:
        headers = {"X-Request-Id": self._call.request_id}
        if self.route != "refuse":
            headers["X-Disagg-Route"] = self.route
        if self.route == "local":
            headers["X-Disagg-Reason"] = self.reason
        if timing := self._clock.header():
            headers["Server-Timing"] = timing
        if self._emulated is not None:
            headers[EMULATED_HEADER] = self._emulated
        return headers
