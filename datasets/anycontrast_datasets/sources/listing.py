"""Which files under a root look like images: everything a scan has to account for.

Every file listed here ends as accepted or in the ledger. Hidden folders (`.git`, `.datalad`) are
not entered; links to files are listed, links to folders followed once. DICOM files without a
suffix are recognised by their magic bytes.
"""

import logging
import os
from pathlib import Path

from anycontrast_datasets.ledger import Refusal, refuse
from anycontrast_datasets.study import ManifestError

logger = logging.getLogger(__name__)

_NIFTI = (".nii", ".nii.gz")
_DICOM = (".dcm", ".ima", ".dicom")
_OTHER_IMAGES = (
    *(".hdr", ".img", ".img.gz", ".mgz", ".mgh", ".nrrd", ".nhdr", ".mha", ".mhd", ".mnc"),
    *(".par", ".rec", ".nii.bz2", ".nii.xz", ".nii.zst", ".zarr.zip"),
)
# Companions of images: never opened to look for DICOM bytes.
_COMPANIONS = (
    *(".json", ".csv", ".tsv", ".txt", ".md", ".rst", ".bval", ".bvec", ".pdf", ".png", ".jpg"),
    *(".jpeg", ".html", ".xml", ".yaml", ".yml", ".toml", ".py", ".sh", ".xlsx", ".log", ".mat"),
)
_DICOM_MAGIC_AT = 128


def check_root(root: Path) -> None:
    """Refuse a root that is not a folder.

    Raises:
        ManifestError: missing, or a file.
    """
    if not root.exists():
        raise ManifestError(f"scanning {root}: no such folder; correct scan.root")
    if not root.is_dir():
        raise ManifestError(f"scanning {root}: must be a folder, found a file; correct scan.root")


def list_images(root: Path) -> list[str]:
    """Return the image files under `root`, relative to it, with `/`, in code point order.

    Raises:
        ManifestError: a folder is missing or cannot be read; files in it would be lost unseen.
    """
    check_root(root)
    found: list[str] = []
    seen: set[str] = set()
    for folder, folders, names in os.walk(root, onerror=folder_unreadable, followlinks=True):
        real = os.path.realpath(folder)
        if real in seen:
            folders.clear()
            continue
        seen.add(real)
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        base = Path(folder)
        found += [
            (base / name).relative_to(root).as_posix() for name in names if _is_image(base / name)
        ]
    return sorted(found)


def is_nifti(location: str) -> bool:
    """Return whether a file name ends like NIfTI."""
    return location.lower().endswith(_NIFTI)


def is_companion(location: str) -> bool:
    """Return whether a file name ends like text or pictures that lie beside images."""
    return location.lower().endswith(_COMPANIONS)


def has_dicom_mark(path: Path) -> bool:
    """Return whether a file has the magic bytes of DICOM; False when it cannot be opened."""
    try:
        with path.open("rb") as stream:
            stream.seek(_DICOM_MAGIC_AT)
            return stream.read(4) == b"DICM"
    except OSError as error:
        logger.warning("a file without an image suffix cannot be opened: %s", error.strerror)
        return False


def stem(location: str) -> str:
    """Return the file name without folders and without `.nii` or `.nii.gz`."""
    name = location.rsplit("/", 1)[-1]
    for suffix in reversed(_NIFTI):
        if name.lower().endswith(suffix):
            return name[: -len(suffix)]
    return name


def refuse_format(location: str, study_id: str = "") -> Refusal | None:
    """Return why a file cannot be read by its kind or name, None for NIfTI."""
    try:
        location.encode("utf-8")
    except UnicodeEncodeError:
        return refuse(location, "bad_file_name", "the name is not valid UTF-8", study_id=study_id)
    if is_nifti(location):
        return None
    if location.lower().endswith((*_OTHER_IMAGES, *_COMPANIONS)):
        reason = f"only NIfTI is read, found {Path(location).suffix}"
        return refuse(location, "unsupported_format", reason, study_id=study_id)
    reason = "DICOM is not read by this source"
    return refuse(location, "needs_dicom_source", reason, study_id=study_id)


def _is_image(path: Path) -> bool:
    name = path.name.lower()
    if name.endswith((*_NIFTI, *_DICOM, *_OTHER_IMAGES)):
        return True
    if name.startswith(".") or is_companion(name) or not path.is_file():
        return False
    return has_dicom_mark(path)


def folder_unreadable(error: OSError) -> None:
    """Refuse the scan: files of a folder that cannot be listed would be lost unseen.

    Raises:
        ManifestError: always.
    """
    raise ManifestError(
        f"scanning {error.filename}: cannot list the folder ({error.strerror}); correct its "
        "permissions or the root"
    ) from error
