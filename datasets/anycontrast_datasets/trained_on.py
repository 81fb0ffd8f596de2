"""Which checkpoints and releases were trained on given shards.

In: fingerprints of data sets, folders to look in. Out: the checkpoints (`state.json`) and releases
(`config.json`) that name one of them, and those that name another, of which nothing can be said
from here: an earlier or later state of the shards may have held the same subject.
"""

import json
import logging
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class TrainedModels:
    """Checkpoints and releases, sorted by what they were trained on."""

    affected: tuple[str, ...]
    """Folders of models trained on one of the data sets asked for."""
    uncertain: tuple[str, ...]
    """Folders of models trained on data of another fingerprint, or of none that is named."""


def models_trained_on(
    fingerprints: Collection[str], folders: Iterable[Path], *, cleared: Collection[str] = ()
) -> TrainedModels:
    """Find the models below some folders and sort them.

    Args:
        fingerprints: Of data sets that held what is asked about.
        folders: Searched through; those that do not exist are skipped.
        cleared: Fingerprints of data sets known not to hold it: their models are left out.
    """
    found = {str(home): name for folder in folders for home, name in _models(folder)}
    return TrainedModels(
        affected=tuple(sorted(home for home, name in found.items() if name in fingerprints)),
        uncertain=tuple(
            sorted(
                home
                for home, name in found.items()
                if name not in fingerprints and name not in cleared
            )
        ),
    )


def _models(folder: Path) -> Iterator[tuple[Path, str]]:
    """Yield (folder of a model, fingerprint of its data, empty if it names none)."""
    for path in sorted(folder.resolve().rglob("state.json")):
        values = _read(path)
        if "stream" in values or "kind" in values:
            yield path.parent, _text(values.get("stream"), "fingerprint").partition(":")[0]
    for path in sorted(folder.resolve().rglob("config.json")):
        values = _read(path)
        if "training" in values and "anycontrast_version" in values:
            yield path.parent, _text(values["training"], "dataset_fingerprint").partition(":")[0]


def _read(path: Path) -> dict[str, Any]:
    try:
        values = json.loads(path.read_bytes())
    except (OSError, ValueError) as error:
        logger.warning("%s cannot be read (%s): look at this model by hand", path, error)
        values = {"kind": "unreadable"}
    return values if isinstance(values, dict) else {}


def _text(values: object, name: str) -> str:
    return str(values.get(name, "")) if isinstance(values, dict) else ""
