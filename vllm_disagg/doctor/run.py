"""`vllm-disagg doctor`: whom to ask, in which order, and what comes out."""

from __future__ import annotations

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Literal

from vllm_disagg.config import KEY_ENV
from vllm_disagg.core.keys import default_key_path, load_key
from vllm_disagg.core.probe import PairReport
from vllm_disagg.doctor.ask import Unwell, identify, probe_pair
from vllm_disagg.doctor.diagnose import Finding, diagnose
from vllm_disagg.doctor.findings import Engine, Examination, Pair, as_json, as_text
from vllm_disagg.doctor.settings import DoctorSettings
from vllm_disagg.errors import ConfigError
from vllm_disagg.launcher.running import find_running

EXIT_HEALTHY, EXIT_PROBLEM = 0, 1


def run_doctor(settings: DoctorSettings, say: Callable[[str], None]) -> int:
    """Examine a deployment and tell.

    Returns:
        The exit status: 0 healthy, 1 a problem.

    Raises:
        ConfigError: nothing to examine, or no key; a usage error.
    """
    prefill, decode, key_file = settings.prefill, settings.decode, settings.key_file
    if not prefill:
        running = find_running(settings.up)
        prefill, decode, key_file = running.prefill, running.decode, key_file or running.key_file
    examination = examine(prefill, decode, deployment_key(key_file))
    if settings.json:
        say(as_json(examination).decode())
    else:
        for line in as_text(examination):
            say(line)
    return EXIT_HEALTHY if examination.is_healthy else EXIT_PROBLEM


def examine(prefill: tuple[str, ...], decode: tuple[str, ...], key: bytes) -> Examination:
    """Identify all engines at once, then probe one pair at a time, so that no probe disturbs another's figures."""
    with ThreadPoolExecutor(max_workers=16) as pool:
        asked = [pool.submit(_identified, "prefill", number, url, key) for number, url in enumerate(prefill)]
        asked += [pool.submit(_identified, "decode", number, url, key) for number, url in enumerate(decode)]
        engines = tuple(each.result() for each in asked)
    pairs = tuple(
        _probed(one, other, key)
        for other in engines
        for one in engines
        if (one.role, other.role) == ("prefill", "decode") and one.identity is not None and other.identity is not None
    )
    return Examination(engines=engines, pairs=pairs)


def _identified(role: Literal["prefill", "decode"], number: int, url: str, key: bytes) -> Engine:
    try:
        return Engine(role=role, number=number, url=url, identity=identify(url, role, key))
    except Unwell as unwell:
        return Engine(role=role, number=number, url=url, identity=None, finding=_finding(unwell))


def _probed(prefill: Engine, decode: Engine, key: bytes) -> Pair:
    assert prefill.identity is not None and decode.identity is not None
    report: PairReport | None = None
    try:
        report = probe_pair(decode.url, decode.identity, prefill.identity, key)
        findings = tuple(diagnose(prefill.identity, decode.identity, report))
    except Unwell as unwell:
        findings = (_finding(unwell),)
    return Pair(prefill=prefill.name, decode=decode.name, report=report, findings=findings)


def _finding(unwell: Unwell) -> Finding:
    return Finding("problem", unwell.what, unwell.fix)


def deployment_key(key_file: str | None) -> bytes:
    """As engines find it, except that none is made here."""
    if key_file is None and not os.environ.get(KEY_ENV) and not default_key_path().exists():
        raise ConfigError(f"there is no deployment key: name the engines' own with --key-file, or set ${KEY_ENV}")
    return load_key(key_file)
