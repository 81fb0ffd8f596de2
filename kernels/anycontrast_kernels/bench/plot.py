"""Throughput over sequence length, and bars side by side, as SVG pictures without a library."""

import math
from collections.abc import Mapping
from html import escape
from typing import Any

from anycontrast_kernels.bench.tables import throughput_unit

WIDTH, HEIGHT = 760, 420
LEFT, RIGHT, TOP, BOTTOM = 70, 150, 40, 50
COLORS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000", "#999")


def throughput_plot(result: dict[str, Any], head_dim: int, direction: str) -> str:
    """Return the throughput of every way over the lengths of the packs; the ceiling is dashed.

    Args:
        result: of `kernels.run`.
        head_dim: which rows.
        direction: `forward` or `backward`.
    """
    key = f"{direction}_tflop_s"
    unit, scale = throughput_unit(result)
    rows = [
        {**row, key: scale * row[key]}
        for row in result["attention"]
        if row["head_dim"] == head_dim and key in row
    ]
    lengths = list(dict.fromkeys(row["lengths"] for row in rows))
    ceiling = scale * result["ceiling"]["tflop_s"]
    top = _nice(max([ceiling, *(row[key] for row in rows)]))
    place = f"{result['environment']['device']}, {result['environment']['dtype']}"
    title = f"Attention {direction}, head dim {head_dim}: {unit} of useful work ({place})"
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{WIDTH}" height="{HEIGHT}" '
        'font-family="sans-serif" font-size="12">',
        f'<rect width="{WIDTH}" height="{HEIGHT}" fill="white"/>',
        _text(LEFT, 22, title, size=13),
        *_axes(lengths, top),
        _line([(LEFT, _y(ceiling, top)), (WIDTH - RIGHT, _y(ceiling, top))], "#555555", True),
        _text(WIDTH - RIGHT + 8, _y(ceiling, top) + 4, "matrix products"),
    ]
    for number, way in enumerate(dict.fromkeys(row["way"] for row in rows)):
        color = COLORS[number % len(COLORS)]
        points = [
            (_x(lengths.index(row["lengths"]), len(lengths)), _y(row[key], top), row["lengths"])
            for row in rows
            if row["way"] == way
        ]
        # The mixed pack has no place on the axis of lengths: a point without a line.
        parts.append(_line([(x, y) for x, y, name in points if name.isdigit()], color))
        parts += [
            f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3.5" fill="{color}"/>' for x, y, _ in points
        ]
        y = TOP + 40 + 18 * number
        parts.append(
            f'<rect x="{WIDTH - RIGHT + 8}" y="{y - 9}" width="10" height="10" fill="{color}"/>'
        )
        parts.append(_text(WIDTH - RIGHT + 24, y, way))
    return "\n".join([*parts, "</svg>"])


def bar_plot(title: str, groups: Mapping[str, Mapping[str, float]]) -> str:
    """Return groups of bars, the same series in each, with their values written above.

    Args:
        title: above the picture; names the unit.
        groups: group -> series -> value >= 0.
    """
    series = list(dict.fromkeys(name for group in groups.values() for name in group))
    top = _nice(max(value for group in groups.values() for value in group.values()))
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{WIDTH}" height="{HEIGHT}" '
        'font-family="sans-serif" font-size="12">',
        f'<rect width="{WIDTH}" height="{HEIGHT}" fill="white"/>',
        _text(LEFT, 22, title, size=13),
        *_axes(list(groups), top, below=""),
    ]
    width = 0.8 * (WIDTH - LEFT - RIGHT) / len(groups) / len(series)
    for number, name in enumerate(series):
        color = COLORS[number % len(COLORS)]
        for place, group in enumerate(groups.values()):
            if name not in group:
                continue
            x = _x(place, len(groups)) + (number - len(series) / 2) * width
            y = _y(group[name], top)
            parts.append(
                f'<rect x="{x:.1f}" y="{y:.1f}" width="{width:.1f}" '
                f'height="{HEIGHT - BOTTOM - y:.1f}" fill="{color}"/>'
            )
            parts.append(
                _text(x + width / 2, y - 4, f"{group[name]:.3g}", anchor="middle", size=10)
            )
        y = TOP + 40 + 18 * number
        left = WIDTH - RIGHT + 8
        parts.append(f'<rect x="{left}" y="{y - 9}" width="10" height="10" fill="{color}"/>')
        parts.append(_text(left + 16, y, name))
    return "\n".join([*parts, "</svg>"])


def _axes(lengths: list[str], top: float, below: str = "tokens of a sequence") -> list[str]:
    parts = []
    for step in range(5):
        value = top * step / 4
        y = _y(value, top)
        parts.append(_line([(LEFT, y), (WIDTH - RIGHT, y)], "#dddddd"))
        parts.append(_text(LEFT - 8, y + 4, f"{value:.3g}", anchor="end"))
    for number, name in enumerate(lengths):
        parts.append(_text(_x(number, len(lengths)), HEIGHT - BOTTOM + 20, name, anchor="middle"))
    middle = (LEFT + WIDTH - RIGHT) / 2
    parts.append(_text(middle, HEIGHT - 10, below, anchor="middle"))
    return parts


def _x(number: int, count: int) -> float:
    return LEFT + (WIDTH - LEFT - RIGHT) * (number + 0.5) / max(count, 1)


def _y(value: float, top: float) -> float:
    return HEIGHT - BOTTOM - (HEIGHT - TOP - BOTTOM) * value / top


def _nice(value: float) -> float:
    """Round up to 1, 2, 4 or 8 times a power of ten."""
    power = 10.0 ** math.floor(math.log10(value)) if value > 0 else 1.0
    return next(n * power for n in (1.0, 2.0, 4.0, 8.0, 10.0) if n * power >= value)


def _line(points: list[tuple[float, float]], color: str, dashed: bool = False) -> str:
    path = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
    dashes = ' stroke-dasharray="6 4"' if dashed else ""
    return f'<polyline points="{path}" fill="none" stroke="{color}" stroke-width="1.5"{dashes}/>'


def _text(x: float, y: float, text: str, *, anchor: str = "start", size: int = 12) -> str:
    return (
        f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" font-size="{size}">'
        f"{escape(text)}</text>"
    )
