"""HTTP to engines. What goes wrong is an answer too: one line that says what and what to do."""

from __future__ import annotations

import socket
import urllib.error
import urllib.request
from typing import TypeVar

import msgspec

from vllm_disagg.core.probe import (
    PROBE_LIMIT_S,
    PROBE_PATH,
    PROBE_VERSION,
    Identity,
    PairReport,
    ProbeOrder,
    sign_order,
)
from vllm_disagg.core.types import new_nonce

IDENTIFY_TIMEOUT_S = 5.0
_PAIR_TIMEOUT_S = PROBE_LIMIT_S + 10.0
_MAX_ANSWER_BYTES = 4 * 1024 * 1024

T = TypeVar("T")

_opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))  # engines are never behind a web proxy


class Unwell(Exception):
    """An engine that cannot be examined.

    Attributes:
        what: what is wrong.
        fix: what to change.
    """

    def __init__(self, what: str, fix: str) -> None:
        self.what, self.fix = what, fix
        super().__init__(what)


def identify(url: str, role: str, key: bytes) -> Identity:
    """Who answers at that URL.

    Raises:
        Unwell: nobody, or not an engine of that role and deployment.
    """
    order = ProbeOrder(version=PROBE_VERSION, task="identify", nonce=new_nonce())
    status, body = _post(url, sign_order(order, key), IDENTIFY_TIMEOUT_S)
    if status == 404:
        raise _without_probe(url, role)
    identity = _read(url, status, body, Identity)
    if identity.role != role:
        raise Unwell(
            f"it is a {identity.role} instance, listed as {role}", f"list it under --{identity.role}, or start another"
        )
    return identity


def probe_pair(decode_url: str, decode: Identity, prefill: Identity, key: bytes) -> PairReport:
    """Have a decode engine probe a prefill engine.

    Raises:
        Unwell: the decode engine did not.
    """
    order = ProbeOrder(
        version=PROBE_VERSION,
        task="pair",
        nonce=new_nonce(),
        engine_id=decode.engine_id,
        prefill_id=prefill.engine_id,
        control=prefill.control,
    )
    status, body = _post(decode_url, sign_order(order, key), _PAIR_TIMEOUT_S)
    return _read(decode_url, status, body, PairReport)


def _post(url: str, body: bytes, timeout_s: float) -> tuple[int, bytes]:
    return _open(urllib.request.Request(url + PROBE_PATH, data=body, method="POST"), timeout_s)  # noqa: S310 - checked


def _open(request: urllib.request.Request, timeout_s: float) -> tuple[int, bytes]:
    try:
        with _opener.open(request, timeout=timeout_s) as answer:
            return int(answer.status), answer.read(_MAX_ANSWER_BYTES)
    except urllib.error.HTTPError as error:
        with error:
            return error.code, error.read(_MAX_ANSWER_BYTES)
    except urllib.error.URLError as error:
        raise _unreachable(error.reason, timeout_s) from error
    except (OSError, ValueError) as error:  # it broke off, or does not speak HTTP
        raise _unreachable(error, timeout_s) from error
    except Exception as error:
        raise Unwell(f"its answer is no HTTP ({type(error).__name__})", "give the URL of an engine's API") from error


def _unreachable(reason: object, timeout_s: float) -> Unwell:
    if isinstance(reason, ConnectionRefusedError):
        return Unwell("nothing listens there (connection refused)", "start the engine, or correct the URL")
    if isinstance(reason, socket.gaierror):
        return Unwell(f"the host is not known ({reason.strerror})", "correct the URL")
    if isinstance(reason, TimeoutError):
        return Unwell(
            f"no answer within {timeout_s:g} s",
            "look whether the engine is frozen or overloaded, and whether a firewall drops its port",
        )
    return Unwell(f"it cannot be reached ({reason})", "look at the engine's log, and whether the URL is right")


def _without_probe(url: str, role: str) -> Unwell:
    """Whoever is there does not know our route."""
    status, _ = _open(urllib.request.Request(url + "/disagg/status"), IDENTIFY_TIMEOUT_S)  # noqa: S310 - checked
    if status == 200:
        return Unwell("its vllm-disagg is older than this one", "install the same version everywhere, and restart it")
    return Unwell(
        "it has no role in a split deployment",
        f"start it with --kv-role {role} and vllm-disagg installed beside vLLM; give an engine's URL, not the proxy's",
    )


def _read(url: str, status: int, body: bytes, kind: type[T]) -> T:
    if status == 403:
        raise Unwell(
            "it has another deployment key than this command", "give the deployment's key with --key-file, and check "
            "that all engines were started with the same --kv-key-file",
        )  # fmt: skip
    if status != 200:
        raise Unwell(f"it answers {status}: {_error(body)}", "look at its log")
    try:
        return msgspec.json.decode(body, type=kind)
    except msgspec.DecodeError as error:
        raise Unwell(f"its answer has another form ({error})", "install the same vllm-disagg everywhere") from error


def _error(body: bytes) -> str:
    try:
        return str(msgspec.json.decode(body, type=dict[str, str])["error"])
    except (msgspec.DecodeError, KeyError):
        return body[:200].decode(errors="replace")
