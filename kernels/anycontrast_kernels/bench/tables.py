"""The numbers of `bench kernels` as Markdown."""

from collections.abc import Sequence
from typing import Any


def markdown_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a Markdown table, first column to the left, numbers to the right."""
    rule = ["---"] + ["---:"] * (len(header) - 1)
    return "\n".join("| " + " | ".join(row) + " |" for row in [header, rule, *rows])


def kernel_tables(result: dict[str, Any]) -> dict[str, str]:
    """Return title -> table: attention per head dim and direction, then loss and patches."""
    found = {}
    rows = result["attention"]
    unit = throughput_unit(result)
    for head_dim in sorted({row["head_dim"] for row in rows}):
        for direction in ("forward", "backward"):
            mine = [row for row in rows if row["head_dim"] == head_dim and f"{direction}_ms" in row]
            title = f"attention {direction}, head dim {head_dim}"
            found[title] = _attention_table(mine, direction, unit)
    found["loss and patches"] = _memory_table(result["memory"])
    return found


def throughput_unit(result: dict[str, Any]) -> tuple[str, float]:
    """Return the unit that suits the device, and how many of it are one TFLOP/s."""
    return ("TFLOP/s", 1.0) if result["ceiling"]["tflop_s"] >= 1.0 else ("GFLOP/s", 1e3)


def page(result: dict[str, Any]) -> str:
    """Return the whole result as one Markdown page."""
    place, ceiling = result["environment"], result["ceiling"]
    unit, scale = throughput_unit(result)
    versions = ", ".join(f"{name} {version}" for name, version in place["versions"].items())
    threads = f", threads: {place['threads']}" if "threads" in place else ""
    per_core = " Throughput of a CPU is that of one core: work over CPU time." if threads else ""
    parts = [
        f"# Kernels on {place['device']}",
        "Made by `python -m anycontrast_kernels.bench kernels`.",
        f"{place['date']}, {place['dtype']}{threads}, {versions}. Measured in the same run: matrix "
        f"products {scale * ceiling['tflop_s']:.0f} {unit}, copies {ceiling['gb_s']:.0f} GB/s."
        + per_core,
        f"A cell is {unit} of useful work and its share of the matrix products; `mixed` is a pack "
        "of studies with 1 to 7 contrasts and four sizes.",
    ]
    parts += [f"## {title}\n\n{table}" for title, table in result["markdown"].items()]
    if result["bars"]:
        rows = [
            [name, f"{bar['value']:g}", bar["bar"], "yes" if bar["met"] else "no"]
            for name, bar in result["bars"].items()
        ]
        parts.append("## goals\n\n" + markdown_table(["goal", "reached", "bar", "met"], rows))
    missing: dict[str, list[str]] = {}
    for name, reason in result["left_out"].items():
        missing.setdefault(reason, []).append(name)
    if missing:
        lines = [f"- {', '.join(names)}: {reason}" for reason, names in missing.items()]
        parts.append("## left out\n\n" + "\n".join(lines))
    return "\n\n".join(parts)


def _attention_table(rows: list[dict[str, Any]], direction: str, unit: tuple[str, float]) -> str:
    lengths = list(dict.fromkeys(row["lengths"] for row in rows))
    cells = {(row["way"], row["lengths"]): row for row in rows}
    ways = list(dict.fromkeys(row["way"] for row in rows))
    table = []
    for way in ways:
        found = [cells.get((way, length)) for length in lengths]
        table.append([way, *(_cell(row, direction, unit[1]) if row else "" for row in found)])
    return markdown_table([f"way, {unit[0]}", *lengths], table)


def _cell(row: dict[str, Any], direction: str, scale: float) -> str:
    speed = scale * row[f"{direction}_tflop_s"]
    return f"{speed:.{0 if speed >= 10 else 1}f} ({100 * row[f'{direction}_share']:.0f} %)"


def _memory_table(rows: list[dict[str, Any]]) -> str:
    table = [
        [row["operation"], row["way"], row["failed"], "", ""]
        if "failed" in row
        else [
            row["operation"],
            row["way"],
            f"{row['ms']:.3f}",
            f"{row['gb_s']:.1f}",
            f"{100 * row['share']:.0f} %",
        ]
        for row in rows
    ]
    return markdown_table(["operation", "way", "ms", "GB/s", "of the copy"], table)
