"""The ledger: every input file that was not taken, with a reason code, a reason and a remedy.

In: refusals from the sources. Out: a CSV that spreadsheets can open without running a cell as a
formula. It names source files, so it lies in the private folder of a manifest and never leaves it.
"""

import csv
import io
from collections.abc import Iterable
from dataclasses import asdict, dataclass, fields
from pathlib import Path

from anycontrast_datasets.files import write_atomically
from anycontrast_datasets.study import ManifestError

REMEDIES: dict[str, str] = {
    "unreadable_header": "convert the file again, or leave it out",
    "truncated": "copy or download the file again; it ends too early",
    "gzip_corrupt": "copy or download the file again; its compressed bytes are damaged",
    "too_large": "check the header; if the size is right raise max_bytes",
    "header_data_mismatch": "convert the file again; header and data disagree",
    "not_3d": "extract one 3D volume per contrast (e.g. the mean, or one echo) and scan that",
    "rgb_voxels": "scan the scalar map the colours were made from",
    "complex_voxels": "save the magnitude as real numbers",
    "nonfinite_affine": "convert from the original again; the affine is not finite",
    "singular_affine": "convert from the original again; the affine cannot be inverted",
    "spacing_out_of_range": "correct the voxel spacing in the header; is it in mm?",
    "origin_out_of_range": "correct the header; the volume lies metres away from the scanner",
    "nonfinite_voxels": "find out why voxels are NaN or infinite, then repair or leave out",
    "constant_volume": "leave the file out; every voxel has the same value",
    "empty_file": "copy or download the file again; it has no bytes",
    "missing_file": "correct the file name in the table, or fetch the file a link points to",
    "unreadable_file": "check the permissions of the file",
    "bad_file_name": "rename the file; its name is not valid UTF-8",
    "unsupported_format": "convert the file to NIfTI (.nii or .nii.gz)",
    "needs_dicom_source": "scan the folder with source=dicom",
    "not_dicom": "leave the file out, or scan it with the source of its kind",
    "dicomdir": "nothing to do; a directory file holds no image",
    "dicom_unreadable": "export the file again, uncompressed and little-endian",
    "link_outside_root": "put the files themselves under the root, or scan where the link leads",
    "incomplete_series": "fetch the missing slices of the series, or leave it out",
    "localizer": "nothing to do; localizers are not learned from",
    "burnt_in_text": "leave the picture out; text in it may identify somebody",
    "duplicate_instance": "nothing to do; another file with the same image is used",
    "conflicting_instance": "find out which of the files is right and leave the others out",
    "conversion_failed": "export the series again, or convert it yourself and scan the result",
    "no_subject": "name the file by the layout of its source, or use source=folder with a table",
    "not_in_table": "add a row for the file, or move it out of the scanned folder",
    "unknown_contrast": "state a contrast of the vocabulary in a table (source=folder), or set "
    "unknown_contrast=keep",
    "contrast_not_selected": "nothing to do, or add the contrast to `contrasts`",
    "duplicate_volume": "nothing to do, or correct the contrast: another file of the study holds "
    "the same voxels",
    "duplicate_contrast": "keep one file per contrast and session: leave the others out, or give "
    "them sessions of their own in a table (source=folder)",
    "label_not_stated": "fill the label column if the file is a label, or leave the row out",
    "duplicate_label": "keep one label file per session, or merge the labels into one file",
    "derivative_image": "scan the derivative folder by itself to use its images",
    "brain_mask": "nothing to do; brain masks are not training labels",
    "mask_grid_mismatch": "resample the label onto the grid of one of the study's volumes",
    "label_values": "store the label as whole numbers from 0 to 255",
    "not_a_brain": "leave the file out; if it is a brain, set check_pictures=false",
    "field_of_view_small": "leave the file out; if the cut is intended, set check_pictures=false",
    "nearly_empty": "leave the file out; if there is something in it, set check_pictures=false",
    "face_present": "deface the volume, or set scan.faces=allow and shard.faces=allow: then no "
    "model of it can be released openly",
    "withdrawn": "nothing to do; the subject is in private/withdrawn.csv",
    "refused_by_person": "nothing to do; the mapping table says so",
    "not_mri": "leave the file out; if it is MRI after all, set check_pictures=false",
    "phase_image": "scan the magnitude image instead",
    "not_trainable": "leave the file out; maps of this kind are not learned from",
    "no_volume_left": "see why the volumes of this study were refused",
}
"""Reason code -> what a user can do about it. `docs/manifest.md` lists the same codes."""

DEFAULT_REMEDY = "see the reason; repair the file or leave it out"

_FORMULA_START = ("=", "+", "-", "@", "\t", "\r", "'")


@dataclass(frozen=True)
class Refusal:
    """One input file that was not taken."""

    location: str
    """Path relative to the scanned root, or the table cell that named it."""
    code: str
    reason: str
    remedy: str
    study_id: str = ""
    """The study the file would have belonged to; empty when it is not known."""


def refuse(location: str, code: str, reason: str, *, study_id: str = "") -> Refusal:
    """Return a refusal with the remedy that goes with `code`."""
    return Refusal(location, code, reason, REMEDIES.get(code, DEFAULT_REMEDY), study_id)


def write_ledger(refusals: Iterable[Refusal], path: Path) -> None:
    """Write refusals as CSV, ordered by location; whole or not at all, readable by the owner only.

    Control characters become visible escapes; a cell that a spreadsheet would take for a formula
    gets a leading apostrophe.
    """
    buffer = io.StringIO(newline="")
    writer = csv.writer(buffer, lineterminator="\n")
    writer.writerow([field.name for field in fields(Refusal)])
    for refusal in sorted(refusals, key=lambda r: (r.location, r.code)):
        writer.writerow([escape_cell(cell) for cell in asdict(refusal).values()])
    write_atomically(path, buffer.getvalue().encode("utf-8"), mode=0o600)


def read_ledger(path: Path) -> list[Refusal]:
    """Read a ledger written by `write_ledger`.

    Raises:
        ManifestError: the file is missing or has other columns.
    """
    if not path.is_file():
        raise ManifestError(f"reading the ledger: no file at {path}; run the scan first")
    with path.open(newline="", encoding="utf-8") as stream:
        rows = list(csv.reader(stream))
    columns = [field.name for field in fields(Refusal)]
    if not rows or rows[0] != columns:
        raise ManifestError(
            f"reading the ledger {path}: columns must be {columns}, found {rows[:1]}; scan again"
        )
    return [Refusal(*(unescape_cell(cell) for cell in row)) for row in rows[1:]]


def escape_cell(cell: str) -> str:
    """Return a cell that shows control characters and that no spreadsheet runs as a formula."""
    visible = "".join(
        c if c.isprintable() else c.encode("unicode_escape", "surrogatepass").decode("ascii")
        for c in cell
    )
    return f"'{visible}" if visible.startswith(_FORMULA_START) else visible


def unescape_cell(cell: str) -> str:
    """Return what `escape_cell` was given, up to control characters."""
    return cell[1:] if cell.startswith("'") else cell
