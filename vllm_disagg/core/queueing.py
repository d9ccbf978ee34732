"""DistServe's closed forms of the mean time to first token (section 3.1, equations 1 to 3): M/D/1.

Prompts of equal length come as a Poisson process, are served one at a time and in order; one of them keeps the whole
device busy. D is the execution time of a prompt on one device, R the rate, K the speed-up of tensor parallelism.
"""

from __future__ import annotations

from vllm_disagg.errors import ConfigError


def one_device_s(d_s: float, rate: float) -> float:
    """Equation 1: D + R D^2 / (2 (1 - R D))."""
    load = _stable(d_s * rate, 1.0)
    return d_s + d_s * load / (2 * (1 - load))


def replicas_s(d_s: float, rate: float, num: int) -> float:
    """Equation 1 with the rate split over `num` devices (section 3.2)."""
    return one_device_s(d_s, rate / num)


def inter_op_s(d_s: float, rate: float, degree: int = 2) -> float:
    """Equation 2 for any degree n of pipeline parallelism: D + R D^2 / (2 n (n - R D))."""
    load = _stable(d_s * rate, degree)
    return d_s + d_s * load / (2 * degree * (degree - load))


def intra_op_s(d_s: float, rate: float, speed_up: float) -> float:
    """Equation 3: D / K + R D^2 / (2 K (K - R D))."""
    if not speed_up > 0:
        raise ConfigError(f"the speed-up of tensor parallelism must be positive, not {speed_up!r}")
    load = _stable(d_s * rate, speed_up)
    return d_s / speed_up + d_s * load / (2 * speed_up * (speed_up - load))


def crossover_load(speed_up: float) -> float | None:
    """The load R D above which 2-way pipeline parallelism beats 2-way tensor parallelism; None where it never does
    below tensor parallelism's own limit.

    Equation 2 minus equation 3 is 0 at a root of a quadratic; bisection needs no formula for it.
    """
    low, high = 0.0, min(2.0, speed_up) * (1 - 1e-12)

    def gain(load: float) -> float:
        return inter_op_s(1.0, load) - intra_op_s(1.0, load, speed_up)

    if gain(low) < 0 or gain(high) > 0:
        return None
    for _ in range(200):
        middle = (low + high) / 2
        low, high = (middle, high) if gain(middle) > 0 else (low, middle)
    return (low + high) / 2


def _stable(load: float, limit: float) -> float:
    if not 0 <= load < limit:
        raise ConfigError(f"the queue grows without end: the load R D is {load:.3g}, it must stay below {limit:.3g}")
    return load
