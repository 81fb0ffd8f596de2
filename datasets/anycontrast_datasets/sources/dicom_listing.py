"""Which files under a root the DICOM source has to account for: names say nothing there.

Every regular file is an input, apart from hidden ones and from text and pictures that people put
beside images (unless such a file bears the DICOM mark). Links that lead out of the root are not
followed; each is refused by name, so that nothing is lost unseen.
"""

import os
from pathlib import Path

from anycontrast_datasets.ledger import Refusal, refuse
from anycontrast_datasets.sources.listing import (
    check_root,
    folder_unreadable,
    has_dicom_mark,
    is_companion,
)


def list_files(root: Path) -> tuple[list[str], list[Refusal]]:
    """Return the input files, relative to the root, in code point order, and refused links.

    Raises:
        ManifestError: a folder is missing or cannot be read; files in it would be lost unseen.
    """
    check_root(root)
    real_root = Path(os.path.realpath(root))
    found: list[str] = []
    refused: list[Refusal] = []
    for folder, folders, names in os.walk(root, onerror=folder_unreadable):
        base = Path(folder)
        visible = sorted(name for name in folders if not name.startswith("."))
        # A linked folder inside the root is met by its own name.
        folders[:] = [name for name in visible if not (base / name).is_symlink()]
        links = [name for name in visible if (base / name).is_symlink()]
        for name in [*links, *(name for name in names if not name.startswith("."))]:
            path, location = base / name, (base / name).relative_to(root).as_posix()
            if path.is_symlink() and (refusal := _refuse_link(path, location, real_root)):
                refused.append(refusal)
            elif path.is_file() and (not is_companion(name) or has_dicom_mark(path)):
                found.append(location)
    return sorted(found), sorted(refused, key=lambda r: r.location)


def _refuse_link(path: Path, location: str, real_root: Path) -> Refusal | None:
    target = Path(os.path.realpath(path))
    if not target.is_relative_to(real_root):
        return refuse(location, "link_outside_root", "a link that leads out of the folder")
    if not target.exists():
        return refuse(location, "missing_file", "a link to nothing")
    return None
