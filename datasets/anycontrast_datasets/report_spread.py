"""The distributions of a report: spacing, shape, confidence and intensities.

In: the columns of a manifest. Out: plain JSON values. Bins of a histogram are joined until each
holds enough subjects, so that none has to be withheld; intensities are medians over the volumes of
a contrast at a site, of sites with enough subjects only.
"""

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import numpy as np

from anycontrast_datasets.contrast import CONTRAST_NAMES
from anycontrast_datasets.report_cells import merge_bins
from anycontrast_datasets.report_columns import Columns, Floats
from anycontrast_datasets.report_text import short_names

MAX_SITES = 12
"""Sites listed for a contrast, those with most volumes."""
_USUAL_MM = (
    *(0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0, 1.1, 1.2, 1.3, 1.5, 1.7, 2.0, 2.2, 2.5),
    *(3.0, 3.3, 3.6, 4.0, 4.4, 5.0, 5.5, 6.0, 6.6, 7.0, 8.0, 10.0, 12.0, 15.0, 20.0),
)
# Bins lie around the usual values, so that rounding does not part them; sides likewise.
SPACING_EDGES: Floats = np.array([(a * b) ** 0.5 for a, b in pairwise((0.08, *_USUAL_MM, 25.0))])
SIDE_EDGES: Floats = np.array([8.0 + 16.0 * n for n in range(65)])
CONFIDENCE_EDGES: Floats = np.array([n / 20 for n in range(21)])

Bins = list[dict[str, float]]


def histogram(values: Floats, people: Any, edges: Floats, least: int) -> Bins | None:
    """Count values per bin; None if they come from fewer than `least` people.

    Values beyond the outermost edges fall into the outermost bins.

    Args:
        values: [N].
        people: [N] whose value it is.
        edges: [B + 1], ascending.
        least: Fewest people of a bin.
    """
    bins = np.clip(np.searchsorted(edges, values, side="right") - 1, 0, len(edges) - 2)
    merged = merge_bins(bins, people, len(edges) - 1, least)
    if merged is None:
        return None
    return [
        {"from": _round(edges[first]), "to": _round(edges[last]), "volumes": count}
        for first, last, count in merged
    ]


def geometry(columns: Columns, contrasts: Sequence[dict[str, Any]], least: int) -> dict[str, Any]:
    """Histograms per contrast whose count is shown: finest and coarsest axis, shape of the grid."""
    measures: dict[str, tuple[Any, Floats]] = {
        "spacing_finest_mm": (columns.spacing_V3.min(axis=1, initial=np.inf), SPACING_EDGES),
        "spacing_coarsest_mm": (columns.spacing_V3.max(axis=1, initial=0), SPACING_EDGES),
        "side_longest_vox": (columns.shape_V3.max(axis=1, initial=0), SIDE_EDGES),
        "side_shortest_vox": (columns.shape_V3.min(axis=1, initial=2**31), SIDE_EDGES),
    }
    names = [row["name"] for row in contrasts if isinstance(row["studies"], int)]
    found: dict[str, Any] = {}
    for measure, (values, edges) in measures.items():
        rows = []
        for name in names:
            chosen = columns.contrast.codes == CONTRAST_NAMES.index(name)
            bins = histogram(values[chosen], columns.person_V[chosen], edges, least)
            if bins is not None:
                rows.append(
                    {"name": name, "median": _round(float(np.median(values[chosen]))), "bins": bins}
                )
        found[measure] = rows
    return found


def confidence(columns: Columns, least: int) -> Bins | None:
    """Histogram of the confidence in the contrast, over all volumes."""
    return histogram(columns.confidence_V, columns.person_V, CONFIDENCE_EDGES, least)


def intensities(columns: Columns, least: int) -> list[dict[str, Any]]:
    """Intensity of the foreground per contrast and site, in source units.

    Returns:
        One entry per contrast, in the order of the vocabulary: `sites`, each with the medians over
        its volumes of the 1st, 50th and 99th percentile, by ascending middle; `all`, the same over
        every volume; `more_sites`, how many are not listed.
    """
    known = np.isfinite(columns.intensity_V3).all(axis=1)
    site_V = columns.site.codes[columns.study_V]
    labels = short_names(columns.site.names)
    is_any_known = any(columns.site.names)
    found = []
    for code, name in enumerate(CONTRAST_NAMES):
        chosen = known & (columns.contrast.codes == code)
        if len(np.unique(columns.person_V[chosen])) < least or not chosen.any():
            continue
        sites, counts = np.unique(site_V[chosen], return_counts=True)
        order = sorted(range(len(sites)), key=lambda i: (-counts[i], int(sites[i])))
        rows: list[dict[str, Any]] = []
        more = 0
        for place in order if is_any_known else ():
            if len(rows) >= MAX_SITES or counts[place] < least:
                more += 1
                continue
            site = int(sites[place])
            here = chosen & (site_V == site)
            if len(np.unique(columns.person_V[here])) < least:
                more += 1
                continue
            label = labels[site] or "not known"
            rows.append({"site": label, **_medians(columns.intensity_V3[here])})
        rows.sort(key=lambda row: (row["p50"], row["site"]))
        everything = _medians(columns.intensity_V3[chosen])
        found.append({"name": name, "all": everything, "sites": rows, "more_sites": more})
    return found


def _medians(values_N3: Floats) -> dict[str, float]:
    low, middle, high = np.median(values_N3, axis=0)
    return {"p1": _round(low), "p50": _round(middle), "p99": _round(high)}


def _round(value: float) -> float:
    """Four significant digits: what a reader can use, and the same on every machine."""
    return float(f"{float(value):.4g}")
