"""The files of a release and their hashes: written once, checked before anything is loaded.

A release is a folder with a closed list of files and `manifest.json`, which holds the size and
sha256 of each. Nothing else may lie in it: no code, no pickle.
"""

import hashlib
import json
import os
import re
from pathlib import Path
from typing import Any

from anycontrast.release.errors import ReleaseError, ReleaseNotFoundError

MANIFEST = "manifest.json"
FORMAT_VERSION = 1
ALLOWED = re.compile(r"(config\.json|model\.safetensors|README\.md|LICENSE|eval\.json)")
"""Every file name a release may hold beside its manifest."""

_CHUNK_BYTES = 1 << 20


def sha256_file(path: Path) -> str:
    """Return the sha256 of a file as hex."""
    digest = hashlib.sha256()
    with path.open("rb") as stream:
        while chunk := stream.read(_CHUNK_BYTES):
            digest.update(chunk)
    return digest.hexdigest()


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
        version = int(manifest["format_version"])
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ReleaseError(f"release {where}: cannot read its {MANIFEST} ({error})") from None
    if version > FORMAT_VERSION:
        raise ReleaseError(
            f"release {where}: format {version} is newer than this version reads "
            f"({FORMAT_VERSION}); upgrade anycontrast"
        )
    for name, size, digest in facts:
        if not ALLOWED.fullmatch(name):
            raise ReleaseError(f"release {where}: may not hold {name!r}; do not use it")
        if not isinstance(size, int) or not re.fullmatch(r"[0-9a-f]{64}", str(digest)):
            raise ReleaseError(f"release {where}: {MANIFEST} has no size or sha256 for {name}")
    for required in ("config.json", "model.safetensors"):
        if required not in files:
            raise ReleaseError(f"release {where}: {MANIFEST} lists no {required}")
    return dict(manifest)


def verify_release(folder: Path) -> dict[str, Any]:
    """Check that a release holds exactly its files, byte for byte, and return its manifest.

    Raises:
        ReleaseNotFoundError: there is no release at `folder`.
        ReleaseError: a file is missing, extra, a link, or changed; the message names it.
    """
    if not (folder / MANIFEST).is_file():
        hint = " (that folder has releases inside: name one of them)" if _holds_some(folder) else ""
        raise ReleaseNotFoundError(f"no release in {folder}: it has no {MANIFEST}{hint}")
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


def _holds_some(folder: Path) -> bool:
    return folder.is_dir() and any((child / MANIFEST).is_file() for child in folder.iterdir())
