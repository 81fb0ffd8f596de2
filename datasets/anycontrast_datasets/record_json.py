"""StudyRecord <-> JSON: the text of `study.json` and of the shard index.

One record, one text: keys in the order of the dataclass, no spaces, numbers as Python's shortest
exact form. So equal records are equal bytes, and a reader may compare texts instead of parsing.
"""

import json
from collections.abc import Mapping
from dataclasses import asdict, fields
from typing import Any

from anycontrast_datasets.contrast import ContrastDescriptor
from anycontrast_datasets.study import ShardError, StudyRecord, VolumeRecord

RECORD_SCHEMA_VERSION = 1


def record_to_json(record: StudyRecord) -> str:
    """Return the record as one line of JSON; `record_from_json` gives back an equal record."""
    values: dict[str, Any] = {"schema_version": RECORD_SCHEMA_VERSION, **asdict(record)}
    values["volumes"] = [_volume_to_dict(volume) for volume in record.volumes]
    return json.dumps(values, separators=(",", ":"), allow_nan=False)


def record_from_json(text: str | bytes) -> StudyRecord:
    """Parse a record.

    Raises:
        ShardError: If the text is no JSON, of a newer schema, or lacks or adds a field.
    """
    try:
        values = json.loads(text)
        version = values.pop("schema_version")
        if version > RECORD_SCHEMA_VERSION:
            raise ShardError(
                f"study.json: schema version {version} is newer than {RECORD_SCHEMA_VERSION}, the "
                "newest this installation reads; upgrade anycontrast"
            )
        values["volumes"] = tuple(_volume_from_dict(v) for v in values["volumes"])
        values["affine"] = tuple(tuple(row) for row in values["affine"])
        _check_keys(StudyRecord, values)
        return StudyRecord(**_with_tuples(values, ("shape", "spacing_mm", "label_values")))
    except (KeyError, TypeError, AttributeError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ShardError(
            f"study.json: not a study record ({type(error).__name__}: {error}); "
            "run `anycontrast shard` again"
        ) from error


def _volume_to_dict(volume: VolumeRecord) -> dict[str, Any]:
    return {**asdict(volume), "descriptor": volume.descriptor.to_dict()}


def _volume_from_dict(values: dict[str, Any]) -> VolumeRecord:
    _check_keys(VolumeRecord, values)
    values = _with_tuples(values, ("source_spacing_mm", "flags"))
    try:
        values["descriptor"] = ContrastDescriptor.from_dict(values["descriptor"])
    except ValueError as error:
        raise TypeError(str(error)) from error
    return VolumeRecord(**values)


def _with_tuples(values: Mapping[str, Any], names: tuple[str, ...]) -> dict[str, Any]:
    return {**values, **{name: tuple(values[name]) for name in names}}


def _check_keys(kind: type[StudyRecord] | type[VolumeRecord], values: Mapping[str, Any]) -> None:
    wanted = {field.name for field in fields(kind)}
    if wanted != set(values):
        raise KeyError(f"{kind.__name__} fields {sorted(wanted ^ set(values))} missing or unknown")
