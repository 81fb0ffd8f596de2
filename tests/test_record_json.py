"""Records and their JSON: exact both ways, strict about what they read."""

import json
from typing import Any

import numpy as np
import pytest

from anycontrast_datasets.contrast import ContrastDescriptor
from anycontrast_datasets.record_json import record_from_json, record_to_json
from anycontrast_datasets.study import ShardError, StudyRecord, VolumeRecord


def record() -> StudyRecord:
    rng = np.random.default_rng(0)
    volumes = tuple(
        VolumeRecord(
            contrast=name,
            scale=float(rng.random()),
            offset=float(rng.normal()),
            p0_5=0.1 + 0.2,
            p99_5=1e-17,
            mean=1 / 3,
            std=float(np.float32(0.1)),
            num_foreground=123,
            occupancy="AAE=",
            source_spacing_mm=(0.1, 0.7, 3.3),
            descriptor=ContrastDescriptor(te_s=0.09, has_agent=False),
            flags=("contrast_disagreement",),
        )
        for name in ("T1w", "ADC")
    )
    return StudyRecord(
        study_id="case-1",
        dataset="made",
        subject_id="case",
        session_id="1",
        split="test",
        shape=(16, 32, 48),
        spacing_mm=(1.0, 0.1 + 0.2, 1.0),
        affine=tuple((float(a), 1 / 3, 0.0, -2.5) for a in rng.normal(size=4)),
        volumes=volumes,
        has_label=True,
        label_values=(1, 4),
        reference="T1w",
    )


def test_round_trip_is_exact_and_stable() -> None:
    text = record_to_json(record())
    assert record_from_json(text) == record()
    assert record_from_json(text.encode()) == record()
    assert record_to_json(record_from_json(text)) == text
    assert "\n" not in text


def changed(path: list[Any], value: object) -> str:
    values = json.loads(record_to_json(record()))
    at = values
    for key in path[:-1]:
        at = at[key]
    if value is None:
        del at[path[-1]]
    else:
        at[path[-1]] = value
    return json.dumps(values)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "not a study record"),
        ("[]", "not a study record"),
        ("null", "not a study record"),
        (b"\xff\xfe", "not a study record"),
        (changed(["schema_version"], 99), "newer"),
        (changed(["schema_version"], None), "schema_version"),
        (changed(["shape"], None), "shape"),
        (changed(["surprise"], 1), "surprise"),
        (changed(["volumes", 0, "scale"], None), "scale"),
        (changed(["volumes", 1, "descriptor", "phase"], 1), "phase"),
        (changed(["affine"], 3), "not a study record"),
    ],
)
def test_anything_else_is_a_clear_error(text: str | bytes, message: str) -> None:
    with pytest.raises(ShardError, match=message):
        record_from_json(text)


def test_a_number_that_json_cannot_hold_is_not_written() -> None:
    from dataclasses import replace

    with pytest.raises(ValueError):
        record_to_json(replace(record(), spacing_mm=(float("nan"), 1.0, 1.0)))
