"""JSON sidecars of images: found by the BIDS inheritance principle, read by an allow-list of keys.

In: the location of an image. Out: the values that apply to it, with times in seconds. A JSON file
higher up in the tree applies when its suffix is the image's and its entities are among the image's;
a deeper file wins. Only the listed keys are kept, and only in memory: sidecars name people, places
and dates in many other keys. Each JSON file is read once.

Source: BIDS specification 1.10, inheritance principle; reference/reliability.md, P2.
"""

import json
import logging
import math
import threading
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

logger = logging.getLogger(__name__)

PHYSICS_KEYS = (
    *("EchoTime", "RepetitionTime", "InversionTime", "FlipAngle", "MagneticFieldStrength"),
    *("DiffusionBValue", "b_value", "ScanningSequence", "SequenceVariant", "SequenceName"),
    *("PulseSequenceName", "ImageType", "ContrastBolusAgent", "ContrastBolusIngredient"),
)
"""Read for the descriptor and the vote on the contrast."""
DESCRIPTION_KEYS = ("SeriesDescription", "ProtocolName")
"""Free text: read for the vote on the contrast, never kept."""
SITE_KEYS = ("InstitutionName", "DeviceSerialNumber", "StationName")
"""Read for the keyed name of the site, never kept."""
FACE_KEYS = (
    *("Defaced", "SkullStripped", "DeidentificationMethod"),
    *("DeidentificationMethodCodeSequence", "ImageComments"),
)
"""Read for the face state, never kept."""
KEYS = frozenset((*PHYSICS_KEYS, *DESCRIPTION_KEYS, *SITE_KEYS, *FACE_KEYS))

MAX_SIDECAR_BYTES = 2**20
TIME_LIMITS_S = (("EchoTime", 1.0), ("RepetitionTime", 60.0), ("InversionTime", 20.0))
"""No larger value of these keys is believed to be in seconds."""


@dataclass(frozen=True, kw_only=True)
class Sidecar:
    """What the JSON files of one image say, by allowed keys."""

    values: Mapping[str, object] = field(default_factory=dict, repr=False)
    is_unreadable: bool = False
    """A JSON file that applies could not be read."""
    is_milliseconds: bool = False
    """The times stood in milliseconds and were converted."""
    stamps: tuple[tuple[str, int, int], ...] = ()
    """(location, bytes, modification time in ns) of the JSON files that apply."""

    @property
    def description(self) -> str:
        """Series description and protocol name."""
        return " ".join(str(self.values[key]) for key in DESCRIPTION_KEYS if key in self.values)

    @property
    def site(self) -> tuple[str, str]:
        """(institution, scanner), as `Naming.site` takes them."""
        serial = self.values.get("DeviceSerialNumber") or self.values.get("StationName") or ""
        return str(self.values.get("InstitutionName", "")), str(serial)


class SidecarReader:
    """Reads the sidecars under one root; safe to share between threads."""

    def __init__(self, root: Path) -> None:
        self._root = root
        self._lock = threading.Lock()
        self._folders: dict[str, tuple[str, ...]] = {}
        self._files: dict[str, tuple[dict[str, object] | None, int, int]] = {}

    def read(self, location: str) -> Sidecar:
        """Return what applies to an image.

        Args:
            location: of the image, relative to the root.
        """
        values: dict[str, object] = {}
        stamps = []
        is_unreadable = False
        for name in self._applying(location):
            content, size, mtime_ns = self._content(name)
            stamps.append((name, size, mtime_ns))
            if content is None:
                is_unreadable = True
            else:
                values |= content
        values, is_milliseconds = in_seconds(values)
        return Sidecar(
            values=values,
            is_unreadable=is_unreadable,
            is_milliseconds=is_milliseconds,
            stamps=tuple(stamps),
        )

    def _applying(self, location: str) -> list[str]:
        """Locations of the JSON files that apply, from the root down to the image's own."""
        folder, _, name = location.rpartition("/")
        own = _stem(name)
        entities, suffix = _parts(own)
        parents = folder.split("/") if folder else []
        applying = []
        for depth in range(len(parents) + 1):
            at = "/".join(parents[:depth])
            found = []
            for candidate in self._json_names(at):
                theirs, their_suffix = _parts(candidate)
                is_own = depth == len(parents) and candidate == own
                inherits = suffix and their_suffix == suffix and theirs <= entities
                if is_own or (inherits and entities):
                    found.append((len(theirs), is_own, candidate))
            applying += [f"{at}/{c}.json" if at else f"{c}.json" for _, _, c in sorted(found)]
        return applying

    def _json_names(self, folder: str) -> tuple[str, ...]:
        with self._lock:
            if folder not in self._folders:
                path = self._root / folder
                names = (p.name for p in path.iterdir()) if path.is_dir() else ()
                self._folders[folder] = tuple(
                    sorted(name[: -len(".json")] for name in names if name.endswith(".json"))
                )
            return self._folders[folder]

    def _content(self, location: str) -> tuple[dict[str, object] | None, int, int]:
        with self._lock:
            if location not in self._files:
                self._files[location] = _read_json(self._root / location)
            return self._files[location]


def allowed(content: Mapping[str, object]) -> dict[str, object]:
    """Return the allowed keys of a sidecar; everything else is dropped here."""
    return {key: value for key, value in content.items() if key in KEYS}


def in_seconds(values: Mapping[str, object]) -> tuple[dict[str, object], bool]:
    """Return sidecar values with times in seconds, and whether they stood in milliseconds.

    No echo time is longer than a second: one that is, or a repetition time above a minute, is in
    milliseconds, and the other times with it.
    """
    times = {
        key: float(value)
        for key, _ in TIME_LIMITS_S
        if isinstance(value := values.get(key), int | float) and not isinstance(value, bool)
    }
    limits = dict(TIME_LIMITS_S)
    if not any(
        math.isfinite(t) and limits[key] < t <= 1e3 * limits[key] for key, t in times.items()
    ):
        return dict(values), False
    return {**values, **{key: value / 1e3 for key, value in times.items()}}, True


def _read_json(path: Path) -> tuple[dict[str, object] | None, int, int]:
    try:
        stat = path.stat()
        size, mtime_ns = stat.st_size, stat.st_mtime_ns
        if size > MAX_SIDECAR_BYTES:
            raise ValueError("too large")
        content = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError):
        logger.warning("a JSON sidecar cannot be read; its volume is kept without physics")
        return None, 0, 0
    return (allowed(content) if isinstance(content, dict) else None), size, mtime_ns


def _stem(name: str) -> str:
    for ending in (".nii.gz", ".nii"):
        if name.lower().endswith(ending):
            return name[: -len(ending)]
    return name


def _parts(stem: str) -> tuple[frozenset[str], str]:
    """Return the entities (`sub-01`) and the suffix of a BIDS name."""
    parts = stem.split("_")
    entities = frozenset(part for part in parts if "-" in part)
    return entities, "" if "-" in parts[-1] else parts[-1]
