"""The files of a release and their hashes: written once, checked before anything is loaded.

A release is a folder with a closed list of files and `manifest.json`, which holds the size and
sha256 of each. Nothing else may lie in it: no code, no pickle.
"""

import json
import os
import re
from pathlib import Path
from typing import Any

from anycontrast.release.errors import ReleaseError, ReleaseNotFoundError
from anycontrast_datasets.files import sha256_file

MANIFEST = "manifest.json"
FORMAT_VERSION = 1
_NAMES = ("config.json", "model.safetensors", "README.md", "LICENSE", "eval.json")
ALLOWED = re.compile("|".join(re.escape(name) for name in _NAMES))
"""Every file name a release may hold beside its manifest."""


def write_synced(path: Path, data: bytes) -> None:
    """Write a file and wait until the disk has it."""
    with path.open("wb") as stream:
        stream.write(data)
        stream.flush()
        os.fsync(stream.fileno())


def write_manifest(folder: Path, facts: dict[str, Any]) -> None:
    """Hash every file of `folder` into its manifest, which is written last."""
    files = {
        path.name: {"size": path.stat().st_size, "sha256": sha256_file(path)}
        for path in sorted(folder.iterdir())
        if path.name != MANIFEST
    }
    manifest = {"format_version": FORMAT_VERSION, **facts, "files": files}
    write_synced(folder / MANIFEST, json.dumps(manifest, indent=2, sort_keys=True).encode())


def parse_manifest(data: bytes, where: str) -> dict[str, Any]:
    """Read and check a manifest.

    Raises:
        ReleaseError: not JSON, of a newer format, or naming files a release may not hold.
    """
    try:
        manifest = json.loads(data)
        files = manifest["files"]
        facts = [(name, entry["size"], entry["sha256"]) for name, entry in files.items()]
        version = manifest["format_version"]
        if type(version) is not int:
            raise TypeError(f"format_version {version!r}")
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ReleaseError(
            f"release {where}: its {MANIFEST} is not one ({type(error).__name__}: {error}); pull "
            "or export it again"
        ) from None
    if version > FORMAT_VERSION:
        raise ReleaseError(
            f"release {where}: format {version} is newer than this version reads "
            f"({FORMAT_VERSION}); upgrade anycontrast"
        )
    for name, size, digest in facts:
        if not ALLOWED.fullmatch(name):
            raise ReleaseError(
                f"release {where}: may hold {', '.join(_NAMES)} only, its {MANIFEST} lists "
                f"{name!r}; do not use it"
            )
        if type(size) is not int or size < 0 or not re.fullmatch(r"[0-9a-f]{64}", str(digest)):
            raise ReleaseError(
                f"release {where}: {MANIFEST} has no size or no sha256 for {name}; pull or export "
                "it again"
            )
    for required in ("config.json", "model.safetensors"):
        if required not in files:
            raise ReleaseError(
                f"release {where}: {MANIFEST} lists no {required}; pull or export it again"
            )
    return dict(manifest)


def verify_release(folder: Path) -> dict[str, Any]:
    """Check that a release holds exactly its files, byte for byte, and return its manifest.

    Raises:
        ReleaseNotFoundError: there is no release at `folder`.
        ReleaseError: a file is missing, extra, a link, or changed; the message names it.
    """
    if not (folder / MANIFEST).is_file():
        inside = _releases_in(folder)
        hint = f"; did you mean {' or '.join(inside)}?" if inside else "; check the path"
        raise ReleaseNotFoundError(f"no release in {folder}: it has no {MANIFEST}{hint}")
    if (folder / MANIFEST).is_symlink():
        raise ReleaseError(f"release {folder}: {MANIFEST} is a link; only plain files may be")
    manifest = parse_manifest((folder / MANIFEST).read_bytes(), str(folder))
    names = {path.name for path in folder.iterdir()} - {MANIFEST}
    extra, missing = sorted(names - set(manifest["files"])), sorted(set(manifest["files"]) - names)
    if extra or missing:
        raise ReleaseError(
            f"release {folder}: missing files {missing}, files it should not have {extra}; "
            "pull or export it again"
        )
    for name, entry in manifest["files"].items():
        check_file(folder / name, entry, str(folder))
    return manifest


def check_file(path: Path, entry: dict[str, Any], where: str) -> None:
    """Compare one file with its manifest entry.

    Raises:
        ReleaseError: a link, another size or another sha256.
    """
    if path.is_symlink():
        raise ReleaseError(f"release {where}: {path.name} is a link; only plain files may be")
    if not path.is_file():
        raise ReleaseError(f"release {where}: {path.name} is not a plain file; do not use it")
    size = path.stat().st_size
    if size != entry["size"]:
        raise ReleaseError(
            f"release {where}: {path.name} has {size} bytes, its manifest says {entry['size']}; "
            "pull or export it again"
        )
    if sha256_file(path) != entry["sha256"]:
        raise ReleaseError(
            f"release {where}: {path.name} is not the file that was released (sha256 differs); "
            "pull or export it again"
        )


def _releases_in(folder: Path) -> list[str]:
    """Releases one level down: a user may have named the folder that holds them."""
    if not folder.is_dir():
        return []
    return sorted(str(path.parent) for path in folder.glob(f"*/{MANIFEST}"))
