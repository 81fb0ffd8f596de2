"""The counts of a report: studies, contrast sets, sites, faces, flags, with rare cells withheld.

In: the columns of a manifest. Out: plain JSON values, and nothing in them that must not be shown;
pages and charts are drawn from these values alone. A cell is rare if fewer than `min_cell`
different subjects are behind it, whatever it counts.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from anycontrast_datasets.contrast import CONTRAST_NAMES
from anycontrast_datasets.ledger import DEFAULT_REMEDY, REMEDIES
from anycontrast_datasets.report_cells import (
    Shown,
    State,
    System,
    by_count,
    partition,
    protect,
    show,
)
from anycontrast_datasets.report_columns import Codes, Columns, Ints, num_people, people_per
from anycontrast_datasets.report_text import reason_code, short_names, visible
from anycontrast_datasets.study import FACE_STATES, SPLITS

MAX_ROWS = 16
"""Datasets and sites listed by name; the rest is counted in one row."""

Row = dict[str, Any]


def table_of(
    columns: Columns,
    groups: Codes,
    least: int,
    totals: Mapping[str, Shown],
    *,
    blank: str,
    is_hashed: bool = False,
) -> list[Row]:
    """Count studies, subjects and volumes by dataset, split or site.

    Args:
        columns: Of the manifest.
        groups: One code per study.
        least: Fewest subjects of a row that is shown.
        totals: What is shown of all studies, by the same names.
        blank: What an empty name is called.
        is_hashed: Names are hashes, of which the first few characters tell them apart.

    Returns:
        `name`, the three counts, and `rest` where a row joins those that are not listed.
    """
    volumes = np.bincount(columns.study_V, minlength=len(columns.set_S))
    codes, names = _with_rest(groups, blank, is_hashed=is_hashed)
    measures = {
        "studies": np.bincount(codes, minlength=len(names)),
        "subjects": people_per(codes, columns.person_S, len(names)),
        "volumes": np.bincount(codes, weights=volumes, minlength=len(names)).astype(np.int64),
    }
    people = measures["subjects"]
    systems = []
    for name, counts in measures.items():
        # A subject may be in several rows; those of a split or a dataset add up.
        adds_up = counts.sum() == num_people(columns) if name == "subjects" else True
        is_total_shown = isinstance(totals[name], int) and adds_up
        systems.append(
            partition(counts, people, total_people=num_people(columns) if is_total_shown else None)
        )
    states = _protect_together(systems, least, len(names))
    cells = {name: show(counts, states, least) for name, counts in measures.items()}
    rows = [
        {"name": name, **{measure: cells[measure][i] for measure in measures}}
        for i, name in enumerate(names)
    ]
    if set(groups.names) <= set(SPLITS):
        return sorted(rows, key=lambda row: SPLITS.index(row["name"]))
    named, rest = rows[:MAX_ROWS], rows[MAX_ROWS:]
    return sorted(named, key=by_count("studies")) + [{**row, "rest": True} for row in rest]


def faces(columns: Columns, contrasts: Sequence[Row], least: int) -> list[Row]:
    """Count volumes by contrast and what is known of a face; contrasts whose count is shown."""
    rows = []
    for contrast in contrasts:
        if not isinstance(contrast["studies"], int):
            continue
        chosen = columns.contrast.codes == CONTRAST_NAMES.index(contrast["name"])
        state_V = np.array(columns.face.codes[chosen])
        names = [name for name in FACE_STATES if name in columns.face.names]
        codes = np.array([names.index(n) for n in columns.face.names])[state_V]
        cells = _volume_cells(columns, chosen, codes, len(names), least, contrast["studies"])
        rows.append(
            {
                "name": contrast["name"],
                "volumes": contrast["studies"],
                **dict(zip(names, cells, strict=True)),
            }
        )
    return rows


def evidence(columns: Columns, least: int, num_volumes: Shown) -> list[Row]:
    """Count volumes by what had the strongest say in their contrast."""
    everything = np.ones(len(columns.study_V), dtype=np.bool_)
    names = columns.evidence.names
    cells = _volume_cells(
        columns, everything, columns.evidence.codes, len(names), least, num_volumes
    )
    rows = [{"name": visible(n), "volumes": c} for n, c in zip(names, cells, strict=True)]
    return sorted(rows, key=by_count("volumes"))


def flags(columns: Columns, least: int, num_volumes: Shown) -> list[Row]:
    """Count volumes by quality flag; a volume may have several."""
    rows = []
    for code, name in enumerate(columns.flag.names):
        has_V = np.zeros(len(columns.study_V), dtype=np.bool_)
        has_V[columns.volume_F[columns.flag.codes == code]] = True
        cell = _one_volume_cell(columns, has_V, least, num_volumes)
        rows.append({"name": visible(name), "volumes": cell})
    return sorted(rows, key=by_count("volumes"))


def labels(columns: Columns, least: int, num_studies: Shown) -> Shown:
    """Count studies with a voxel label."""
    has_S = columns.has_label_S
    return _one_cell(has_S, columns.person_S, least, num_studies)


def ledger(codes: Sequence[str], least: int) -> dict[str, Any]:
    """Count refused files by reason code, with what can be done about each; no file is named."""
    by_code = Counter(reason_code(code) for code in codes)
    names = sorted(by_code)
    counts = [by_code[name] for name in names]
    total = sum(counts)
    states = protect(partition(counts, counts, total_people=total), least) if counts else []
    rows = [
        {"name": name, "files": cell, "remedy": REMEDIES.get(name, DEFAULT_REMEDY)}
        for name, cell in zip(names, show(counts, states, least), strict=True)
    ]
    return {
        "files": total if total >= least or total == 0 else f"< {least}",
        "rows": sorted(rows, key=by_count("files")),
    }


def near_duplicates(
    columns: Columns, pairs: Sequence[tuple[int, int]], max_bits: int, least: int
) -> dict[str, Any]:
    """Count pairs of volumes whose pictures are nearly the same, by what the pair shares.

    Args:
        columns: Of the manifest.
        pairs: Volume numbers.
        max_bits: Largest difference of two image hashes that counts as near.
        least: Fewest subjects behind a count that is shown.
    """
    split_V = columns.split.codes[columns.study_V]
    kinds: dict[str, list[tuple[int, int]]] = {
        "same subject": [],
        "two subjects, same split": [],
        "two subjects, across splits": [],
    }
    for one, two in pairs:
        if columns.person_V[one] == columns.person_V[two]:
            kinds["same subject"].append((one, two))
        elif split_V[one] == split_V[two]:
            kinds["two subjects, same split"].append((one, two))
        else:
            kinds["two subjects, across splits"].append((one, two))
    counts = [len(found) for found in kinds.values()]
    people = [
        num_people(columns, np.array(found).ravel()) if found else 0 for found in kinds.values()
    ]
    states = protect(partition(counts, people, total_people=None), least)
    compared = np.array([bool(text) for text in columns.image_hashes])
    identical = _repeated(columns.voxels_hash)
    num_volumes = len(columns.study_V)
    return {
        "max_bits": max_bits,
        "compared": _one_volume_cell(columns, compared, least, num_volumes),
        "pairs": [
            {"name": name, "pairs": cell}
            for name, cell in zip(kinds, show(counts, states, least), strict=True)
        ],
        "identical_volumes": _one_volume_cell(columns, identical, least, num_volumes),
    }


def _repeated(hashes: Codes) -> Any:
    """[V] bool, the same non-empty hash as another volume."""
    times = np.bincount(hashes.codes, minlength=len(hashes.names))
    if "" in hashes.names:
        times[hashes.names.index("")] = 0
    return times[hashes.codes] > 1


def _with_rest(groups: Codes, blank: str, *, is_hashed: bool) -> tuple[Ints, list[str]]:
    """Return codes and names in the order of frequency, the least frequent ones joined."""
    counts = np.bincount(groups.codes, minlength=len(groups.names))
    order = sorted(range(len(counts)), key=lambda i: (-counts[i], groups.names[i]))
    kept = order[:MAX_ROWS]
    place = np.full(len(order), len(kept), dtype=np.int64)
    place[kept] = np.arange(len(kept))
    labels = short_names(groups.names) if is_hashed else [visible(n) for n in groups.names]
    names = [labels[i] or blank for i in kept]
    if len(kept) < len(order):
        names.append(f"{len(order) - len(kept)} more")
    return place[groups.codes], names


def _protect_together(systems: Sequence[System], least: int, num_rows: int) -> list[State]:
    """Protect several measures of the same rows: what one withholds, all withhold."""
    withheld: frozenset[int] = frozenset()
    while True:
        before = withheld
        for system in systems:
            states = protect(system, least, withheld)[:num_rows]
            withheld |= {i for i, state in enumerate(states) if state is State.WITHHELD}
        if withheld == before:
            # Rare is a matter of people, the same for every measure.
            return states


def _volume_cells(
    columns: Columns, chosen: Any, codes: Ints, num_rows: int, least: int, total: Shown
) -> list[Shown]:
    """Count the chosen volumes by code; they add up to `total`."""
    person = columns.person_V[chosen]
    counts = np.bincount(codes, minlength=num_rows)
    people = people_per(codes, person, num_rows)
    total_people = len(np.unique(person)) if isinstance(total, int) else None
    return show(counts, protect(partition(counts, people, total_people=total_people), least), least)


def _one_volume_cell(columns: Columns, has_V: Any, least: int, total: Shown) -> Shown:
    return _one_cell(has_V, columns.person_V, least, total)


def _one_cell(has: Any, person: Ints, least: int, total: Shown) -> Shown:
    """Count one thing, unless the count or what is missing to the total is rare."""
    counts = np.array([has.sum(), (~has).sum()])
    people = np.array([len(np.unique(person[has])), len(np.unique(person[~has]))])
    everyone = len(np.unique(person))
    parts = np.array([[1.0, 0.0], [0.0, 1.0], [1.0, 1.0]])
    is_total_shown = isinstance(total, int)
    system = System(
        parts if is_total_shown else parts[:2],
        counts,
        np.append(people, everyone) if is_total_shown else people,
        pinned=frozenset({2}) if is_total_shown else frozenset(),
        unlisted=frozenset({1}),
    )
    return show(counts, protect(system, least), least)[0]
