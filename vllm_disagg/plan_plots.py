"""The plots of `vllm-disagg plan` and `vllm-disagg simulate`."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np

from vllm_disagg.core.slo import SLO
from vllm_disagg.errors import ConfigError
from vllm_disagg.planner.sensitivity import Sensitivity


def require_matplotlib() -> None:
    """Find out before minutes are spent on what is to be drawn.

    Raises:
        ConfigError: it is not installed.
    """
    try:
        import matplotlib

        matplotlib.use("agg")
    except ImportError as error:
        raise ConfigError("--plot needs matplotlib: pip install matplotlib") from error


def require_drawable(path: str) -> None:
    """The same for a file.

    Raises:
        ConfigError: nothing can be drawn, or not into a file of this name.
    """
    require_matplotlib()
    from matplotlib.backend_bases import FigureCanvasBase

    if path.rpartition(".")[2].lower() not in FigureCanvasBase.filetypes:
        raise ConfigError(f"--plot {path}: the name must end in .svg, .png or .pdf")


def draw_rates(path: str, runs: Sequence[dict[str, Any]], slo: SLO, goodput: float | None) -> None:
    """Attainment over the rate, and below it each latency as a share of its target.

    Raises:
        ConfigError: the file cannot be written, or is of no kind that can be drawn.
    """
    runs = sorted(runs, key=lambda run: float(run["rate"]))
    rates = [run["rate"] for run in runs]
    with _figure(path, 2, 1, sharex=True, figsize=(6.4, 5.2)) as (above, below):
        above.plot(rates, [100 * run["attainment"] for run in runs], "o-")
        above.axhline(90, color="0.7", linewidth=0.8)
        if goodput:
            above.axvline(goodput, color="0.7", linewidth=0.8, linestyle="--", label=f"goodput {goodput:.2f}/s")
            above.legend(fontsize=8)
        above.set_ylabel("SLO attainment, %")
        above.set_ylim(0, 102)
        for name, target in (("ttft", slo.ttft_s), ("tpot", slo.tpot_s)):
            for share in ("p50", "p90"):
                values = [np.nan if run[f"{name}_{share}_s"] is None else run[f"{name}_{share}_s"] for run in runs]
                below.plot(rates, np.array(values) / target, "o-", ms=3, label=f"{name.upper()} {share}")
        below.axhline(1.0, color="0.7", linewidth=0.8)
        below.set_yscale("log")
        below.set_ylabel("of its target")
        below.set_xlabel("requests/s")
        below.legend(fontsize=8)


def draw_sensitivity(path: str, found: Sensitivity, slo: SLO, goal: float) -> None:
    """Goodput over the targets' scale, and attainment over the rate, of the best placement of each kind.

    Raises:
        ConfigError: the file cannot be written, or is of no kind that can be drawn.
    """
    with _figure(path, 1, 2, figsize=(9.6, 3.8)) as (left, right):
        for line in found.lines:
            left.plot(found.scales, line.goodput, "o-", ms=4, label=line.candidate.name)
            right.plot(found.rates, [100 * share for share in line.attainment], "o-", ms=4, label=line.candidate.name)
        left.axvline(1.0, color="0.7", linewidth=0.8)
        left.set_xscale("log")
        left.set_xticks(found.scales, [f"{scale:g}" for scale in found.scales], minor=False)
        left.set_xticks([], minor=True)
        left.set_xlabel(f"both targets, times TTFT {slo.ttft_s:g} s and TPOT {slo.tpot_s:g} s")
        left.set_ylabel("goodput per price, requests/s")
        left.set_ylim(bottom=0)
        left.legend(fontsize=8)
        right.axhline(100 * goal, color="0.7", linewidth=0.8)
        right.set_xlabel("requests/s per price")
        right.set_ylabel("SLO attainment, %")
        right.set_ylim(0, 102)


@contextmanager
def _figure(path: str, rows: int, columns: int, **options: Any) -> Iterator[Any]:
    """Axes to draw on, written to the file afterwards."""
    require_matplotlib()
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(rows, columns, **options)
    try:
        yield axes
        figure.tight_layout()
        figure.savefig(path)
    except (OSError, ValueError) as error:
        raise ConfigError(f"--plot {path}: {error}") from error
    finally:
        plt.close(figure)
