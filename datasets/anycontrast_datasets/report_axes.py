"""Axes of a report's charts: where a value lies, and which values are written beside the line."""

import math
from collections.abc import Callable

Scale = Callable[[float], float]
"""A value to its place on the axis, 0 .. 1000."""


def axis_of(domain: tuple[float, float], *, is_log: bool) -> tuple[Scale, list[float]]:
    """Return the scale of an axis and the places of its labels."""
    low, high = domain
    if is_log:
        span = math.log(high / low)
        ticks = _log_ticks(low, high)
        return lambda value: 1000 * math.log(max(value, low) / low) / span, ticks
    step = _step((high - low) / 6)
    first = math.ceil(low / step - 1e-9)
    ticks = [i * step for i in range(first, math.floor(high / step + 1e-9) + 1)]
    return lambda value: 1000 * (value - low) / (high - low), ticks


def _log_ticks(low: float, high: float) -> list[float]:
    powers = range(math.floor(math.log10(low)) - 1, math.ceil(math.log10(high)) + 1)
    for leads in ((1, 2, 3, 5), (1, 2, 5), (1, 3), (1,)):
        ticks = [lead * 10.0**power for power in powers for lead in leads]
        ticks = [tick for tick in ticks if low * 0.999 <= tick <= high * 1.001]
        if len(ticks) <= 7:
            break
    spread = 0.09 * math.log(high / low)
    kept = ticks[:1]
    for tick in ticks[1:]:
        if math.log(tick / kept[-1]) >= spread:
            kept.append(tick)
    return kept or [low, high]


def _step(rough: float) -> float:
    power = 10.0 ** math.floor(math.log10(rough))
    return next(lead * power for lead in (1, 2, 2.5, 5, 10) if lead * power >= rough * 0.999)
