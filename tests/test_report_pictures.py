"""Slices in a report: of whom, of what, how they are turned."""

import io
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest

from anycontrast_datasets.manifest import manifest_fingerprint, write_manifest
from anycontrast_datasets.report import write_report
from anycontrast_datasets.report_pictures import MAX_STUDIES, montage
from anycontrast_datasets.study import ShardError, Study, StudyArrays, Volume

EYE = ((1.0, 0, 0, 0), (0, 1.0, 0, 0), (0, 0, 1.0, 0), (0, 0, 0, 1.0))
StudyOf = Callable[..., StudyArrays]


class Shelf:
    """A store of studies in memory."""

    fingerprint = "shelf"

    def __init__(self, studies: Sequence[StudyArrays]) -> None:
        self._studies = studies
        self.records = tuple(study.record for study in studies)
        self.damaged: set[int] = set()

    def __len__(self) -> int:
        return len(self.records)

    def read(
        self, index: int, *, contrasts: Sequence[str] | None = None, label: bool = False
    ) -> StudyArrays:
        if index in self.damaged:
            raise ShardError("damaged")
        study = self._studies[index]
        names = contrasts or study.record.contrasts
        volumes = tuple(v for v in study.record.volumes if v.contrast in names)
        return StudyArrays(
            replace(study.record, volumes=volumes), {n: study.codes[n] for n in names}
        )


def head() -> npt.NDArray[np.int16]:
    """[16, 24, 8]: the right third is bright; plane 5 has most foreground."""
    codes = np.zeros((16, 24, 8), dtype=np.int16)
    codes[2:14, 2:22, 3:7] = 1000
    codes[1:15, 1:23, 5] = 1000
    codes[10:14, 18:22, 5] = 4095  # right, front
    return codes


def decoded(png: bytes) -> npt.NDArray[np.float64]:
    from matplotlib.image import imread

    return np.asarray(imread(io.BytesIO(png)), dtype=np.float64)


@pytest.fixture
def shelf(study_of: StudyOf) -> Shelf:
    studies = [study_of({"T1w": head(), "FLAIR": head()}, f"s{i}") for i in range(12)]
    named = [
        StudyArrays(replace(s.record, dataset="a" if i < 9 else "b"), s.codes)
        for i, s in enumerate(studies)
    ]
    return Shelf(named)


def test_pictures_are_of_volumes_without_a_face(shelf: Shelf) -> None:
    states = ("stripped", "defaced", "refaced", "present", "unknown")
    faces = {(f"s{i}", "T1w"): states[i % 5] for i in range(12)}
    found = montage(shelf, ["T1w", "FLAIR"], faces, any_face=False)  # type: ignore[arg-type]
    assert list(found) == ["T1w"]
    present = dict.fromkeys(faces, "present")
    assert not montage(shelf, ["T1w"], present, any_face=False)  # type: ignore[arg-type]
    synthetic = montage(shelf, ["T1w"], present, any_face=True)  # type: ignore[arg-type]
    assert len(synthetic["T1w"]) == MAX_STUDIES


def test_every_dataset_is_shown(shelf: Shelf) -> None:
    faces = {(f"s{i}", "T1w"): "stripped" for i in range(12)}
    found = montage(shelf, ["T1w"], faces, any_face=False)["T1w"]  # type: ignore[arg-type]
    assert sorted(picture.dataset for picture in found) == ["a", "a", "a", "b", "b"]


def test_a_slice_is_the_fullest_one_seen_from_the_feet(shelf: Shelf) -> None:
    faces = {("s0", "T1w"): "stripped"}
    (picture,) = montage(shelf, ["T1w"], faces, any_face=False)["T1w"]  # type: ignore[arg-type]
    image = decoded(picture.png)
    assert image.shape == (24, 16)
    assert picture.size_mm == (16.0, 24.0)
    assert picture.plane_mm == 1.5
    brightest = np.argwhere(image == image.max())
    rows, columns = brightest.mean(axis=0)
    assert rows < 12, "the front is above"
    assert columns < 8, "the subject's right is on the left"
    assert (image[0] == 0).all(), "background is black"


def test_a_damaged_study_leaves_a_gap(shelf: Shelf, caplog: pytest.LogCaptureFixture) -> None:
    shelf.damaged = {0}
    faces = {("s0", "T1w"): "stripped", ("s1", "T1w"): "stripped"}
    found = montage(shelf, ["T1w"], faces, any_face=False)  # type: ignore[arg-type]
    assert len(found["T1w"]) == 1
    assert "left out of the report" in caplog.text


@pytest.mark.parametrize(
    ("face", "options", "pictures", "note"),
    [
        ("stripped", {}, 5, "These pictures show people"),
        ("present", {}, 0, "no pictures: of no volume"),
        ("present", {"synthetic": True}, 5, ""),
        ("stripped", {"montage": False}, 0, "switched off"),
        ("stripped", {"shards": None}, 0, "no shards were given"),
        ("stripped", {"min_cell": 13}, 0, "no pictures"),
        ("stripped", {"made_from": "0" * 64}, 0, "not made from this manifest"),
    ],
)
def test_the_page_says_why_there_are_no_pictures(
    face: str,
    options: dict[str, object],
    pictures: int,
    note: str,
    shelf: Shelf,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("anycontrast_datasets.store.reader.open_store", lambda _: shelf)
    volume = Volume(
        contrast="T1w", location="", shape=(4, 4, 4), spacing_mm=(1, 1, 1), affine=EYE, face=face
    )
    studies = [
        Study(
            study_id=f"s{i}",
            dataset="a",
            subject_id=f"p{i}",
            session_id="1",
            split="train",
            volumes=(volume,),
        )
        for i in range(12)
    ]
    write_manifest(studies, tmp_path / "manifest.parquet")
    given = {"shards": tmp_path, **options}
    made_from = given.pop("made_from", manifest_fingerprint(tmp_path / "manifest.parquet"))
    monkeypatch.setattr(
        "anycontrast_datasets.store.reader.describe_store",
        lambda _: {"manifest_fingerprint": made_from},
    )
    summary = write_report(tmp_path, tmp_path / "report.html", **given)  # type: ignore[arg-type]
    page = (tmp_path / "report.html").read_text()
    assert summary["pictures"] == pictures
    assert page.count("<img") == pictures
    assert note in page
