"""Parting series into stacks, and what is wrong with a stack, on instances without files."""

from dataclasses import replace

import pytest

from anycontrast_datasets.ledger import Refusal
from anycontrast_datasets.sources.dicom_frames import Frame
from anycontrast_datasets.sources.dicom_header import Instance
from anycontrast_datasets.sources.dicom_kinds import refuse_kind
from anycontrast_datasets.sources.dicom_series import Stack, find_stacks

AXIAL = (1.0, 0.0, 0.0, 0.0, 1.0, 0.0)
CORONAL = (1.0, 0.0, 0.0, 0.0, 0.0, -1.0)


def frame(z_mm: float, **changes: object) -> Frame:
    base = Frame((-90.0, -90.0, z_mm), AXIAL, (1.0, 1.0), 0.0025, None)
    return replace(base, **changes)  # type: ignore[arg-type]


def instance(index: int, **changes: object) -> Instance:
    base = Instance(
        location=f"IM{index:04d}",
        subject="0042",
        study_uid="1.2",
        series_uid="1.2.3",
        sop_uid=f"1.2.3.{index}",
        site=("", ""),
        description="t1_mprage",
        sop_class="1.2.840.10008.5.1.4.1.1.4",
        is_mri=True,
        image_type=("ORIGINAL", "PRIMARY", "M"),
        component="",
        burnt_in="",
        is_colour=False,
        is_enhanced=False,
        rows=32,
        columns=32,
        num_pixel_bytes=2048,
        number=index + 1,
        acquisition=1,
        num_in_acquisition=None,
        num_frames=1,
        frames=(frame(5.0 * index),),
        sidecar={},
        header_sha256=f"h{index}",
        pixels_sha256=f"p{index}",
    )
    return replace(base, **changes)  # type: ignore[arg-type]


def series(num: int = 24, start: int = 0, **changes: object) -> list[Instance]:
    return [instance(index, **changes) for index in range(start, start + num)]


def codes(instances: list[Instance]) -> dict[str, int]:
    """Files by reason code, `whole` for those in a stack; every file is in exactly one."""
    found = list(find_stacks(instances))
    located: list[str] = []
    counts: dict[str, int] = {}
    for item in found:
        code = "whole" if isinstance(item, Stack) else item.code
        files = item.locations if isinstance(item, Stack) else (item.location,)
        counts[code] = counts.get(code, 0) + len(files)
        located += files
    assert sorted(located) == sorted(i.location for i in instances)
    return counts


def test_a_whole_series_is_one_stack_in_instance_order() -> None:
    (stack,) = find_stacks(series()[::-1])
    assert isinstance(stack, Stack)
    assert stack.locations == tuple(f"IM{index:04d}" for index in range(24))


def test_the_order_of_files_does_not_matter() -> None:
    files = series(12) + series(12, start=12, frames=(frame(3.0),)) + series(24, start=24)
    assert list(find_stacks(files)) == list(find_stacks(files[::-1]))


@pytest.mark.parametrize(
    ("files", "reason"),
    [
        ([i for i in series() if i.number != 9], "a gap of 10.0 mm"),
        (series(8), "8 slices cover 40 mm"),
        (series(1), "a single slice"),
        (series(24, num_in_acquisition=30), "24 images of 30"),
        (series(24, frames=(Frame(None, AXIAL, None, None, None),)), "where the slices lie"),
        (series(24, frames=(Frame((0.0, 0.0, 0.0), None, None, None, None),)), "where the slices"),
        (
            [replace(i, frames=(frame(5.0 * n + (n % 2)),)) for n, i in enumerate(series())],
            "slices 4.00 to 6.00 mm apart",
        ),
        (
            [
                replace(i, frames=(frame(0, position_mm=(4.0 * (n == 5), 0.0, 5.0 * n)),))
                for n, i in enumerate(series())
            ],
            "behind each other",
        ),
    ],
)
def test_a_series_with_something_missing_is_incomplete(files: list[Instance], reason: str) -> None:
    assert codes(files) == {"incomplete_series": len(files)}
    refused = [item for item in find_stacks(files) if isinstance(item, Refusal)]
    assert all(reason in item.reason for item in refused)


def test_echoes_and_b_values_of_one_series_become_stacks_of_their_own() -> None:
    parts = [
        [replace(i, location=f"{name}{n}", sop_uid=f"{name}{n}", frames=(frame(5.0 * n, **made),))
         for n, i in enumerate(series())]
        for name, made in (("a", {"te_s": 0.01}), ("b", {"te_s": 0.09}), ("c", {"b_value": 1000.0}))
    ]  # fmt: skip
    found = list(find_stacks([i for part in parts for i in part]))
    stacks = {stack.locations for stack in found if isinstance(stack, Stack)}
    assert stacks == {tuple(i.location for i in part) for part in parts}


def test_several_images_at_one_place_are_a_series_in_time() -> None:
    again = [
        replace(i, location=f"t2_{n}", sop_uid=f"t2.{n}", pixels_sha256=f"q{n}")
        for n, i in enumerate(series())
    ]
    assert codes(series() + again) == {"not_3d": 48}


def test_equal_files_are_doubles_and_differing_ones_conflict() -> None:
    copy = [replace(i, location=f"copy_{i.location}") for i in series()]
    assert codes(series() + copy) == {"whole": 24, "duplicate_instance": 24}
    other = replace(series()[0], location="other", pixels_sha256="else")
    found = codes([*series(), other])
    assert found == {"whole": 23, "conflicting_instance": 2}
    middle = replace(series()[7], location="other", pixels_sha256="else")
    assert codes([*series(), middle]) == {"incomplete_series": 23, "conflicting_instance": 2}


def test_a_few_slices_in_several_directions_are_a_localizer() -> None:
    across = [
        replace(i, frames=(frame(0, orientation=CORONAL, position_mm=(0.0, 5.0 * n, 0.0)),))
        for n, i in enumerate(series(5, start=5))
    ]
    assert codes(series(5) + across) == {"localizer": 10}


def test_two_whole_stacks_in_several_directions_are_no_localizer() -> None:
    across = [
        replace(i, frames=(frame(0, orientation=CORONAL, position_mm=(0.0, 5.0 * n, 0.0)),))
        for n, i in enumerate(series(24, start=24))
    ]
    assert codes(series() + across) == {"whole": 48}


@pytest.mark.parametrize(
    ("changes", "code"),
    [
        ({"num_frames": 23}, "incomplete_series"),
        ({"num_frames": 25}, "incomplete_series"),
        ({"frames": tuple(frame(5.0 * n, te_s=0.01 * (1 + n % 2)) for n in range(24))}, "not_3d"),
        ({"frames": tuple(frame(5.0 * (n % 12)) for n in range(24))}, "not_3d"),
        (
            {"frames": tuple(frame(n, orientation=(AXIAL, CORONAL)[n % 2]) for n in range(24))},
            "localizer",
        ),
        ({}, "whole"),
    ],
)
def test_an_enhanced_file_is_a_series_by_itself(changes: dict[str, object], code: str) -> None:
    frames = tuple(frame(5.0 * n) for n in range(24))
    file = instance(0, is_enhanced=True, num_frames=24, frames=frames)
    assert codes([replace(file, **changes)]) == {code: 1}  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("changes", "code"),
    [
        ({"is_mri": False}, "not_mri"),
        ({"burnt_in": "YES"}, "burnt_in_text"),
        ({"sop_class": "1.2.840.10008.5.1.4.1.1.7"}, "burnt_in_text"),
        ({"sop_class": "1.2.840.10008.5.1.4.1.1.7.2", "burnt_in": "NO"}, "not_trainable"),
        ({"is_colour": True}, "not_trainable"),
        ({"rows": 0}, "not_trainable"),
        ({"image_type": ("DERIVED", "SECONDARY", "MPR")}, "not_trainable"),
        ({"image_type": ("DERIVED", "PRIMARY", "PROJECTION_IMAGE", "MIP")}, "not_trainable"),
        ({"image_type": ("DERIVED", "SECONDARY", "SUBTRACTION")}, "not_trainable"),
        ({"image_type": ("ORIGINAL", "PRIMARY", "P", "ND")}, "phase_image"),
        ({"component": "PHASE"}, "phase_image"),
        ({"image_type": ("ORIGINAL", "PRIMARY", "LOCALIZER")}, "localizer"),
        ({"description": "AAHead_Scout"}, "localizer"),
        ({"image_type": ("DERIVED", "PRIMARY", "DIFFUSION", "ADC")}, ""),
        ({"image_type": ("DERIVED", "PRIMARY", "DIFFUSION", "TRACEW")}, ""),
        ({"image_type": ("DERIVED", "SECONDARY")}, ""),
    ],
)
def test_kinds_that_are_not_learned_from(changes: dict[str, object], code: str) -> None:
    refusal = refuse_kind(instance(0, **changes))
    assert (refusal.code if refusal else "") == code


def test_a_file_of_nobody_is_refused() -> None:
    assert codes(series(subject="")) == {"no_subject": 24}


def test_persons_with_one_series_uid_are_kept_apart() -> None:
    other = [
        replace(i, location=f"o{n}", sop_uid=f"9.{n}", subject="0043")
        for n, i in enumerate(series())
    ]
    stacks = [item for item in find_stacks(series() + other) if isinstance(item, Stack)]
    assert [stack.subject for stack in stacks] == ["0042", "0043"]


def test_an_empty_direction_is_no_direction() -> None:
    nothing = (0.0, 0.0, 0.0, 0.0, 0.0, 0.0)
    files = [replace(i, frames=(frame(5.0 * n, orientation=nothing),))
             for n, i in enumerate(series())]  # fmt: skip
    assert "whole" not in codes(files)
