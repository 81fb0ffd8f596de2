"""Which study goes into which shard, now and after studies come and go.

In: the manifest and the layout of the run before, if any. Out: the new layout, kept in
`layout.json` and written before any shard changes, so that a run killed anywhere and started again
makes the same shards. Without an earlier layout it is a pure function of manifest and config:
studies in the order of a hash of their ids, so that every shard is a fair sample. With one, each
study stays where it is, one that left the manifest leaves its shard, and new ones fill new shards;
a last shard that is not full is not filled up, because its bytes may have been copied elsewhere.
Gives up: many small additions make many small shards. Sharding into an empty folder evens them out.
"""

import hashlib
import json
import logging
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from anycontrast_datasets.disk import write_checked
from anycontrast_datasets.face import FACE_CONTRASTS
from anycontrast_datasets.ledger import Refusal, refuse
from anycontrast_datasets.prepare import PREPARE_VERSION
from anycontrast_datasets.record_json import RECORD_SCHEMA_VERSION
from anycontrast_datasets.shard_receipt import RefusedStudy
from anycontrast_datasets.store.volume_index import SCHEMA_VERSION, sha256_json
from anycontrast_datasets.study import Study, Volume

logger = logging.getLogger(__name__)

LAYOUT_NAME = "layout.json"
SHARD_NAME = re.compile(r"shard-[0-9]{6,}\.tar")


@dataclass(frozen=True, kw_only=True)
class Layout:
    """The shards of a folder and the studies of each."""

    origin: dict[str, Any]
    """How the shards were made: `prepare` and `shard`, as in `dataset.json`."""
    shards: dict[str, tuple[str, ...]]
    """File name -> study ids, in the order of the tar."""

    @property
    def key(self) -> str:
        """Hash of what decides the bytes of every study: another key, every shard anew."""
        return layout_key(self.origin)


def layout_key(origin: Mapping[str, Any]) -> str:
    """Return the hash of format versions and settings; who does the work does not enter."""
    settings = {name: origin["shard"][name] for name in ("studies_per_shard", "codec", "level")}
    versions = [SCHEMA_VERSION, RECORD_SCHEMA_VERSION, PREPARE_VERSION]
    return sha256_json([versions, origin["prepare"], settings])


def deal(earlier: Layout | None, origin: dict[str, Any], study_ids: Iterable[str]) -> Layout:
    """Return the layout of these studies, given the one there was.

    Dealing the same studies again changes nothing.

    Args:
        earlier: Of the folder as it is; ignored when it was made with other settings.
        origin: Settings of this run.
        study_ids: All studies that are to be in shards.
    """
    wanted = set(study_ids)
    shards: dict[str, tuple[str, ...]] = {}
    if earlier is not None and earlier.key == layout_key(origin):
        for name, held in earlier.shards.items():
            if kept := tuple(study_id for study_id in held if study_id in wanted):
                shards[name] = kept
    placed = {study_id for held in shards.values() for study_id in held}
    new = sorted(wanted - placed, key=lambda i: hashlib.sha256(i.encode()).hexdigest())
    size = int(origin["shard"]["studies_per_shard"])
    number = 1 + max((_number(name) for name in shards), default=-1)
    for first in range(0, len(new), size):
        shards[f"shard-{number:06d}.tar"] = tuple(new[first : first + size])
        number += 1
    return Layout(origin=origin, shards=shards)


def study_key(study: Study, key: str) -> str:
    """Return the hash of everything that decides the stored bytes of a study.

    Votes, confidence, evidence and what else the manifest says about a volume without entering its
    voxels or its record are left out: a scan that only judges anew rewrites no shard.

    Args:
        study: Manifest row.
        key: Of the layout.
    """
    label = study.label and [study.label.shape, study.label.affine, study.label.sha256]
    names = [study.study_id, study.dataset, study.subject_id, study.session_id, study.split]
    return sha256_json([key, names, [_volume_key(v) for v in study.volumes], label])


def admit(
    studies: Sequence[Study], faces: str
) -> tuple[list[Study], list[RefusedStudy], list[Refusal]]:
    """Leave out volumes that show a face, unless the policy allows them.

    The scan refuses them already; this is the second lock, for manifests from elsewhere.

    Args:
        studies: The manifest.
        faces: `refuse` or `allow`.

    Returns:
        Studies without those volumes, studies of which nothing is left, and one ledger row for
        each volume left out of a study that stays.
    """
    if faces == "allow":
        return list(studies), [], []
    admitted: list[Study] = []
    refused: list[RefusedStudy] = []
    dropped: list[Refusal] = []
    for study in studies:
        kept = tuple(volume for volume in study.volumes if not shows_face(volume))
        if not kept:
            refused.append(_faces_refused(study))
            continue
        admitted.append(study if len(kept) == len(study.volumes) else replace(study, volumes=kept))
        for volume in study.volumes:
            if shows_face(volume):
                reason = f"study {study.study_id} {volume.contrast}: the volume shows a face"
                dropped.append(
                    refuse(volume.contrast, "face_present", reason, study_id=study.study_id)
                )
                logger.warning("left out %s", reason)
    return admitted, refused, dropped


def shows_face(volume: Volume) -> bool:
    """Say whether a volume is known to show a face, in a contrast that tells whose."""
    return volume.face == "present" and volume.contrast in FACE_CONTRASTS


def read_layout(folder: Path) -> Layout | None:
    """Return the layout of an earlier run, or None if there is none that this version can read."""
    path = folder / LAYOUT_NAME
    if not path.is_file():
        return None
    try:
        values = json.loads(path.read_bytes())
        if values["schema_version"] != SCHEMA_VERSION:
            return None
        shards = {str(name): tuple(map(str, held)) for name, held in values["shards"].items()}
        layout = Layout(origin=values["origin"], shards=shards)
        return layout if layout.key and all(_number(name) >= 0 for name in shards) else None
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        logger.warning("%s is damaged (%s): dealing all studies anew", path, error)
        return None


def write_layout(layout: Layout, folder: Path) -> None:
    """Write `layout.json`, durably."""
    values = {"schema_version": SCHEMA_VERSION, **asdict(layout)}
    write_checked(folder / LAYOUT_NAME, (json.dumps(values, indent=1) + "\n").encode())


def _number(name: str) -> int:
    if not SHARD_NAME.fullmatch(name):
        raise ValueError(f"no name of a shard: {name!r}")
    return int(name.removeprefix("shard-").removesuffix(".tar"))


def _volume_key(volume: Volume) -> list[Any]:
    return [
        volume.contrast,
        volume.shape,
        volume.affine,
        volume.sha256,
        volume.descriptor.to_dict(),
        volume.flags,
    ]


def _faces_refused(study: Study) -> RefusedStudy:
    reason = (
        f"study {study.study_id}: every volume ({', '.join(study.contrasts)}) shows a face; strip "
        "or deface them, or set shard.faces=allow if that is permitted"
    )
    logger.warning("refused %s", reason)
    return RefusedStudy(study_id=study.study_id, code="face_present", reason=reason)
