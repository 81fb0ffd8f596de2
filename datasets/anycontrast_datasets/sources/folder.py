"""Any folder plus a table that says what each file is.

In: a directory, and a CSV or TSV table with the columns file, subject, session, contrast, label.
`file` is relative to the directory. A blank contrast is guessed from the file name and may be
corrected by the picture; a given one is the word of a person and stands. A non-blank label makes
the file a voxel label of its study. Further columns are not read.
"""

import csv
import io
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from anycontrast_datasets.ledger import Refusal, refuse
from anycontrast_datasets.sources.claims import (
    ContrastReading,
    FileClaim,
    SourceOptions,
    read_name,
    read_stated,
)
from anycontrast_datasets.sources.grouping import build_studies
from anycontrast_datasets.sources.listing import is_nifti, list_images, refuse_format
from anycontrast_datasets.study import ManifestError, Study

COLUMNS = ("file", "subject", "session", "contrast", "label")


@dataclass(frozen=True, kw_only=True)
class TableRow:
    """One row of the table, cells stripped of blanks."""

    file: str
    subject: str
    session: str
    contrast: str
    label: str


def scan(root: Path, options: SourceOptions, table: Path) -> Iterator[Study | Refusal]:
    """Yield the studies that the table names and a refusal for every other image of the folder.

    Raises:
        ManifestError: folder or table missing, a column missing, a row that contradicts itself.
    """
    rows = read_table(table)
    found = list_images(root)
    stated = {row.file for row in rows}
    claims = [_claim(root, row) for row in rows]
    claims += [_refuse_unnamed(location) for location in found if location not in stated]
    yield from build_studies(root, claims, options)


def read_table(path: Path) -> list[TableRow]:
    """Read and check a table; every row names another file.

    Raises:
        ManifestError: missing file or column, text that is not UTF-8, a blank file or subject, a
            path that leaves the folder, one file twice.
    """
    if not path.is_file():
        raise ManifestError(f"reading the table: no file at {path}; correct scan.table")
    try:
        text = path.read_text(encoding="utf-8-sig")
        stream = io.StringIO(text, newline="")
        records = list(csv.reader(stream, delimiter=_delimiter(text), strict=True))
    except (UnicodeDecodeError, csv.Error) as error:
        raise ManifestError(
            f"reading the table {path}: must be UTF-8 text with columns, found: {error}; save it "
            "as CSV UTF-8"
        ) from error
    header = [cell.strip().lower() for cell in records[0]] if records else []
    if missing := [name for name in COLUMNS if name not in header]:
        raise ManifestError(
            f"reading the table {path}: columns {', '.join(COLUMNS)} are needed, {missing} not "
            f"among {header}; correct the first line (cells may be blank, columns not)"
        )
    rows = []
    seen: dict[str, int] = {}
    for number, record in enumerate(records[1:], start=2):
        if any(cell.strip() for cell in record):
            row = _row(path, number, header, record)
            if row.file in seen:
                raise _row_error(path, number, f"{row.file!r} is in row {seen[row.file]} already")
            seen[row.file] = number
            rows.append(row)
    return rows


def _delimiter(text: str) -> str:
    header = text.partition("\n")[0]
    return max(",", "\t", ";", key=header.count)


def _row(path: Path, number: int, header: list[str], record: list[str]) -> TableRow:
    if len(record) > len(header):
        raise _row_error(path, number, f"{len(record)} cells for {len(header)} columns")
    cells = dict(zip(header, (cell.strip() for cell in record), strict=False))
    row = TableRow(**{name: cells.get(name, "") for name in COLUMNS})
    for name, value in (("file", row.file), ("subject", row.subject)):
        if not value:
            raise _row_error(path, number, f"{name} must not be blank")
    parts = PurePosixPath(row.file)
    if parts.is_absolute() or ".." in parts.parts:
        raise _row_error(path, number, f"file must lie in the folder, found {row.file!r}")
    return TableRow(**{**vars(row), "file": parts.as_posix()})


def _row_error(path: Path, number: int, what: str) -> ManifestError:
    return ManifestError(f"reading the table {path}, row {number}: {what}; correct the row")


def _claim(root: Path, row: TableRow) -> FileClaim | Refusal:
    if not (root / row.file).is_file():
        return refuse(row.file, "missing_file", "the table names it, the folder does not have it")
    if refusal := refuse_format(row.file):
        return refusal
    if row.label:
        return FileClaim(location=row.file, subject=row.subject, session=row.session, is_label=True)
    reading = _read_contrast(row)
    if reading.is_mask:
        reason = "looks like a label by its name, and the table states neither contrast nor label"
        return refuse(row.file, "label_not_stated", reason)
    return FileClaim(
        location=row.file,
        subject=row.subject,
        session=row.session,
        reading=reading,
        is_stated=bool(row.contrast),
    )


def _read_contrast(row: TableRow) -> ContrastReading:
    return read_stated(row.contrast, where="table") if row.contrast else read_name(row.file)


def _refuse_unnamed(location: str) -> Refusal:
    refusal = None if is_nifti(location) else refuse_format(location)
    return refusal or refuse(location, "not_in_table", "no row of the table names this file")
