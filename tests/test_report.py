"""The numbers of a report: what it counts of a manifest, and what it withholds."""

import json
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from anycontrast_datasets.ledger import Refusal, refuse, write_ledger
from anycontrast_datasets.manifest import write_manifest
from anycontrast_datasets.report import write_report
from anycontrast_datasets.report_cells import WITHHELD
from anycontrast_datasets.study import (
    ContrastVote,
    Label,
    ManifestError,
    Study,
    Volume,
)

EYE = ((1.0, 0, 0, 0), (0, 1.0, 0, 0), (0, 0, 1.0, 0), (0, 0, 0, 1.0))


def make_study(
    number: int, contrasts: Sequence[str] = ("T1w",), *, subject: str = "", **changes: Any
) -> Study:
    volumes = changes.pop("volumes", {})
    return Study(
        **{
            "study_id": f"s{number:05d}",
            "dataset": "one",
            "subject_id": subject or f"p{number}",
            "session_id": "1",
            "split": "train",
            "volumes": tuple(make_volume(name, **volumes) for name in contrasts),
            **changes,
        }
    )


def make_volume(contrast: str, **changes: Any) -> Volume:
    return Volume(
        **{
            "contrast": contrast,
            "location": "private/name.nii.gz",
            "shape": (160, 192, 160),
            "spacing_mm": (1.0, 1.0, 1.0),
            "affine": EYE,
            "confidence": 0.9,
            "face": "stripped",
            "intensity": (10.0, 300.0, 900.0),
            "votes": (ContrastVote(source="bids", contrast=contrast, confidence=0.9),),
            **changes,
        }
    )


@pytest.fixture
def report_on(tmp_path: Path) -> Callable[..., dict[str, Any]]:
    """Write a manifest of studies and its report; returns the numbers of the page."""

    def make(
        studies: Sequence[Study], *, refusals: Sequence[Refusal] | None = None, **options: Any
    ) -> dict[str, Any]:
        folder = tmp_path / "manifest"
        (folder / "private").mkdir(parents=True, exist_ok=True)
        write_manifest(studies, folder / "manifest.parquet")
        if refusals is not None:
            write_ledger(refusals, folder / "private" / "ledger.csv")
        write_report(folder, tmp_path / "out" / "report.html", **options)
        return numbers_of(tmp_path / "out" / "report.html")

    return make


def numbers_of(page: Path) -> dict[str, Any]:
    text = page.read_text()
    found = re.search(r'<script type="application/json" id="numbers">(.*?)</script>', text)
    assert found is not None
    numbers: dict[str, Any] = json.loads(found[1])
    return numbers


def test_the_page_counts_what_the_manifest_holds(
    report_on: Callable[..., dict[str, Any]], tmp_path: Path
) -> None:
    label = Label(location="l", shape=(1, 1, 1), affine=EYE, grid_of="T1w")
    studies = [make_study(i, ("T1w", "FLAIR")) for i in range(12)]
    studies += [make_study(i, ("T1w",), split="val", label=label) for i in range(12, 27)]
    studies += [make_study(i, ("DWI", "ADC"), dataset="two", site="b") for i in range(27, 40)]
    numbers = report_on(studies, refusals=[refuse("a/b.nii", "not_3d", "4D")] * 11)
    assert numbers["totals"] == {
        "studies": 40,
        "subjects": 40,
        "volumes": 65,
        "labelled": 15,
        "sites": 1,
    }
    assert numbers["contrast_sets"]["rows"] == [
        {"contrasts": ["T1w"], "studies": 15},
        {"contrasts": ["DWI", "ADC"], "studies": 13},
        {"contrasts": ["T1w", "FLAIR"], "studies": 12},
    ]
    assert {row["name"]: row["studies"] for row in numbers["contrasts"]} == {
        "T1w": 27,
        "FLAIR": 12,
        "DWI": 13,
        "ADC": 13,
    }
    assert [(row["name"], row["studies"]) for row in numbers["splits"]] == [
        ("train", 25),
        ("val", 15),
    ]
    assert [(row["name"], row["volumes"]) for row in numbers["datasets"]] == [
        ("one", 39),
        ("two", 26),
    ]
    assert numbers["ledger"] == {
        "files": 11,
        "rows": [
            {
                "name": "not_3d",
                "files": 11,
                "remedy": "extract one 3D volume per contrast (e.g. the mean, or one echo) and "
                "scan that",
            }
        ],
    }
    page = (tmp_path / "out" / "report.html").read_text()
    assert "a/b.nii" not in page
    assert "name.nii" not in page
    assert "s00001" not in page
    assert "p1" not in json.dumps(numbers).replace('"p1"', "")


def test_the_same_manifest_gives_the_same_bytes(
    report_on: Callable[..., dict[str, Any]], tmp_path: Path
) -> None:
    studies = [make_study(i, ("T1w", "FLAIR")) for i in range(12)]
    report_on(studies)
    first = (tmp_path / "out" / "report.html").read_bytes()
    report_on(studies[::-1])
    assert (tmp_path / "out" / "report.html").read_bytes() == first


def test_rare_cells_are_withheld_everywhere(report_on: Callable[..., dict[str, Any]]) -> None:
    studies = [make_study(i, ("T1w",), site="big") for i in range(60)]
    studies += [make_study(i, ("T1w", "FLAIR"), split="val") for i in range(60, 90)]
    rare = {"face": "present", "flags": ("motion",), "spacing_mm": (0.7, 0.7, 7.7)}
    studies += [
        make_study(i, ("T1w", "CBF"), dataset="tiny", site="rare", split="test", volumes=rare)
        for i in range(90, 93)
    ]
    refusals = [refuse(f"{i}", "not_3d", "") for i in range(30)]
    refusals += [refuse("x", "not_mri", "")] * 2
    numbers = report_on(studies, refusals=refusals)
    flat = list(leaves(numbers))
    assert not [
        cell for cell in flat if isinstance(cell, int) and 0 < cell < 10 and cell not in (1, 2)
    ]
    assert {"contrasts": ["T1w", "CBF"], "studies": "< 10"} in numbers["contrast_sets"]["rows"]
    assert {row["name"]: row["studies"] for row in numbers["contrasts"]}["CBF"] == "< 10"
    assert numbers["datasets"] == [
        {"name": "one", "studies": WITHHELD, "subjects": WITHHELD, "volumes": WITHHELD},
        {"name": "tiny", "studies": "< 10", "subjects": "< 10", "volumes": "< 10"},
    ]
    splits = {row["name"]: row["studies"] for row in numbers["splits"]}
    assert splits == {"train": 60, "val": WITHHELD, "test": "< 10"}
    assert numbers["flags"] == [{"name": "motion", "volumes": "< 10"}]
    assert numbers["totals"]["labelled"] == 0
    assert numbers["ledger"]["rows"][0]["files"] == WITHHELD
    assert "7.7" not in json.dumps(numbers["geometry"])
    assert [row["name"] for row in numbers["intensities"]] == ["T1w", "FLAIR"]
    t1w = numbers["intensities"][0]
    assert [row["site"] for row in t1w["sites"]] == ["big", "not known"]
    assert t1w["more_sites"] == 1


def leaves(value: Any) -> Any:
    if isinstance(value, dict):
        for item in value.values():
            yield from leaves(item)
    elif isinstance(value, list):
        for item in value:
            yield from leaves(item)
    else:
        yield value


def test_studies_of_few_subjects_are_rare_however_many(
    report_on: Callable[..., dict[str, Any]],
) -> None:
    studies = [make_study(i) for i in range(50)]
    studies += [make_study(i, ("SWI",), subject=f"p{i % 4}") for i in range(50, 90)]
    numbers = report_on(studies)
    assert {row["name"]: row["studies"] for row in numbers["contrasts"]}["SWI"] == "< 10"


def test_one_is_enough_for_data_of_nobody(report_on: Callable[..., dict[str, Any]]) -> None:
    numbers = report_on([make_study(0), make_study(1, ("T1w", "CBF"))], min_cell=1)
    assert numbers["contrast_sets"]["rows"] == [
        {"contrasts": ["T1w"], "studies": 1},
        {"contrasts": ["T1w", "CBF"], "studies": 1},
    ]
    assert [row["name"] for row in numbers["geometry"]["spacing_finest_mm"]] == ["T1w", "CBF"]
    assert not [c for c in leaves(numbers) if isinstance(c, str) and c in ("< 1", WITHHELD)]


def test_near_duplicates_are_counted_by_kind(report_on: Callable[..., dict[str, Any]]) -> None:
    rng = np.random.default_rng(0)
    hashes = [rng.integers(0, 256, 64, dtype=np.uint8).tobytes().hex() for _ in range(30)]
    studies = [
        make_study(i, volumes={"image_hash": hashes[i], "voxels_sha256": hashes[i]})
        for i in range(30)
    ]
    # Ten people of train are met again in test.
    studies += [
        make_study(
            30 + i, split="test", volumes={"image_hash": hashes[i], "voxels_sha256": hashes[i]}
        )
        for i in range(10)
    ]
    found = report_on(studies, min_cell=5)["near_duplicates"]
    assert {row["name"]: row["pairs"] for row in found["pairs"]} == {
        "same subject": 0,
        "two subjects, same split": 0,
        "two subjects, across splits": 10,
    }
    assert found["compared"] == 40
    assert found["identical_volumes"] == 20


def test_more_sets_than_fit_are_counted_together(
    report_on: Callable[..., dict[str, Any]],
) -> None:
    names = ("T1w", "T2w", "PDw", "FLAIR", "DWI", "SWI")
    sets = [[name for bit, name in enumerate(names) if mask >> bit & 1] for mask in range(1, 64)]
    studies = [
        make_study(1000 * place + i, contrasts)
        for place, contrasts in enumerate(sets)
        for i in range(3 if place > 5 else 20)
    ]
    found = report_on(studies)["contrast_sets"]
    assert len(found["rows"]) == 6
    assert found["other"] == {"sets": 57, "studies": 171}


def test_intensities_are_medians_per_site(report_on: Callable[..., dict[str, Any]]) -> None:
    studies = [
        make_study(i, site="ab"[i % 2], volumes={"intensity": (1.0 + i % 2, 10.0 + i, 400.0)})
        for i in range(30)
    ]
    studies += [make_study(i, ("FLAIR",), volumes={"intensity": None}) for i in range(30, 45)]
    assert report_on(studies)["intensities"] == [
        {
            "name": "T1w",
            "all": {"p1": 1.5, "p50": 24.5, "p99": 400.0},
            "sites": [
                {"site": "a", "p1": 1.0, "p50": 24.0, "p99": 400.0},
                {"site": "b", "p1": 2.0, "p50": 25.0, "p99": 400.0},
            ],
            "more_sites": 0,
        }
    ]
    unknown = report_on([make_study(i) for i in range(12)])["intensities"][0]
    assert (unknown["sites"], unknown["more_sites"]) == ([], 0)


def test_a_manifest_of_few_people_says_almost_nothing(
    report_on: Callable[..., dict[str, Any]],
) -> None:
    numbers = report_on([make_study(i) for i in range(4)])
    assert numbers["totals"]["studies"] == "< 10"
    assert numbers["totals"]["subjects"] == "< 10"
    assert not numbers["intensities"]
    assert not any(numbers["geometry"].values())


def test_what_cannot_be_reported_is_said(tmp_path: Path) -> None:
    with pytest.raises(ManifestError, match="run the scan first"):
        write_report(tmp_path, tmp_path / "report.html")
    with pytest.raises(ValueError, match="min_cell must be at least 1"):
        write_report(tmp_path, tmp_path / "report.html", min_cell=0)
    assert not (tmp_path / "report.html").exists()


@pytest.mark.parametrize("seed", range(3))
def test_a_reader_cannot_compute_a_rare_set(
    seed: int, report_on: Callable[..., dict[str, Any]]
) -> None:
    from scipy.optimize import linprog

    rng = np.random.default_rng(seed)
    names = ("T1w", "T2w", "FLAIR", "DWI")
    sets = [tuple(n for b, n in enumerate(names) if mask >> b & 1) for mask in range(1, 16)]
    counts = rng.integers(1, 40, size=len(sets))
    studies = [
        make_study(1000 * place + i, contrasts)
        for place, (contrasts, count) in enumerate(zip(sets, counts, strict=True))
        for i in range(count)
    ]
    numbers = report_on(studies)
    rows = [(row["contrasts"], row["studies"]) for row in numbers["contrast_sets"]["rows"]]
    known = [([float(set(c) == set(s)) for s in sets], n) for c, n in rows]
    known += [
        ([float(row["name"] in s) for s in sets], row["studies"]) for row in numbers["contrasts"]
    ]
    known += [([1.0] * len(sets), numbers["totals"]["studies"])]
    known += [([float(len(s)) for s in sets], numbers["totals"]["volumes"])]
    equal = [(row, n) for row, n in known if isinstance(n, int)]
    rare = [row for row, n in known if n == "< 10"]
    assert rare
    for row in rare:
        results = [
            linprog(
                sign * np.array(row),
                A_eq=np.array([r for r, _ in equal]),
                b_eq=np.array([n for _, n in equal]),
                bounds=(0, None),
            )
            for sign in (1, -1)
        ]
        ends = [float(np.dot(np.asarray(result.x), row)) for result in results]
        assert ends[0] <= 1.001
        assert ends[1] >= 8.999


def test_45000_studies_are_reported_in_one_go(tmp_path: Path) -> None:
    from anycontrast.bench.synthetic_manifest import write_synthetic_manifest

    write_synthetic_manifest(tmp_path / "manifest.parquet", 45_000)
    summary = write_report(tmp_path, tmp_path / "report.html")
    assert summary["studies"] == 45_000
    assert summary["volumes"] > 100_000
    assert summary["bytes"] < 5e6
    numbers = numbers_of(tmp_path / "report.html")
    assert sum(row["studies"] for row in numbers["splits"]) == 45_000
    shown = [
        row["volumes"] for chart in numbers["geometry"].values() for r in chart for row in r["bins"]
    ]
    assert min(shown) >= 10
    listed = [row["studies"] for row in numbers["contrast_sets"]["rows"]]
    other = numbers["contrast_sets"]["other"]
    assert sum(listed) + (other["studies"] if other else 0) == 45_000
