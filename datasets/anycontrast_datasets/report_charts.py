"""The charts of a report: HTML tables with marks drawn in SVG, so that text never scales.

In: published numbers (see `report_numbers`, `report_spread`), never raw ones. Out: HTML. Every
chart is a table a screen reader can walk through; marks stretch with the page, words do not.
"""

from collections.abc import Callable, Sequence
from typing import Any

from anycontrast_datasets.report_axes import Scale, axis_of
from anycontrast_datasets.report_cells import Shown
from anycontrast_datasets.report_style import contrast_color, face_color
from anycontrast_datasets.report_text import escape, number

Row = dict[str, Any]
COLUMN_PX = 24
_LINE = 'vector-effect="non-scaling-stroke"'


def cell(shown: Shown) -> str:
    """Return a count, or why it is not shown."""
    if isinstance(shown, int):
        return number(shown)
    return f'<span class="hid-n">{escape(shown)}</span>'


def bar_cell(shown: Shown, largest: int, color: str = "") -> str:
    """Return a table cell with a bar; a hatched stub for a count that is not shown."""
    style = f"--c:{color};" if color else ""
    if not isinstance(shown, int):
        return f'<td class="bar"><span class="b hid" style="{style}"></span></td>'
    width = 100 * shown / max(1, largest)
    if shown == 0:
        return '<td class="bar"></td>'
    return f'<td class="bar"><span class="b" style="{style}width:{width:.1f}%"></span></td>'


def bars(
    caption: str,
    rows: Sequence[Row],
    measures: dict[str, str],
    *,
    first: str,
    color: Callable[[str], str] | None = None,
    more: dict[str, str] | None = None,
) -> str:
    """Return a table with a bar for the first measure.

    Args:
        caption: What the table shows.
        rows: `name` and the measures.
        measures: Key -> heading; the first one gets the bar.
        first: Heading of the names.
        color: Colour of a row by its name.
        more: Key -> heading of text columns at the end.
    """
    key = next(iter(measures))
    drawn = [row[key] for row in rows if isinstance(row[key], int) and not row.get("rest")]
    largest = max(drawn, default=1)
    heads = "".join(f'<th scope="col" class="n">{escape(h)}</th>' for h in measures.values())
    texts = "".join(f'<th scope="col" class="w">{escape(h)}</th>' for h in (more or {}).values())
    lines = []
    for row in rows:
        tint = color(row["name"]) if color else ""
        bar = '<td class="bar"></td>' if row.get("rest") else bar_cell(row[key], largest, tint)
        counts = "".join(f'<td class="n">{cell(row[name])}</td>' for name in measures)
        words = "".join(f'<td class="words">{escape(row[name])}</td>' for name in (more or {}))
        lines.append(f"<tr>{_head(row['name'], tint)}{bar}{counts}{words}</tr>")
    return (
        f'<div class="scroll"><table><caption>{escape(caption)}</caption>'
        f'<thead><tr><th scope="col">{escape(first)}</th><td></td>{heads}{texts}</tr></thead>'
        f"<tbody>{''.join(lines)}</tbody></table></div>"
    )


def upset(contrasts: Sequence[Row], sets: Row) -> str:
    """Return the contrast-set plot: a row per set, a dot per contrast in it, a bar of studies."""
    names = [row["name"] for row in contrasts]
    rows = list(sets["rows"])
    largest = max((row["studies"] for row in rows if isinstance(row["studies"], int)), default=1)
    lines = [
        f'<tr><th scope="row" class="dots">{_dots(row["contrasts"], names)}</th>'
        f'<td class="n">{cell(row["studies"])}</td>{bar_cell(row["studies"], largest)}</tr>'
        for row in rows
    ]
    if sets["other"]:
        other = sets["other"]["studies"]
        text = f"{number(sets['other']['sets'])} rarer sets together"
        lines.append(
            f'<tr><th scope="row" class="dots">{text}</th><td class="n">'
            f"{cell(other)}</td><td></td></tr>"
        )
    return (
        '<div class="scroll" tabindex="0" role="region" aria-label="Studies by contrast set">'
        f'<table class="upset"><thead><tr><td class="dots">{_set_sizes(contrasts)}</td>'
        f'<th scope="col" class="n">studies</th><td></td></tr></thead>'
        f"<tbody>{''.join(lines)}</tbody></table></div>"
    )


def _set_sizes(contrasts: Sequence[Row]) -> str:
    """Bars of studies per contrast, over the slanted names of the columns."""
    bar_px, label_px = 52, 66
    width = COLUMN_PX * len(contrasts)
    counts = [row["studies"] for row in contrasts]
    largest = max((n for n in counts if isinstance(n, int)), default=1)
    marks = []
    for column, row in enumerate(contrasts):
        name, shown = row["name"], row["studies"]
        high = bar_px * shown / largest if isinstance(shown, int) else 0
        x = column * COLUMN_PX
        marks.append(
            f"<g><title>{escape(name)}: {escape(_words(shown))} studies</title>"
            f'<rect x="{x + 5}" y="{bar_px - high:.1f}" width="14" height="{high:.1f}" rx="1.5" '
            f'style="fill:{contrast_color(name)}"/>'
            f'<text transform="translate({x + 15} {bar_px + label_px - 5}) rotate(-90)" '
            f'dominant-baseline="auto">{escape(name)}</text></g>'
        )
    return (
        f'<svg width="{width}" height="{bar_px + label_px}" role="img" '
        f'aria-label="Studies per contrast">{"".join(marks)}</svg>'
    )


def _dots(members: Sequence[str], names: Sequence[str]) -> str:
    inside = {name: (names.index(name) + 0.5) * COLUMN_PX for name in members}
    marks = [
        f'<circle cx="{(place + 0.5) * COLUMN_PX:g}" cy="13" r="3" style="fill:var(--line)"/>'
        for place, name in enumerate(names)
        if name not in inside
    ]
    if len(inside) > 1:
        marks.append(
            f'<path d="M{min(inside.values()):g} 13H{max(inside.values()):g}" '
            'style="stroke:var(--soft);stroke-width:2"/>'
        )
    marks += [
        f'<circle cx="{x:g}" cy="13" r="6" style="fill:{contrast_color(name)}"/>'
        for name, x in inside.items()
    ]
    label = " + ".join(members) or "no contrast"
    return (
        f'<svg width="{COLUMN_PX * len(names)}" height="26" role="img" '
        f'aria-label="{escape(label)}"><title>{escape(label)}</title>{"".join(marks)}</svg>'
    )


def ridges(
    caption: str, rows: Sequence[Row], unit: str, domain: tuple[float, float], *, is_log: bool
) -> str:
    """Return one histogram per contrast above one axis.

    Args:
        caption: What is distributed.
        rows: `name`, `median` and `bins` (`from`, `to`, `volumes`).
        unit: Of the axis.
        domain: Ends of the axis.
        is_log: Logarithmic axis.
    """
    scale, ticks = axis_of(domain, is_log=is_log)
    lines = []
    for row in rows:
        plot = _histogram(row["bins"], scale, ticks, unit, contrast_color(row["name"]), "ridge")
        lines.append(
            f"<tr>{_head(row['name'], contrast_color(row['name']))}"
            f'<td class="plot-cell">{plot}</td>'
            f'<td class="n">{number(row["median"])}</td></tr>'
        )
    return _chart(caption, lines, scale, ticks, unit, ("contrast", "median"))


def histogram(
    caption: str, bins: Sequence[Row], unit: str, domain: tuple[float, float], color: str
) -> str:
    """Return one tall histogram with an axis."""
    scale, ticks = axis_of(domain, is_log=False)
    plot = _histogram(bins, scale, ticks, unit, color, "tall")
    axis = _axis(scale, ticks)
    return f'<h3>{escape(caption)} <span class="unit">{escape(unit)}</span></h3>{plot}{axis}'


def ranges(contrast: Row) -> str:
    """Return the intensity ranges of one contrast: a bar p1 to p99 per site, a tick at p50."""
    everything = {"site": "all sites", **contrast["all"]}
    rows = [everything, *contrast["sites"]]
    low, high = min(r["p1"] for r in rows), max(r["p99"] for r in rows)
    high = high if high > low else low + 1
    is_log = low > 0 and high / low > 30
    scale, ticks = axis_of((low, high), is_log=is_log)
    color = contrast_color(contrast["name"])
    lines = []
    for row in rows:
        first, middle, last = (scale(row[p]) for p in ("p1", "p50", "p99"))
        words = ", ".join(f"{p} {number(row[p])}" for p in ("p1", "p50", "p99"))
        opacity = 1 if row is everything else 0.55
        plot = (
            f'<div class="range"><svg class="plot" viewBox="0 0 1000 100" role="img" '
            f'preserveAspectRatio="none" aria-label="{escape(words)}">'
            f"<title>{escape(row['site'])}: {escape(words)}</title>{_gridlines(scale, ticks)}"
            f'<rect x="{first:.1f}" y="36" width="{max(last - first, 2):.1f}" height="28" '
            f'style="fill:{color};opacity:{opacity}"/>'
            f'<line x1="{middle:.1f}" x2="{middle:.1f}" y1="18" y2="82" {_LINE} '
            'style="stroke:var(--ink);stroke-width:2.5"/></svg></div>'
        )
        lines.append(
            f'<tr>{_head(row["site"], "")}<td class="plot-cell">{plot}</td>'
            f'<td class="n">{number(row["p50"])}</td></tr>'
        )
    note = ""
    if contrast["more_sites"]:
        note = f'<p class="note">{number(contrast["more_sites"])} more sites are not listed.</p>'
    unit = f"source units{', log scale' if is_log else ''}"
    return _chart(contrast["name"], lines, scale, ticks, unit, ("site", "median")) + note


def stacks(caption: str, rows: Sequence[Row], states: Sequence[str]) -> str:
    """Return one stacked bar per contrast: what is known of a face."""
    used = [state for state in states if any(row.get(state) for row in rows)]
    key = "".join(f'<span style="--c:{face_color(s)}">{escape(s)}</span>' for s in used)
    lines = []
    for row in rows:
        counts = {s: row[s] for s in used if isinstance(row.get(s), int) and row[s]}
        hidden = row["volumes"] - sum(counts.values())
        parts = "".join(
            f'<i style="--c:{face_color(s)};width:{100 * n / row["volumes"]:.2f}%" '
            f'title="{escape(s)}: {number(n)}"></i>'
            for s, n in counts.items()
        )
        if hidden:
            parts += f'<i class="hid" style="width:{100 * hidden / row["volumes"]:.2f}%"></i>'
        cells = "".join(f'<td class="n">{cell(row.get(s, 0))}</td>' for s in used)
        lines.append(
            f"<tr>{_head(row['name'], contrast_color(row['name']))}"
            f'<td class="bar"><div class="stack">{parts}</div></td>{cells}</tr>'
        )
    heads = "".join(f'<th scope="col" class="n">{escape(s)}</th>' for s in used)
    return (
        f'<h3>{escape(caption)}</h3><div class="key">{key}</div><div class="scroll"><table><thead>'
        f'<tr><th scope="col">contrast</th><td></td>{heads}</tr></thead>'
        f"<tbody>{''.join(lines)}</tbody></table></div>"
    )


def _density(bin_: Row, scale: Scale) -> float:
    return float(bin_["volumes"]) / max(1e-9, scale(bin_["to"]) - scale(bin_["from"]))


def _histogram(
    bins: Sequence[Row], scale: Scale, ticks: Sequence[float], unit: str, color: str, kind: str
) -> str:
    highest = max(_density(b, scale) for b in bins)
    marks = []
    for b in bins:
        x, width = scale(b["from"]), scale(b["to"]) - scale(b["from"])
        high = max(4.0, 94 * _density(b, scale) / highest)
        words = f"{number(b['from'])} to {number(b['to'])} {unit}: {number(b['volumes'])} volumes"
        marks.append(
            f'<rect x="{x:.1f}" y="{100 - high:.1f}" width="{width:.1f}" height="{high:.1f}">'
            f"<title>{escape(words)}</title></rect>"
        )
    top = max(bins, key=lambda b: float(b["volumes"]))
    label = (
        f"{len(bins)} bins, most volumes from {number(top['from'])} to {number(top['to'])} {unit}"
    )
    return (
        f'<div class="{kind}"><svg class="plot" viewBox="0 0 1000 100" preserveAspectRatio="none" '
        f'role="img" aria-label="{escape(label)}">{_gridlines(scale, ticks)}'
        f'<line x1="0" x2="1000" y1="100" y2="100" {_LINE} style="stroke:var(--line)"/>'
        f'<g style="fill:{color}">{"".join(marks)}</g></svg></div>'
    )


def _gridlines(scale: Scale, ticks: Sequence[float]) -> str:
    lines = "".join(f"M{scale(tick):.1f} 0V100" for tick in ticks)
    return f'<path d="{lines}" {_LINE} style="stroke:var(--grid);fill:none"/>'


def _axis(scale: Scale, ticks: Sequence[float]) -> str:
    labels, last_kept = [], -100.0
    for tick in ticks:
        place = scale(tick) / 10
        kind = "first" if place < 3 else "last" if place > 97 else ""
        if place - last_kept < 21:
            kind += " opt"  # not enough room for it on a phone
        else:
            last_kept = place
        labels.append(
            f'<span class="{kind}" style="left:{place:.2f}%">{number(float(f"{tick:.6g}"))}</span>'
        )
    return f'<div class="axis" aria-hidden="true">{"".join(labels)}</div>'


def _chart(
    caption: str,
    lines: Sequence[str],
    scale: Scale,
    ticks: Sequence[float],
    unit: str,
    heads: tuple[str, str],
) -> str:
    return (
        f'<table><caption>{escape(caption)} <span class="unit">{escape(unit)}</span></caption>'
        "<thead><tr>"
        f'<th scope="col">{escape(heads[0])}</th><td></td>'
        f'<th scope="col" class="n">{escape(heads[1])}</th></tr></thead>'
        f"<tbody>{''.join(lines)}</tbody><tfoot><tr><td></td><td>{_axis(scale, ticks)}</td>"
        "<td></td></tr></tfoot></table>"
    )


def _head(name: str, color: str) -> str:
    swatch = f' class="swatch" style="--c:{color}"' if color else ""
    return f'<th scope="row"><span{swatch} title="{escape(name)}">{escape(name)}</span></th>'


def _words(shown: Shown) -> str:
    return number(shown) if isinstance(shown, int) else shown
