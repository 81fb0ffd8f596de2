"""Stacks of any direction come out where their headers say, or not at all."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from anycontrast_datasets.sources import dicom_convert
from anycontrast_datasets.sources.dicom_convert import convert, make_converter
from anycontrast_datasets.sources.dicom_header import Instance, read_instance
from anycontrast_datasets.sources.dicom_series import Stack
from anycontrast_datasets.study import VolumeError
from anycontrast_datasets.volume import LoadedVolume, read_volume, write_volume

MARK = (5, 9, 20)
"""Slice, row, column of the brightest pixel."""


def write_stack(
    dicom_head: Callable[..., Any], root: Path, row: npt.ArrayLike, column: npt.ArrayLike,
    **tags: object,
) -> Stack:  # fmt: skip
    """24 slices 6 mm apart along the normal of (row, column), with one marked pixel."""
    row, column = np.asarray(row, dtype=float), np.asarray(column, dtype=float)
    normal = np.cross(row, column)
    instances = []
    for index in range(24):
        corner = -93 * row - 93 * column + (6 * index - 69) * normal
        slice_ = dicom_head(index, **tags)
        slice_.ImagePositionPatient = [f"{v:.8g}" for v in corner]
        slice_.ImageOrientationPatient = [f"{v:.8g}" for v in (*row, *column)]
        pixels = np.frombuffer(slice_.PixelData, "<u2").reshape(32, 32).copy()
        if index == MARK[0]:
            pixels[MARK[1], MARK[2]] = 4000
        slice_.PixelData = pixels.tobytes()
        slice_.save_as(root / f"{index}", enforce_file_format=True)
        read = read_instance(root, f"{index}", max_bytes=2**24)
        assert isinstance(read, Instance)
        instances.append(read)
    return Stack(subject="s", study_uid="1.2", instances=tuple(instances))


def place_of_mark(stack: Stack) -> npt.NDArray[np.float64]:
    """Where the headers put the marked pixel, RAS+ mm."""
    frame = stack.instances[MARK[0]].frames[0]
    assert frame.position_mm and frame.orientation and frame.spacing_mm
    row, column = np.array(frame.orientation[:3]), np.array(frame.orientation[3:])
    step_row, step_column = frame.spacing_mm
    lps = np.array(frame.position_mm) + MARK[2] * step_column * row + MARK[1] * step_row * column
    return np.asarray(lps * (-1, -1, 1))


def turned(degrees: float) -> tuple[list[float], list[float]]:
    c, s = np.cos(np.radians(degrees)), np.sin(np.radians(degrees))
    return [c, s, 0.0], [-s * c, c * c, s]


@pytest.mark.parametrize(
    ("row", "column", "maker"),
    [
        ([1, 0, 0], [0, 1, 0], "SIEMENS"),
        ([0, 1, 0], [0, 0, -1], "GE MEDICAL SYSTEMS"),
        ([1, 0, 0], [0, 0, -1], "Philips Medical Systems"),
        ([-1, 0, 0], [0, 1, 0], "SIEMENS"),
        (*turned(10.0), "GE MEDICAL SYSTEMS"),
        (*turned(40.0), "Philips Medical Systems"),
    ],
)
def test_a_marked_pixel_comes_out_where_its_header_says(
    dicom_head: Callable[..., Any], tmp_path: Path, row: list[float], column: list[float],
    maker: str,
) -> None:  # fmt: skip
    stack = write_stack(dicom_head, tmp_path, row, column, Manufacturer=maker)
    path = convert(stack, "abc", tmp_path, make_converter(tmp_path, 2**24))
    loaded = read_volume(path)
    index = np.array(np.unravel_index(loaded.array.argmax(), loaded.array.shape))
    assert loaded.array.max() == 4000
    place = (loaded.affine @ np.append(index, 1.0))[:3]
    assert np.allclose(place, place_of_mark(stack), atol=0.02)


@pytest.mark.parametrize("fault", ["shifted", "mirrored", "short"])
def test_a_volume_in_the_wrong_place_is_refused(
    dicom_head: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fault: str
) -> None:
    stack = write_stack(dicom_head, tmp_path, [1, 0, 0], [0, 1, 0])
    run = dicom_convert._run

    def faulty(*args: Any) -> Path:
        path = run(*args)
        good: LoadedVolume = read_volume(path)
        affine, array = good.affine.copy(), good.array
        if fault == "shifted":
            affine[2, 3] += 6.0
        if fault == "mirrored":
            affine[0, 0] *= -1
        if fault == "short":
            array = array[:, :, :-1]
        write_volume(path, np.ascontiguousarray(array), affine)
        return path

    monkeypatch.setattr(dicom_convert, "_run", faulty)
    with pytest.raises(VolumeError, match="does not lie where its slices do") as caught:
        convert(stack, "abc", tmp_path, make_converter(tmp_path, 2**24))
    assert caught.value.code == "conversion_failed"
    assert not list(tmp_path.rglob("*.nii.gz"))


def test_rescaled_and_large_values_are_kept(dicom_head: Callable[..., Any], tmp_path: Path) -> None:
    stack = write_stack(
        dicom_head, tmp_path, [1, 0, 0], [0, 1, 0], RescaleSlope="0.5", RescaleIntercept="-10"
    )
    loaded = read_volume(convert(stack, "abc", tmp_path, make_converter(tmp_path, 2**24)))
    assert (loaded.array.min(), loaded.array.max()) == (-10.0, 1990.0)


def test_other_content_gets_another_name(dicom_head: Callable[..., Any], tmp_path: Path) -> None:
    converter = make_converter(tmp_path, 2**24)
    stack = write_stack(dicom_head, tmp_path, [1, 0, 0], [0, 1, 0])
    first = convert(stack, "abc", tmp_path, converter)
    changed = replace(stack.instances[0], pixels_sha256="f" * 64)
    other = replace(stack, instances=(changed, *stack.instances[1:]))
    assert convert(other, "abc", tmp_path, converter) != first
    assert convert(stack, "abc", tmp_path, replace(converter, version="v2")) != first
    assert convert(stack, "abc", tmp_path, converter) == first
