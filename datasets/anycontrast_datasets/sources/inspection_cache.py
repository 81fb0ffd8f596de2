"""What earlier scans found in files that have not changed, so that a rescan does not read them.

In: a file's size and modification time, its sidecars', what its source says of it, the options and
the code. Out: the outcome of an earlier inspection with all of these equal. One JSON line per file
in the private folder. The result equals that of a fresh scan; a file that was changed without
changing its size and time is found by `rescan: all` only.
"""

import hashlib
import json
import logging
import threading
import time
from collections.abc import Mapping
from dataclasses import asdict
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from anycontrast_datasets.contrast import ContrastDescriptor
from anycontrast_datasets.files import write_atomically
from anycontrast_datasets.ledger import Refusal
from anycontrast_datasets.sidecars import Sidecar
from anycontrast_datasets.sources.claims import FileClaim, SourceOptions
from anycontrast_datasets.sources.inspection import Grid, Inspected
from anycontrast_datasets.study import Affine, ContrastVote, Label, Volume

logger = logging.getLogger(__name__)

CACHE_NAME = "inspected.jsonl"
_HEADER = "anycontrast inspections 1"
_SAVE_EVERY_S = 600.0


class InspectionCache:
    """Outcomes by key; safe to share between threads."""

    def __init__(self, options: SourceOptions) -> None:
        self._path = options.cache_file
        self._lock = threading.Lock()
        self._options = _options_text(options)
        self._earlier = _load(self._path) if options.reuse_outcomes else {}
        self._current: dict[str, str] = {}
        self._saved_at_s = time.monotonic()

    def key(self, root: Path, claim: FileClaim, sidecar: Sidecar) -> str:
        """Return what the outcome of a file depends on, as a hash; empty without a cache."""
        if self._path is None:
            return ""
        try:
            stat = (root / claim.location).stat()
        except OSError:
            return ""
        parts = [
            *(self._options, _code_version(), stat.st_size, stat.st_mtime_ns, sidecar.stamps),
            *(sidecar.is_unreadable, asdict(claim)),
        ]
        text = json.dumps(parts, sort_keys=True, default=str)
        return hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=20).hexdigest()

    def get(self, key: str, claim: FileClaim) -> Inspected | Refusal | None:
        """Return the outcome of an earlier scan, None when there is none."""
        line = self._earlier.get(key) if key else None
        return None if line is None else _parse(line, claim)

    def put(self, key: str, outcome: Inspected | Refusal) -> None:
        """Keep an outcome for the next scan."""
        if key:
            line = self._earlier.get(key) or json.dumps(_content(outcome), separators=(",", ":"))
            with self._lock:
                self._current[key] = line

    def save_if_due(self) -> None:
        """Write what there is every ten minutes, so that a scan cut off goes on from there."""
        if time.monotonic() - self._saved_at_s > _SAVE_EVERY_S:
            self.save(is_whole=False)

    def save(self, *, is_whole: bool) -> None:
        """Write the outcomes of this scan; after a whole one, those of files gone are forgotten."""
        self._saved_at_s = time.monotonic()
        if self._path is not None:
            with self._lock:
                kept = self._current if is_whole else self._earlier | self._current
                rows = [f"{key}\t{line}" for key, line in sorted(kept.items())]
            text = "\n".join([_HEADER, *rows]) + "\n"
            write_atomically(self._path, text.encode(), mode=0o600)


@cache
def _code_version() -> str:
    """Hash of the modules of this package: other code may come to another outcome."""
    folder = Path(__file__).parents[1]
    digest = hashlib.blake2b(digest_size=16)
    for path in sorted([*folder.glob("*.py"), *(folder / "sources").glob("*.py")]):
        digest.update(path.read_bytes())
    return digest.hexdigest()


def _options_text(options: SourceOptions) -> str:
    """What of the options an outcome depends on; the key of the pseudonyms by what it makes."""
    probe = (options.naming("probe", "probe"), options.naming.site("probe", "probe"))
    return repr(
        (
            *(options.dataset, probe, options.contrasts, options.unknown_contrast),
            *(options.check_pictures, options.max_bytes, options.faces, options.is_synthetic),
        )
    )


def _load(path: Path | None) -> dict[str, str]:
    if path is None or not path.is_file():
        return {}
    lines = path.read_text(encoding="utf-8", errors="replace").split("\n")
    if lines[0] != _HEADER:
        logger.warning("the cache of inspections is of another version; every file is read again")
        return {}
    rows = (line.partition("\t") for line in lines[1:] if line)
    return {key: line for key, _, line in rows}


def _content(outcome: Inspected | Refusal) -> dict[str, object]:
    if isinstance(outcome, Refusal):
        return {"refusal": asdict(outcome)}
    return {
        "shape": list(outcome.grid.shape),
        "affine": outcome.grid.affine.tolist(),
        "volume": None if outcome.volume is None else asdict(outcome.volume),
        "label": None if outcome.label is None else asdict(outcome.label),
        "site": outcome.site,
    }


def _parse(line: str, claim: FileClaim) -> Inspected | Refusal | None:
    try:
        content = json.loads(line)
        if "refusal" in content:
            return Refusal(**content["refusal"])
        return Inspected(
            claim=claim,
            grid=Grid(shape=tuple(content["shape"]), affine=np.array(content["affine"])),
            volume=None if content["volume"] is None else _volume(content["volume"]),
            label=None if content["label"] is None else _label(content["label"]),
            site=content["site"],
        )
    except (ValueError, TypeError, KeyError) as error:
        logger.warning("an inspection in the cache is damaged (%s); its file is read again", error)
        return None


def _volume(values: Mapping[str, Any]) -> Volume:
    return Volume(
        **{
            **values,
            "shape": tuple(values["shape"]),
            "spacing_mm": tuple(values["spacing_mm"]),
            "affine": _affine(values["affine"]),
            "descriptor": ContrastDescriptor(**values["descriptor"]),
            "flags": tuple(values["flags"]),
            "evidence": tuple(values["evidence"]),
            "votes": tuple(ContrastVote(**vote) for vote in values["votes"]),
            "intensity": None if values["intensity"] is None else tuple(values["intensity"]),
        }
    )


def _label(values: Mapping[str, Any]) -> Label:
    return Label(**{**values, "shape": tuple(values["shape"]), "affine": _affine(values["affine"])})


def _affine(rows: list[list[float]]) -> Affine:
    return tuple(tuple(row) for row in rows)  # type: ignore[misc]
