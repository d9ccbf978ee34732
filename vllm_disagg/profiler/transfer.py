"""How KV travels between two engines, from what `vllm-disagg doctor` measures."""

from __future__ import annotations

import statistics
from typing import Any

from vllm_disagg.core.probe import PairReport, SourceReport
from vllm_disagg.doctor.diagnose import bulk, seconds_per_copy
from vllm_disagg.doctor.run import deployment_key, examine
from vllm_disagg.errors import ConfigError


def measure_transfer(prefill: str, decode: str, *, key_file: str | None, page_bytes: int) -> dict[str, Any]:
    """Probe a pair.

    Args:
        prefill, decode: URLs of two instances.
        key_file: of their deployment.
        page_bytes: KV that lies in one piece: a block's share of one layer on one rank.

    Returns:
        As `transfer_of`.

    Raises:
        ConfigError: the pair is not healthy, so that its figures would mean little.
    """
    examination = examine((prefill,), (decode,), deployment_key(key_file))
    if problems := examination.findings("problem"):
        where, finding = problems[0]
        raise ConfigError(f"the way of KV cannot be measured: {where}: {finding.what}; {finding.fix}")
    found = transfer_of(examination.pairs[0].report, page_bytes=page_bytes)
    if found is None:
        raise ConfigError(f"the way of KV cannot be measured: {decode} read nothing from {prefill}")
    return found


def transfer_of(report: PairReport | None, *, page_bytes: int) -> dict[str, Any] | None:
    """`wire`, `carrier`, `bytes_per_s` of pages, and `latency_s` before the first byte, a round trip of the control
    channel; of the slowest pair of workers. None where nothing was read."""
    sources = [source for worker in (report.workers if report else ()) for source in worker.sources]
    rates = [(_page_rate(source, page_bytes), source) for source in sources if source.reads]
    if report is None or not rates:
        return None
    rate, slowest = min(rates, key=lambda item: item[0])
    return {
        "wire": slowest.wire,
        "carrier": slowest.carrier,
        "bytes_per_s": rate,
        "latency_s": statistics.median(report.round_trips_s) if report.round_trips_s else 0.0,
        "page_bytes": page_bytes,
    }


def _page_rate(source: SourceReport, page_bytes: int) -> float:
    """The rate of long copies, and what each page costs beyond its bytes."""
    long = bulk(source)
    assert long is not None
    return page_bytes / (page_bytes / long.bytes_per_s + seconds_per_copy(source)) if long.bytes_per_s else 0.0
