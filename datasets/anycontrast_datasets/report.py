"""Report: what is in a data set, as one HTML page that can be handed on.

In: a manifest, and shards for pictures. Out: a page of counts, contrast sets, geometry,
intensities, quality, refusals and near-duplicates. It names no file and no person, withholds rare
cells, opens without a network, and is the same bytes for the same input.
"""

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from anycontrast_datasets.duplicates import NEAR_BITS
from anycontrast_datasets.duplicates import near_duplicates as find_near_duplicates
from anycontrast_datasets.files import write_atomically
from anycontrast_datasets.ledger import read_ledger
from anycontrast_datasets.manifest import MANIFEST_NAME, SCHEMA_VERSION, manifest_fingerprint
from anycontrast_datasets.manifest_table import ManifestTable
from anycontrast_datasets.report_columns import Columns, read_columns
from anycontrast_datasets.report_html import page
from anycontrast_datasets.report_numbers import (
    evidence,
    faces,
    flags,
    labels,
    ledger,
    near_duplicates,
    table_of,
)
from anycontrast_datasets.report_pictures import Picture, montage
from anycontrast_datasets.report_sets import contrast_sets
from anycontrast_datasets.report_spread import confidence, geometry, intensities
from anycontrast_datasets.study import ManifestError

logger = logging.getLogger(__name__)

REPORT_NAME = "report.html"
LEDGER_PATH = "private/ledger.csv"
MIN_CELL = 10
"""Fewest subjects behind a count that is shown."""


def write_report(
    manifest_dir: Path,
    out: Path,
    *,
    shards: Path | str | None = None,
    min_cell: int = MIN_CELL,
    montage: bool = True,
    synthetic: bool = False,
    max_hash_bits: int = NEAR_BITS,
) -> dict[str, Any]:
    """Write the report of a manifest.

    Args:
        manifest_dir: Folder of the manifest, or the manifest itself.
        out: The HTML file; its folder is made.
        shards: Folder or address of prepared studies, for pictures; None for a page without.
        min_cell: Fewest subjects behind a count that is shown; 1 shows everything.
        montage: Show slices of volumes whose face is stripped, defaced or refaced.
        synthetic: The data are of nobody: slices of every volume may be shown.
        max_hash_bits: Near-duplicates differ in at most this many bits of their image hash.

    Returns:
        JSON-ready: where the report lies, its size, and the totals as it shows them.

    Raises:
        ManifestError: there is no usable manifest, or the ledger beside it is damaged.
        ShardError: `shards` cannot be opened.
        ValueError: `min_cell` is below 1.
    """
    if min_cell < 1:
        raise ValueError(f"report.min_cell must be at least 1, got {min_cell}; use 10")
    if manifest_dir.name == MANIFEST_NAME:
        manifest_dir = manifest_dir.parent
    path = manifest_dir / MANIFEST_NAME
    columns = read_columns(ManifestTable.open(path))
    if not len(columns.set_S):
        raise ManifestError(f"reporting on {path}: it holds no study; scan again")
    numbers = report_numbers(columns, min_cell, max_hash_bits)
    numbers |= {
        "manifest": manifest_fingerprint(path),
        "synthetic": synthetic,
        "ledger": _ledger(manifest_dir / LEDGER_PATH, min_cell),
    }
    pictures, note = _pictures(columns, numbers, shards, allowed=montage, synthetic=synthetic)
    content = page(numbers, pictures, note).encode()
    out.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(out, content)
    logger.info("report in %s, %.1f kB", out, len(content) / 1e3)
    return {
        "report": str(out),
        "bytes": len(content),
        "min_cell": min_cell,
        "pictures": sum(map(len, pictures.values())),
        **numbers["totals"],
    }


def report_numbers(columns: Columns, min_cell: int, max_hash_bits: int) -> dict[str, Any]:
    """Return everything a report says of a manifest, rare cells withheld; JSON-ready."""
    linked = contrast_sets(columns, min_cell)
    totals, contrasts = linked["totals"], linked["contrasts"]
    tables = {
        "splits": (columns.split, "no split"),
        "datasets": (columns.dataset, "no name"),
        "sites": (columns.site, "not known"),
    }
    found = {
        name: table_of(columns, groups, min_cell, totals, blank=blank, is_hashed=name == "sites")
        for name, (groups, blank) in tables.items()
    }
    return {
        "schema_version": SCHEMA_VERSION,
        "min_cell": min_cell,
        "totals": {
            **totals,
            "labelled": labels(columns, min_cell, totals["studies"]),
            "sites": len(set(columns.site.names) - {""}),
        },
        **found,
        "contrasts": contrasts,
        "contrast_sets": linked["contrast_sets"],
        "geometry": geometry(columns, contrasts, min_cell),
        "intensities": intensities(columns, min_cell),
        "confidence": confidence(columns, min_cell),
        "evidence": evidence(columns, min_cell, totals["volumes"]),
        "flags": flags(columns, min_cell, totals["volumes"]),
        "faces": faces(columns, contrasts, min_cell),
        "near_duplicates": _near_duplicates(columns, min_cell, max_hash_bits),
    }


def _near_duplicates(columns: Columns, min_cell: int, max_bits: int) -> dict[str, Any] | None:
    if not any(columns.image_hashes):
        return None
    pairs = [(i, j) for i, j, _ in find_near_duplicates(columns.image_hashes, max_bits)]
    return near_duplicates(columns, pairs, max_bits, min_cell)


def _ledger(path: Path, min_cell: int) -> dict[str, Any] | None:
    if not path.is_file():
        return None
    return ledger([refusal.code for refusal in read_ledger(path)], min_cell)


def _pictures(
    columns: Columns,
    numbers: Mapping[str, Any],
    shards: Path | str | None,
    *,
    allowed: bool,
    synthetic: bool,
) -> tuple[Mapping[str, Sequence[Picture]], str]:
    """Return pictures per contrast, and what to say about them or their absence."""
    from anycontrast_datasets.store.reader import describe_store, open_store

    if not allowed:
        return {}, "Pictures were switched off (montage=false)."
    if shards is None:
        return {}, "There are no pictures: no shards were given to take them from."
    if describe_store(shards).get("manifest_fingerprint") != numbers["manifest"]:
        # What the manifest says of faces holds for the voxels it was made with, and no others.
        return {}, "There are no pictures: the shards were not made from this manifest."
    shown = [row["name"] for row in numbers["contrasts"] if isinstance(row["studies"], int)]
    states = {
        (columns.study_ids[study], columns.contrast.names[contrast]): columns.face.names[face]
        for study, contrast, face in zip(
            columns.study_V.tolist(),
            columns.contrast.codes.tolist(),
            columns.face.codes.tolist(),
            strict=True,
        )
    }
    found = montage(open_store(shards), shown, states, any_face=synthetic)
    if not found:
        return {}, (
            "There are no pictures: of no volume in the shards it is known that its face is "
            "stripped, defaced or refaced."
        )
    if synthetic:
        return found, ""
    return found, (
        "These pictures show people, without their faces. Hand this page on only if the licence of "
        "every data set allows it; montage=false leaves them out."
    )
