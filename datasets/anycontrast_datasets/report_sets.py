"""Studies by contrast set and by contrast: one linked system of counts, protected as one.

A contrast's studies are a sum over the sets that hold it, and volumes are a weighted sum, so none
of these tables is safe by itself.
"""

from typing import Any

import numpy as np

from anycontrast_datasets.contrast import CONTRAST_NAMES, contrast_id
from anycontrast_datasets.report_cells import Shown, System, by_count, protect, show
from anycontrast_datasets.report_columns import Columns, Ints, num_people, people_per

MAX_SETS = 24
"""Contrast sets listed one by one; the rest is counted in one row."""


def contrast_sets(columns: Columns, least: int) -> dict[str, Any]:
    """Count studies by contrast set and by contrast, and all of them, as one linked system.

    Returns:
        `totals` (studies, subjects, volumes), `contrasts` and `contrast_sets`; sets beyond the
        most frequent, and rare ones if there are more than fit, are counted together.
    """
    sets, set_of_S, counts = np.unique(columns.set_S, return_inverse=True, return_counts=True)
    people = people_per(set_of_S, columns.person_S, len(sets))
    order = sorted(range(len(sets)), key=lambda i: (-counts[i], int(sets[i])))
    listed = order[:MAX_SETS]
    if len(order) > MAX_SETS:
        listed = [i for i in listed if people[i] >= least]
    rest = sorted(set(order) - set(listed))
    names = [name for name in CONTRAST_NAMES if (sets & np.uint64(1 << contrast_id(name))).any()]
    has_CA = np.array([(sets >> np.uint64(contrast_id(n))) & np.uint64(1) for n in names]) > 0
    in_rest = np.isin(np.arange(len(sets)), rest)
    # Rows: listed sets, the rest, contrasts, all studies, all volumes, then what no table lists:
    # studies without a contrast, and studies of the rest with it.
    parts = [np.eye(len(sets))[listed], in_rest[None], has_CA, np.ones((1, len(sets)))]
    parts += [has_CA.sum(axis=0, keepdims=True), ~has_CA, has_CA & in_rest]
    parts_RA = np.vstack([part.astype(np.float64) for part in parts])
    people_R = _people_of_rows(parts_RA > 0, set_of_S, columns.person_S)
    first_contrast = len(listed) + 1
    total = first_contrast + len(names)
    system = System(
        parts_RA,
        np.asarray(counts, dtype=np.int64),
        people_R,
        pinned=frozenset({total, total + 1}),
        unlisted=frozenset(range(total + 2, len(parts_RA))),
    )
    shown = show(system.values_R, protect(system, least), least)
    rows = [
        {"contrasts": [n for n, has in zip(names, has_CA[:, i], strict=True) if has], "studies": s}
        for i, s in zip(listed, shown, strict=False)
    ]
    rows.sort(key=by_count("studies", lambda row: "+".join(row["contrasts"])))
    num_subjects = num_people(columns)
    subjects: Shown = num_subjects if num_subjects >= least else f"< {least}"
    return {
        "totals": {
            "studies": shown[total],
            "subjects": subjects,
            "volumes": shown[total + 1],
        },
        "contrasts": [
            {"name": name, "studies": cell}
            for name, cell in zip(names, shown[first_contrast:total], strict=True)
        ],
        "contrast_sets": {
            "rows": rows,
            "other": {"sets": len(rest), "studies": shown[len(listed)]} if rest else None,
        },
    }


def _people_of_rows(member_RA: Any, atom_S: Ints, person: Ints) -> Ints:
    """[R], different people behind the atoms of each row."""
    return np.array([len(np.unique(person[row[atom_S]])) for row in member_RA], dtype=np.int64)
