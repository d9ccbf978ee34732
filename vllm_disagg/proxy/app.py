"""The app: its routes, and what lives as long as it does."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Coroutine
from contextlib import asynccontextmanager, suppress
from typing import Any

from fastapi import FastAPI
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route
from starlette.types import Message, Receive, Scope, Send

from vllm_disagg.config import ProxySettings
from vllm_disagg.core.shapes import Api
from vllm_disagg.errors import ConfigError
from vllm_disagg.proxy.admission import Admission, forwarded_headers, log_label
from vllm_disagg.proxy.flow import PATHS, ClientStalled, Flow
from vllm_disagg.proxy.instances import Instance, Pool
from vllm_disagg.proxy.introduce import Introducer
from vllm_disagg.proxy.metrics import ProxyMetrics
from vllm_disagg.proxy.relay import strip_answer
from vllm_disagg.proxy.replies import ApiError, error_event, error_response, retry_after, send_error
from vllm_disagg.proxy.services import Services
from vllm_disagg.proxy.upstream import LegFailed, Upstream, open_session
from vllm_disagg.proxy.watch import Watcher

logger = logging.getLogger(__name__)

_LAST_WORDS_S = 2.0
_ROUTES = "served are POST /v1/completions, POST /v1/chat/completions and GET /v1/models"


def create_app(settings: ProxySettings) -> FastAPI:
    """The proxy as an ASGI app. Its lifespan opens and closes everything it uses.

    Raises:
        ConfigError: there is no decode instance.
    """
    if not settings.decode:
        raise ConfigError("the proxy needs at least one decode instance: give --decode http://host:port")

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        metrics = ProxyMetrics()
        pool = Pool(settings, metrics)
        async with open_session(settings) as http, asyncio.TaskGroup() as tasks:
            app.state.services = Services(settings=settings, pool=pool, http=http, metrics=metrics, tasks=tasks)
            app.state.admission = admission = Admission(settings, metrics)
            watcher = Watcher(settings, pool, http)
            await asyncio.gather(*(watcher.look(instance) for instance in pool.all))
            watches = [tasks.create_task(watcher.watch(instance)) for instance in pool.all]
            introducer = Introducer(settings, pool, http, metrics)
            watches.append(tasks.create_task(introducer.watch()))
            yield
            with suppress(TimeoutError):  # cancelled requests still give back what they hold
                await asyncio.wait_for(admission.until_empty(), _LAST_WORDS_S)
            for watch in watches:
                watch.cancel()

    app = FastAPI(lifespan=lifespan, docs_url=None, redoc_url=None, openapi_url=None, redirect_slashes=False)
    app.router.routes.extend(Route(path, Generation(api), methods=["POST"]) for api, path in PATHS.items())
    app.add_route("/v1/models", models, methods=["GET"])
    app.add_route("/health", health, methods=["GET"])
    app.add_route("/ready", ready, methods=["GET"])
    app.add_route("/metrics", metrics_page, methods=["GET"])
    app.add_exception_handler(HTTPException, _http_error)
    app.add_exception_handler(ApiError, _api_error)
    app.add_exception_handler(Exception, _internal_error)
    return app


class Generation:
    """The endpoint of one of OpenAI's generation interfaces."""

    def __init__(self, api: Api) -> None:
        self._api = api

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request, count it and log it."""
        request = Request(scope, receive)
        services: Services = request.app.state.services
        admission: Admission = request.app.state.admission
        noting = _NotingSend(send, services.metrics)
        started_s = asyncio.get_running_loop().time()
        flow: Flow | None = None
        route, reason, request_id = "refuse", "bad_request", "-"
        try:
            with admission.entered():
                call = await admission.read_call(self._api, request)
                request_id, flow = call.request_id, Flow(services, call)
                await _serve(services, flow, receive, noting)
        except ApiError as error:
            reason = error.reason
            await send_error(noting, error)
        except ClientDisconnect:
            reason = "client_left"
            services.metrics.disconnect("admit")
        except asyncio.CancelledError:  # only the server's own end cancels this task, after its drain
            await _last_words(noting)
        finally:
            if flow is not None:
                route, reason = flow.route, flow.reason
            services.metrics.request(self._api, route, reason)
            logger.info(
                "request.done id=%s label=%s api=%s route=%s reason=%s status=%s ms=%.1f", request_id,
                log_label(request), self._api, route, reason, noting.status,
                (asyncio.get_running_loop().time() - started_s) * 1000,
            )  # fmt: skip


async def models(request: Request) -> Response:
    """The models of a decode instance, or of a prefill instance that stands in: they must be the same."""
    services: Services = request.app.state.services
    deadline_s = asyncio.get_running_loop().time() + services.settings.connect_timeout_s
    tried: list[Instance] = []
    pool = services.pool
    while (instance := pool.another_decode(tried) or pool.stand_in()) is not None and instance not in tried:
        tried.append(instance)
        try:
            async with Upstream(services.http, instance) as leg:
                await leg.open("GET", "/v1/models", deadline_s=deadline_s, headers=forwarded_headers(request))
                body = strip_answer(await leg.read_all(deadline_s=deadline_s))
                return Response(body, leg.status, media_type="application/json")
        except LegFailed as failure:
            services.metrics.leg_failed("models", failure.cause)
            if failure.cause == "connect":
                services.pool.suspect(instance)
    raise ApiError(503, "no instance is available", reason="no_instance")


async def health(request: Request) -> Response:
    """The proxy itself is alive."""
    return JSONResponse({"status": "ok"})


async def ready(request: Request) -> Response:
    """Whether requests can be served, and whether they can be split."""
    pool: Pool = request.app.state.services.pool
    up = {"prefill": sum(p.up for p in pool.prefill), "decode": sum(d.up for d in pool.decode)}
    of = {"prefill": len(pool.prefill), "decode": len(pool.decode)}
    body = {"ready": pool.can_serve, "splitting": pool.can_split, "up": up, "configured": of}
    if body["ready"]:
        return JSONResponse(body)
    return JSONResponse(body, 503, {"Retry-After": retry_after()})


async def metrics_page(request: Request) -> Response:
    """Prometheus' page."""
    services: Services = request.app.state.services
    return Response(services.metrics.exposition(), media_type="text/plain; version=0.0.4; charset=utf-8")


async def while_connected(receive: Receive, work: Coroutine[Any, Any, None]) -> bool:
    """Do some work for a client. When it leaves, the work is cancelled.

    Returns:
        Whether the work came to its end.
    """
    async with asyncio.TaskGroup() as tasks:
        working = tasks.create_task(work)
        leaving = tasks.create_task(_left(receive))
        await asyncio.wait((working, leaving), return_when=asyncio.FIRST_COMPLETED)
        finished = working.done()
        working.cancel()
        leaving.cancel()
    return finished


async def _serve(services: Services, flow: Flow, receive: Receive, send: Send) -> None:
    phase = None
    try:
        if not await while_connected(receive, flow.run(send)):
            phase = flow.phase
    except* ClientStalled:
        phase = "stalled"
    if phase is not None:
        services.metrics.disconnect(phase)


async def _last_words(send: _NotingSend) -> None:
    """Tell a client whose answer the shutdown cut short."""
    if send.status is None:
        await send_error(send, ApiError(503, "the proxy is shutting down", reason="shutting_down"))
    elif send.is_stream:
        await send({"type": "http.response.body", "body": error_event(LegFailed("down")), "more_body": False})


async def _left(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


class _NotingSend:
    """An ASGI `send` that notes and counts the status."""

    def __init__(self, send: Send, metrics: ProxyMetrics) -> None:
        self._send, self._metrics = send, metrics
        self.status: int | None = None
        self.is_stream = False

    async def __call__(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self.status = message["status"]
            self.is_stream = any(value.startswith(b"text/event-stream") for _, value in message["headers"])
            self._metrics.response(message["status"])
        await self._send(message)


async def _http_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    return error_response(ApiError(error.status_code, f"{error.detail}: {_ROUTES}"), error.headers)


async def _api_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, ApiError)
    return error_response(error)


async def _internal_error(request: Request, error: Exception) -> Response:
    return error_response(ApiError(500, "internal error"))
