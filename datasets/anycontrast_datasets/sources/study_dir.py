"""One folder that is one study: what a downstream team points `predict` at.

In: a folder of NIfTI files, and optionally the table of the `folder` source. Out: the study, where
each of its volumes lies, and a refusal for every file that is not used. Contrasts come from the
table or from file names, checked against the picture as in any scan. Nothing is written.
"""

from dataclasses import dataclass
from pathlib import Path

from anycontrast_datasets.ledger import Refusal, refuse
from anycontrast_datasets.pseudonym import Identity
from anycontrast_datasets.sources import folder
from anycontrast_datasets.sources.claims import FileClaim, SourceOptions, read_name
from anycontrast_datasets.sources.grouping import build_studies
from anycontrast_datasets.sources.listing import is_nifti, list_images, refuse_format
from anycontrast_datasets.study import Study, StudyError


class _OneStudy:
    """Names everything in the folder alike: it is one session of one person."""

    def __call__(self, subject: str, session: str) -> Identity:
        return Identity(study_id="study", subject_id="subject", session_id="session", split="test")

    def site(self, institution: str, serial: str) -> str:
        return ""


@dataclass(frozen=True)
class StudyDir:
    """A study folder after the scan."""

    study: Study
    paths: dict[str, Path]
    """Contrast -> file."""
    refused: tuple[Refusal, ...]


def scan_study_dir(root: Path, table: Path | None = None) -> StudyDir:
    """Find the one study of a folder.

    Args:
        root: folder with the study's NIfTI files, searched through its sub-folders.
        table: CSV or TSV with the columns file, subject, session, contrast, label; None reads
            contrasts from file names.

    Raises:
        StudyError: no usable volume, or the table names more than one study.
        ManifestError: the folder or the table is missing or wrong.
    """
    # Predicting is on the user's own study: nothing of it is kept, so a face may show.
    options = SourceOptions(dataset="study", naming=_OneStudy(), faces="allow")
    if table is not None:
        found = list(folder.scan(root, options, table))
    else:
        claims = [_claim(location) for location in list_images(root)]
        found = list(build_studies(root, claims, options))
    studies = [item for item in found if isinstance(item, Study)]
    refused = tuple(item for item in found if isinstance(item, Refusal))
    if not studies:
        reasons = "; ".join(f"{r.location}: {r.code}, {r.reason}" for r in refused) or "no images"
        raise StudyError(
            f"study folder {root}: no usable volume ({reasons}); name files by contrast, such as "
            "T1w.nii.gz, or give a table",
            code="no_volume_left",
        )
    if len(studies) > 1:
        raise StudyError(
            f"study folder {root}: the table names {len(studies)} studies, expected one"
        )
    paths = {volume.contrast: root / volume.location for volume in studies[0].volumes}
    return StudyDir(studies[0], paths, refused)


def _claim(location: str) -> FileClaim | Refusal:
    if not is_nifti(location):
        return refuse_format(location) or refuse(location, "not_nifti", "not a NIfTI file")
    reading = read_name(location)
    return FileClaim(
        location=location, subject="", session="", reading=reading, is_label=reading.is_mask
    )
