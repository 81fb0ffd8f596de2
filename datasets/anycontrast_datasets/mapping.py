"""The mapping table: what the scan took each file for, to be read, corrected and applied again.

In: the studies and refusals of a scan. Out: `private/mapping.csv`, one row per input image file,
with a blank column `decision`. A person writes a contrast or `refuse` there and scans again with
`scan.mapping` set to the table. The table names source files, so it never leaves the private
folder; a rescan writes the rows anew and keeps the decisions.
"""

import csv
import io
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from anycontrast_datasets.contrast import UNKNOWN, UnknownContrastError, resolve_contrast
from anycontrast_datasets.files import write_atomically
from anycontrast_datasets.ledger import Refusal, escape_cell, unescape_cell
from anycontrast_datasets.study import ManifestError, Study

MAPPING_NAME = "mapping.csv"
REFUSE = "refuse"
"""A decision: leave the file out."""
COLUMNS = (
    *("location", "study_id", "status", "contrast", "confidence", "disagreement"),
    *("evidence", "decision"),
)


def read_decisions(path: Path) -> dict[str, str]:
    """Return location -> contrast name or `refuse`, of the rows with a decision.

    Raises:
        ManifestError: no such file, columns missing, a file twice, or a decision that is neither a
            contrast nor `refuse`.
    """
    rows = _read_rows(path)
    decisions: dict[str, str] = {}
    for number, row in rows:
        location, text = unescape_cell(row["location"]), unescape_cell(row["decision"]).strip()
        if not text:
            continue
        if location in decisions:
            raise _error(path, number, f"{location!r} has a decision already; keep one of the rows")
        decisions[location] = _decision(path, number, text)
    return decisions


def check_decisions(decisions: Mapping[str, str], inputs: Iterable[str], path: Path) -> None:
    """Refuse decisions on files that the source does not have.

    Raises:
        ManifestError: naming the first of them.
    """
    if unknown := sorted(set(decisions) - set(inputs)):
        raise ManifestError(
            f"reading the mapping {path}: every row with a decision must name an image file of the "
            f"source, found {len(unknown)} that do not, e.g. {unknown[0]!r}; correct `location` or "
            "clear the decision"
        )


def write_mapping(
    path: Path,
    studies: Sequence[Study],
    refusals: Sequence[Refusal],
    *,
    decisions: Mapping[str, str],
    stands_for: Mapping[str, Sequence[str]],
) -> None:
    """Write the table, readable by the owner only; cells are safe to open in a spreadsheet.

    Args:
        path: replaced.
        studies: accepted.
        refusals: one per refused file.
        decisions: kept in their rows; those on files that are gone keep a row of their own.
        stands_for: location of a converted volume -> the input files it was made of.
    """
    rows = {row[0]: row for row in (*_accepted(studies, stands_for), *_refused(refusals))}
    for location in decisions:
        rows.setdefault(location, (location, "", "missing", "", "", "", ""))
    buffer = io.StringIO(newline="")
    writer = csv.writer(buffer, lineterminator="\n")
    writer.writerow(COLUMNS)
    for location, row in sorted(rows.items()):
        cells = (*row, decisions.get(location, ""))
        writer.writerow([escape_cell(cell) for cell in cells])
    write_atomically(path, buffer.getvalue().encode("utf-8"), mode=0o600)


def _accepted(
    studies: Sequence[Study], stands_for: Mapping[str, Sequence[str]]
) -> Iterable[tuple[str, ...]]:
    for study in studies:
        for volume in study.volumes:
            location = stands_for.get(volume.location, (volume.location,))[0]
            disagrees = "yes" if "contrast_disagreement" in volume.flags else ""
            yield (
                *(location, study.study_id, "accepted", volume.contrast),
                *(f"{volume.confidence:.2f}", disagrees, "; ".join(volume.evidence)),
            )
        if study.label is not None:
            location = stands_for.get(study.label.location, (study.label.location,))[0]
            yield location, study.study_id, "accepted", "label", "", "", ""


def _refused(refusals: Sequence[Refusal]) -> Iterable[tuple[str, ...]]:
    for refusal in refusals:
        yield refusal.location, refusal.study_id, refusal.code, "", "", "", refusal.reason


def _decision(path: Path, number: int, text: str) -> str:
    if text.lower() == REFUSE:
        return REFUSE
    try:
        contrast = resolve_contrast(text)
    except UnknownContrastError as error:
        raise _error(
            path, number, f"decision {text!r} is no contrast; nearest is {error.nearest}"
        ) from error
    if contrast == UNKNOWN:
        raise _error(path, number, f"decision {text!r} decides nothing; name a contrast or refuse")
    return contrast


def _read_rows(path: Path) -> list[tuple[int, dict[str, str]]]:
    if not path.is_file():
        raise ManifestError(f"reading the mapping: no file at {path}; correct scan.mapping")
    try:
        stream = io.StringIO(path.read_text(encoding="utf-8-sig"), newline="")
        header_line = stream.getvalue().partition("\n")[0]
        delimiter = max(",", ";", "\t", key=header_line.count)
        records = list(csv.reader(stream, delimiter=delimiter, strict=True))
    except (UnicodeDecodeError, csv.Error) as error:
        raise ManifestError(
            f"reading the mapping {path}: must be UTF-8 text with columns, found: {error}; save it "
            "as CSV UTF-8"
        ) from error
    header = [cell.strip().lower() for cell in records[0]] if records else []
    if missing := [name for name in ("location", "decision") if name not in header]:
        raise ManifestError(
            f"reading the mapping {path}: columns location and decision are needed, {missing} not "
            f"among {header}; correct the first line"
        )
    rows = []
    for number, record in enumerate(records[1:], start=2):
        if len(record) > len(header):
            raise _error(path, number, f"{len(record)} cells for {len(header)} columns")
        if any(cell.strip() for cell in record):
            cells = dict.fromkeys(header, "") | dict(zip(header, record, strict=False))
            rows.append((number, cells))
    return rows


def _error(path: Path, number: int, what: str) -> ManifestError:
    return ManifestError(f"reading the mapping {path}, row {number}: {what}; correct the row")
