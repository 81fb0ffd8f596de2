"""The page of a report: sections in reading order, put together from charts.

In: published numbers and pictures. Out: one HTML text that needs nothing else: no script, no font,
no address, and a content policy that lets a browser fetch none.
"""

import base64
from collections.abc import Mapping, Sequence
from typing import Any

from anycontrast_datasets.report_cells import WITHHELD
from anycontrast_datasets.report_charts import (
    Row,
    bars,
    cell,
    histogram,
    ranges,
    ridges,
    stacks,
    upset,
)
from anycontrast_datasets.report_pictures import Picture
from anycontrast_datasets.report_style import contrast_color, style_sheet
from anycontrast_datasets.report_text import embedded_json, escape, number, visible
from anycontrast_datasets.study import FACE_STATES

_POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'; base-uri 'none'"
_SECTIONS = {
    "overview": "Overview",
    "sets": "Contrast sets",
    "pictures": "Pictures",
    "geometry": "Spacing and shape",
    "intensity": "Intensities",
    "quality": "Quality",
    "refused": "Left out",
    "duplicates": "Near-duplicates",
    "about": "About the numbers",
}


def page(numbers: Mapping[str, Any], pictures: Mapping[str, Sequence[Picture]], note: str) -> str:
    """Return the page.

    Args:
        numbers: As `report.report_numbers` makes them.
        pictures: Per contrast.
        note: Why there are no pictures, or what to mind about them.
    """
    bodies = {
        "overview": _overview(numbers),
        "sets": _sets(numbers),
        "pictures": _pictures(pictures, note),
        "geometry": _geometry(numbers["geometry"]),
        "intensity": _intensity(numbers["intensities"]),
        "quality": _quality(numbers),
        "refused": _refused(numbers["ledger"]),
        "duplicates": _duplicates(numbers["near_duplicates"]),
        "about": _about(numbers),
    }
    links = "".join(f'<a href="#{name}">{escape(_SECTIONS[name])}</a>' for name in bodies)
    sections = "".join(
        f'<section id="{name}" aria-labelledby="h-{name}">'
        f'<h2 id="h-{name}">{escape(_SECTIONS[name])}</h2>{body}</section>'
        for name, body in bodies.items()
    )
    names = [row["name"] for row in numbers["datasets"]]
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    title = f"Data report: {', '.join(names[:3])}{more}"
    kind = "Synthetic data. " if numbers["synthetic"] else ""
    return (
        '<!DOCTYPE html><html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{escape(_POLICY)}">'
        '<meta name="viewport" content="width=device-width,initial-scale=1">'
        '<meta name="color-scheme" content="light dark">'
        '<meta name="referrer" content="no-referrer">'
        f'<link rel="icon" href="data:,"><title>{escape(title)}</title>'
        f'<style>{style_sheet()}</style></head><body><div class="wrap"><header>'
        f'<h1>{escape(title)}</h1><p class="lead">{kind}Manifest '
        f"<code>{escape(numbers['manifest'][:16])}</code>, schema {numbers['schema_version']}.</p>"
        f'</header><nav aria-label="Sections">{links}</nav><main>{sections}</main>'
        f"<footer>Made by <code>anycontrast report</code>.</footer></div>"
        f'<script type="application/json" id="numbers">{embedded_json(numbers)}</script>'
        "</body></html>\n"
    )


def _card(body: str, *, wide: bool = False) -> str:
    return f'<div class="card{" wide" if wide else ""}">{body}</div>'


def _grid(*cards: str) -> str:
    return f'<div class="grid">{"".join(cards)}</div>'


def _overview(numbers: Mapping[str, Any]) -> str:
    totals = numbers["totals"]
    tiles = {
        "studies": totals["studies"],
        "subjects": totals["subjects"],
        "volumes": totals["volumes"],
        "labelled studies": totals["labelled"],
        "contrasts": len(numbers["contrasts"]),
        "sites": totals["sites"] or "not known",
    }
    boxes = "".join(
        f'<div class="tile"><dt>{escape(name)}</dt><dd>{cell(shown)}</dd></div>'
        for name, shown in tiles.items()
    )
    measures = {"studies": "studies", "subjects": "subjects", "volumes": "volumes"}
    left = [
        _card(bars("By split", numbers["splits"], measures, first="split")),
        _card(bars("By dataset", numbers["datasets"], measures, first="dataset")),
    ]
    tiles_html = f'<dl class="tiles">{boxes}</dl>'
    if not totals["sites"]:
        return tiles_html + _grid(*left)
    by_site = _card(bars("By site", numbers["sites"], measures, first="site"))
    return tiles_html + _grid(f'<div class="column">{"".join(left)}</div>', by_site)


def _sets(numbers: Mapping[str, Any]) -> str:
    plot = upset(numbers["contrasts"], numbers["contrast_sets"])
    by_contrast = bars(
        "Studies with a contrast",
        numbers["contrasts"],
        {"studies": "studies"},
        first="contrast",
        color=contrast_color,
    )
    return (
        '<p class="lead">Which contrasts come together: a row is one combination, its bar the '
        "studies that have exactly it.</p>"
        + f'<div class="grid uneven">{_card(plot)}{_card(by_contrast)}</div>'
    )


def _pictures(pictures: Mapping[str, Sequence[Picture]], note: str) -> str:
    datasets = {shot.dataset for shots in pictures.values() for shot in shots}
    rows = []
    for contrast, shots in pictures.items():
        figures = "".join(_figure(shot, named=len(datasets) > 1) for shot in shots)
        rows.append(
            f'<div><h3><span class="swatch" style="--c:{contrast_color(contrast)}">'
            f'{escape(contrast)}</span></h3><div class="shots">{figures}</div></div>'
        )
    if not rows:
        return _nothing(note)
    text = f'<p class="warn" role="note">{escape(note)}</p>' if note else ""
    return text + _card(_grid(*rows))


def _figure(shot: Picture, *, named: bool) -> str:
    data = base64.b64encode(shot.png).decode("ascii")
    width, height = (round(n) for n in shot.size_mm)
    place = f"{abs(shot.plane_mm):.0f} mm {'above' if shot.plane_mm >= 0 else 'below'} the middle"
    alt = f"{shot.contrast}, axial slice {place}, dataset {visible(shot.dataset)}"
    caption = f"<figcaption>{escape(visible(shot.dataset))}</figcaption>" if named else ""
    return (
        f'<figure><img src="data:image/png;base64,{data}" width="{width}" height="{height}" '
        f'style="aspect-ratio:{width}/{height}" alt="{escape(alt)}" title="{escape(alt)}">'
        f"{caption}</figure>"
    )


def _geometry(geometry: Mapping[str, Sequence[Row]]) -> str:
    charts = (
        ("spacing_finest_mm", "Spacing along the finest axis", "mm", True),
        ("spacing_coarsest_mm", "Spacing along the coarsest axis", "mm", True),
        ("side_longest_vox", "Longest side of the grid", "voxels", False),
        ("side_shortest_vox", "Shortest side of the grid", "voxels", False),
    )
    cards = []
    for key, caption, unit, is_log in charts:
        # Both spacings share an axis, and both sides do.
        pair = [k for k, _, u, _ in charts if u == unit]
        bins = [b for k in pair for row in geometry[k] for b in row["bins"]]
        if not geometry[key]:
            continue
        domain = (min(b["from"] for b in bins), max(b["to"] for b in bins))
        cards.append(_card(ridges(caption, geometry[key], unit, domain, is_log=is_log)))
    if not cards:
        return _nothing("Too few subjects for a distribution.")
    lead = (
        '<p class="lead">As the files are, before preparation. Heights are volumes per width of a '
        "bin, each contrast up to its own highest.</p>"
    )
    return lead + _grid(*cards) + _bins_table(geometry, [c[:3] for c in charts])


def _bins_table(
    geometry: Mapping[str, Sequence[Row]], charts: Sequence[tuple[str, str, str]]
) -> str:
    lines = [
        f'<tr><td>{escape(caption)}</td><td>{escape(row["name"])}</td><td class="n">'
        f'{number(b["from"])}</td><td class="n">{number(b["to"])}</td><td>{escape(unit)}</td>'
        f'<td class="n">{number(b["volumes"])}</td></tr>'
        for key, caption, unit in charts
        for row in geometry[key]
        for b in row["bins"]
    ]
    return (
        '<details><summary>Every bin as a table</summary><div class="scroll"><table><thead><tr>'
        '<th scope="col">measure</th><th scope="col">contrast</th><th scope="col">from</th>'
        '<th scope="col">to</th><th scope="col">unit</th><th scope="col">volumes</th></tr></thead>'
        f"<tbody>{''.join(lines)}</tbody></table></div></details>"
    )


def _intensity(contrasts: Sequence[Row]) -> str:
    if not contrasts:
        return _nothing("The manifest holds no intensities of enough subjects.")
    lead = (
        '<p class="lead">Foreground intensity per site: the bar runs from the 1st to the 99th '
        "percentile, the tick is the 50th; each is the median over the volumes of the site.</p>"
    )
    cards = "".join(_card(ranges(contrast)) for contrast in contrasts)
    return f'{lead}<div class="columns">{cards}</div>'


def _quality(numbers: Mapping[str, Any]) -> str:
    volumes = {"volumes": "volumes"}
    cards = []
    if numbers["confidence"]:
        cards.append(
            histogram(
                "Confidence in the contrast",
                numbers["confidence"],
                "0 to 1, volumes per width of a bin",
                (0.0, 1.0),
                "var(--bar)",
            )
        )
    if numbers["evidence"]:
        cards.append(bars("What decided it", numbers["evidence"], volumes, first="evidence"))
    if numbers["flags"]:
        cards.append(bars("Flags", numbers["flags"], volumes, first="flag"))
    else:
        cards.append("<h3>Flags</h3>" + _nothing("No volume has a quality flag."))
    faces = stacks("Faces", numbers["faces"], FACE_STATES) if numbers["faces"] else ""
    return _grid(*map(_card, cards), _card(faces, wide=True) if faces else "")


def _refused(ledger: Mapping[str, Any] | None) -> str:
    if ledger is None:
        return _nothing("No ledger lies beside the manifest (private/ledger.csv).")
    if not ledger["rows"]:
        return _nothing("No file was refused.")
    table = bars(
        "Refused files by reason",
        ledger["rows"],
        {"files": "files"},
        first="reason",
        more={"remedy": "what can be done"},
    )
    return f"<p>{cell(ledger['files'])} files were refused.</p>" + _grid(_card(table, wide=True))


def _duplicates(found: Mapping[str, Any] | None) -> str:
    if found is None:
        return _nothing("The manifest holds no image hashes.")
    table = bars("Pairs of volumes", found["pairs"], {"pairs": "pairs"}, first="the two are of")
    return (
        f'<p class="lead">Pictures are near-duplicates if their hashes differ in at most '
        f"{number(found['max_bits'])} of 512 bits. {cell(found['compared'])} volumes were "
        f"compared; {cell(found['identical_volumes'])} have exactly the voxels of another one.</p>"
        + _grid(_card(table))
    )


def _about(numbers: Mapping[str, Any]) -> str:
    least = numbers["min_cell"]
    data = base64.b64encode(embedded_json(numbers).encode()).decode("ascii")
    rule = (
        f"<p>A count with fewer than {least} different subjects behind it is shown as "
        f"&lt; {least}. Other counts are {WITHHELD} where a sum or a difference would tell it. "
        "Neighbouring bins of a histogram are joined until each holds enough subjects; contrasts, "
        "sites and bins with fewer are left out. Rows whose count is not shown are in the order of "
        "their names.</p>"
        if least > 1
        else "<p>Every count is shown: nothing is suppressed.</p>"
    )
    return (
        f"{rule}<p>The numbers behind this page, and nothing else, are in it as JSON "
        f'(<code>script#numbers</code>). <a class="download" download="report.json" '
        f'href="data:application/json;base64,{data}">Download the numbers</a></p>'
    )


def _nothing(text: str) -> str:
    return f'<p class="note">{escape(text)}</p>'
