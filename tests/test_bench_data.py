"""The benchmark of reading: it measures what it says, on studies made small here."""

import json
import logging
from pathlib import Path

import numpy as np
import pytest

from anycontrast.bench import chunks, codecs, data, patches
from anycontrast.bench.codecs import CodecsBenchConfig
from anycontrast.bench.data import DataBenchConfig
from anycontrast.bench.patches import PatchesBenchConfig
from anycontrast.bench.studies import taken_studies
from anycontrast.bench.timing import alternate, markdown_table
from anycontrast_datasets.store.reader import open_store
from anycontrast_datasets.study import StudyError
from anycontrast_datasets.volume import write_volume

SHAPE = (16, 20, 24)


@pytest.fixture
def studies(tmp_path: Path) -> Path:
    """Two studies of two contrasts, each with a bright block before zeros."""
    for number in range(2):
        for name in ("T1w", "FLAIR"):
            rng = np.random.default_rng([number, len(name)])
            array = np.zeros(SHAPE, dtype=np.int16)
            array[2:14, 2:18, 2:22] = rng.integers(500, 900, (12, 16, 20))
            path = tmp_path / "studies" / f"sub-{number}" / f"{name}.nii.gz"
            path.parent.mkdir(parents=True, exist_ok=True)
            write_volume(path, array, np.eye(4))
    return tmp_path / "studies"


def config_of(studies: Path, ways: tuple[str, ...]) -> DataBenchConfig:
    return DataBenchConfig(
        folder=str(studies.parent / "bench"),
        studies=str(studies),
        num_studies=2,
        rounds=1,
        ways=ways,
        real=str(studies.parent / "nothing"),
    )


def test_numbers_of_every_way_and_the_bars(studies: Path) -> None:
    ways = ("nibabel", "volume_store", "volume_store_2_threads", "zarr_store", "memcpy")
    result = json.loads(json.dumps(data.run(config_of(studies, ways))))
    for key in ("cpu_ms_per_study", "wall_ms_per_study", "mb_per_study"):
        assert list(result[key]) == list(ways)
    assert all(value > 0 for value in result["wall_ms_per_study"].values())
    assert result["raw_mb_per_study"] == pytest.approx(2 * 2 * 16 * 24 * 24 / 1e6, abs=1e-3)
    assert set(result["bars"]) == {
        "nibabel_over_volume_store_cpu",
        "two_threads_over_one_wall",
        "two_threads_over_one_best_wall",
        "compression_noisy",
    }
    for bar in result["bars"].values():
        sign, number = bar["bar"].split()
        assert sign == ">=" and bar["met"] == (bar["value"] >= float(number))
    assert result["two_thread_control"]["best_wall"] > 0
    assert not (studies.parent / "bench" / "data-caches").exists(), "caches are removed"


def test_missing_library_is_null_with_a_reason(
    studies: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setitem(data.LIBRARIES, "torchio", "no_such_library")
    with caplog.at_level(logging.WARNING):
        result = data.run(config_of(studies, ("torchio", "volume_store")))
    assert result["cpu_ms_per_study"]["torchio"] is None
    assert result["mb_per_study"]["torchio"] is None
    (note,) = result["warnings"]
    assert "no_such_library is not installed" in note and note in caplog.text


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_every_rival_runs(studies: Path) -> None:
    result = data.run(config_of(studies, data.WAYS))
    assert all(result["cpu_ms_per_study"][name] is not None for name in data.WAYS)
    assert "volume_store_over_monai_persistent_cpu" in result["bars"]


def test_taken_studies_keep_their_voxels_in_order(studies: Path, tmp_path: Path) -> None:
    made = taken_studies(studies, tmp_path / "cache", 2)
    store = open_store(made.store)
    assert [list(paths) for paths in made.files] == [["FLAIR", "T1w"]] * 2
    arrays = store.read(1)
    assert arrays.record.shape == (16, 24, 24), "padded to whole blocks"
    volume = arrays.record.volumes[1]
    codes = arrays.codes["T1w"][3, 3, 3:10].astype(np.float64)
    rng = np.random.default_rng([1, 3])
    expected = rng.integers(500, 900, (12, 16, 20))[1, 1, 1:8]
    np.testing.assert_allclose(codes * volume.scale + volume.offset, expected, atol=volume.scale)


def test_folder_without_studies_is_a_clear_error(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(StudyError, match="must hold folders"):
        taken_studies(tmp_path / "empty", tmp_path / "cache", 2)


@pytest.mark.parametrize("ways", [("nibabel",), ("volume_store", "tape")])
def test_unknown_way_is_refused(ways: tuple[str, ...]) -> None:
    with pytest.raises(ValueError, match="ways: must be"):
        DataBenchConfig(ways=ways)


def test_rounds_alternate_and_the_first_does_not_count() -> None:
    calls: list[tuple[str, int]] = []
    ways = {name: (lambda item, name=name: calls.append((name, item))) for name in "ab"}
    timings = alternate(ways, 2, 3)
    assert calls == [("a", 0), ("b", 0), ("a", 1), ("b", 1)] * 4
    assert len(timings["a"].cpu_s) == 6 and timings["b"].wall_ms >= timings["b"].best_wall_ms
    assert markdown_table(["a", "b"], [["1", "2"]]) == "| a | b |\n| --- | ---: |\n| 1 | 2 |"


@pytest.mark.filterwarnings("ignore")
def test_codec_and_chunk_tables(
    studies: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = taken_studies(studies, tmp_path / "cache", 2)
    monkeypatch.setattr(codecs, "bench_studies", lambda folder, count: made)
    monkeypatch.setattr(chunks, "CROP_VOX", (8, 8, 8))
    monkeypatch.setattr(chunks, "PATCH_VOX", (8, 8, 8))
    config = CodecsBenchConfig(
        folder=str(tmp_path / "bench"), rounds=1, chunk_vox=(0, 8), real=str(tmp_path / "nothing")
    )
    result = json.loads(json.dumps(codecs.run(config)))
    for coding in codecs.TABLED:
        assert list(result["codecs"][coding]) == ["noisy"]
        assert result["codecs"][coding]["noisy"]["raw int16"]["ratio"] == 1.0
    costs = result["codings"]["noisy"]
    assert list(costs) == list(codecs.CODINGS)
    assert costs["12 bits"]["max_code"] == 4095 > costs["noise / 16"]["max_code"]
    assert set(result["chunks"]) == {"volume store", "zarr 16x24x24", "zarr 8x8x8"}
    for name, row in result["chunks"].items():
        readers = {"anycontrast"} if name == "volume store" else set(row["whole"])
        assert {"anycontrast"} <= readers and set(row["crop"]) == set(row["whole"])
    assert result["markdown"]["chunks"].count("\n") == 4
    assert not (tmp_path / "bench" / "codecs-zarr").exists()


def test_patch_layouts_deliver_and_a_step_runs(
    studies: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = taken_studies(studies, tmp_path / "cache", 2)
    monkeypatch.setattr(patches, "bench_studies", lambda folder, count: made)
    monkeypatch.setattr(patches, "PATCH_VOX", (8, 8, 8))
    config = PatchesBenchConfig(folder=str(tmp_path), rounds=1, shares=(0.5, 1.0))
    result = json.loads(json.dumps(patches.run(config)))
    assert set(result["layouts"]) == {
        patches.VOLUMES, patches.TWO_DRAWS, patches.PACKED, "groups zstd-5", "groups lz4hc-5",
    }  # fmt: skip
    assert all(row["mb_per_study"] > 0 for row in result["layouts"].values())
    assert result["step"]["cpu_ms"] > 0 and result["markdown"].count("\n") == 6
