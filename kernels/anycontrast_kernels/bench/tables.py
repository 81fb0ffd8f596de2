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
    for head_dim in sorted({row["head_dim"] for row in rows}):
        for direction in ("forward", "backward"):
            mine = [row for row in rows if row["head_dim"] == head_dim and f"{direction}_ms" in row]
            title = f"attention {direction}, head dim {head_dim}"
            found[title] = _attention_table(mine, direction)
    found["loss and patches"] = _memory_table(result["memory"])
    return found


def page(result: dict[str, Any]) -> str:
    """Return the whole result as one Markdown page."""
    place, ceiling = result["environment"], result["ceiling"]
    versions = ", ".join(f"{name} {version}" for name, version in place["versions"].items())
    threads = f", {place['threads']} threads" if "threads" in place else ""
    per_core = " Throughput of a CPU is that of one core: work over CPU time." if threads else ""
    parts = [
        f"# Kernels on {place['device']}",
        f"{place['date']}, {place['dtype']}{threads}, {versions}. Measured in the same run: matrix "
        f"products {_tflops(ceiling['tflop_s'])} TFLOP/s, copies {ceiling['gb_s']:.0f} GB/s."
        + per_core,
        "A cell is TFLOP/s of useful work and its share of the matrix products; `mixed` is a pack "
        "of studies with 1 to 7 contrasts and four sizes.",
    ]
    parts += [f"## {title}\n\n{table}" for title, table in result["markdown"].items()]
    if result["bars"]:
        rows = [
            [name, f"{bar['value']:g}", bar["bar"], "yes" if bar["met"] else "no"]
            for name, bar in result["bars"].items()
        ]
        parts.append("## goals\n\n" + markdown_table(["goal", "reached", "bar", "met"], rows))
    missing = [f"- {name}: {reason}" for name, reason in result["left_out"].items()]
    if missing:
        parts.append("## left out\n\n" + "\n".join(missing))
    return "\n\n".join(parts)


def _attention_table(rows: list[dict[str, Any]], direction: str) -> str:
    lengths = list(dict.fromkeys(row["lengths"] for row in rows))
    cells = {(row["way"], row["lengths"]): row for row in rows}
    ways = list(dict.fromkeys(row["way"] for row in rows))
    table = []
    for way in ways:
        found = [cells.get((way, length)) for length in lengths]
        table.append([way, *(_cell(row, direction) if row else "" for row in found)])
    return markdown_table(["way", *lengths], table)


def _cell(row: dict[str, Any], direction: str) -> str:
    return f"{_tflops(row[f'{direction}_tflop_s'])} ({100 * row[f'{direction}_share']:.0f} %)"


def _tflops(value: float) -> str:
    return f"{value:.0f}" if value >= 10 else f"{value:.3f}"


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
