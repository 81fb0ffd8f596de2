"""Three-plane pictures: how the subject is turned, which patches are shaded, of which study."""

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest

from anycontrast.models.amae import AMAEConfig
from anycontrast.models.masking import MaskingConfig, mask_batch
from anycontrast.training.config import Config, ConfigError
from anycontrast.view import EMPTY, HIDDEN, VISIBLE, ViewConfig, patch_cells, run_view
from anycontrast_datasets.prepare import PrepareConfig
from anycontrast_datasets.stream import StreamConfig, StudyStream
from anycontrast_datasets.study import ShardError, StudyArrays

StudyOf = Callable[..., StudyArrays]
PATCH = (8, 8, 8)


class Shelf:
    """A store of studies in memory."""

    fingerprint = "shelf"

    def __init__(self, studies: Sequence[StudyArrays]) -> None:
        self._studies = studies
        self.records = tuple(study.record for study in studies)

    def __len__(self) -> int:
        return len(self.records)

    def read(self, index: int, **_: object) -> StudyArrays:
        return self._studies[index]

    def close(self) -> None:
        return None


def blob() -> npt.NDArray[np.int16]:
    """[40, 48, 32]: a dim box with a bright corner to the right, front and head."""
    codes = np.zeros((40, 48, 32), dtype=np.int16)
    codes[8:40, 8:48, 8:32] = 900
    codes[30:39, 36:47, 22:31] = 4095
    return codes


@pytest.fixture
def shelf(study_of: StudyOf) -> Shelf:
    label = np.zeros((40, 48, 32), dtype=np.uint8)
    label[32:36, 40:44, 24:28] = 2
    one = study_of({"T1w": blob(), "FLAIR": blob() // 2}, "one", label=label)
    return Shelf([study_of({"DWI": blob()}, "zero"), one])


@pytest.fixture
def config(shelf: Shelf, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Config]:
    monkeypatch.setattr("anycontrast.shards.open_shards", lambda _: shelf)
    yield Config(
        root=str(tmp_path), name="run", seed=3, model=AMAEConfig(preset="tiny", patch_vox=PATCH)
    )


def pixels(path: str) -> npt.NDArray[np.float64]:
    from matplotlib.image import imread

    return np.asarray(imread(path), dtype=np.float64)[..., :3]


def test_a_study_is_found_by_number_and_by_id(config: Config) -> None:
    by_number = run_view(config, "1", ViewConfig())
    by_id = run_view(config, "one", ViewConfig())
    assert by_number == by_id == json.loads(json.dumps(by_id))
    assert by_id["picture"] == str(config.paths.report / "view-one.png")
    assert list(by_id["patches"]) == ["T1w", "FLAIR"]
    # The label's middle: what a person wants to see first.
    assert by_id["crossing_vox"] == [33, 41, 25]
    with pytest.raises(ConfigError, match=r"a number 0\.\.1 or a folder .* nearest id: one"):
        run_view(config, "onne", ViewConfig())
    with pytest.raises(ConfigError, match="got '7'"):
        run_view(config, "7", ViewConfig())


def test_the_right_front_and_head_are_where_radiologists_expect_them(
    config: Config, tmp_path: Path
) -> None:
    view = ViewConfig(out=str(tmp_path / "a.png"), mask=False, patches=False)
    picture = pixels(_drawn(config, view))
    grey = (np.ptp(picture, axis=2) < 0.02) & (picture.min(axis=2) > 0.99)
    columns = np.flatnonzero(grey.any(axis=0))
    # Three bright corners, one in each plane; text is not pure white.
    groups = np.split(columns, np.flatnonzero(np.diff(columns) > 20) + 1)
    assert len(groups) == 3
    panels = _panels(picture)
    for group, (left, right) in zip(groups, panels, strict=True):
        assert left <= group[0]
        assert group[-1] < (left + right) / 2, "front, right and right are drawn on the left"
        rows = np.flatnonzero(grey[:, group[0] : group[-1] + 1].any(axis=1))
        dim = np.abs(picture[:, group].mean(axis=(1, 2)) - 900 / 4095) < 0.02
        assert rows.mean() < np.flatnonzero(dim).mean(), "head and front are above"


def _drawn(config: Config, view: ViewConfig) -> str:
    return str(run_view(config, "0", replace(view, slice_mm=(14.0, 17.0, 10.0)))["picture"])


def _panels(picture: npt.NDArray[np.float64]) -> list[tuple[int, int]]:
    """Left and right end of the three planes: columns that are black somewhere."""
    black = np.flatnonzero((picture.max(axis=2) == 0).sum(axis=0) > 20)
    parts = np.split(black, np.flatnonzero(np.diff(black) > 5) + 1)
    return [(int(part[0]), int(part[-1])) for part in parts if len(part) > 50][:3]


def test_the_mask_is_the_one_training_draws(config: Config, shelf: Shelf) -> None:
    stream_config = StreamConfig(studies_per_step=1, flip_axes=[], num_threads=1, prefetch_steps=0)
    with StudyStream(shelf, stream_config, PATCH, seed=config.seed) as stream:  # type: ignore[arg-type]
        packs = [pack for _, step in zip(range(4), stream, strict=False) for pack in step.packs]
    assert {pack.epochs[0] for pack in packs} == {0, 1}
    for batch in packs:
        trained = mask_batch(batch, config.masking, config.seed)
        (index,) = [i for i, r in enumerate(shelf.records) if r.study_id == batch.study_ids[0]]
        cells = patch_cells(shelf.read(index), config, epoch=batch.epochs[0], seed=config.seed)
        for volume, contrast in enumerate(batch.contrasts[0]):
            tokens = slice(batch.volume_offsets[volume], batch.volume_offsets[volume + 1])
            for place, hidden in zip(
                batch.grid_T3[tokens].tolist(), trained.hidden_T[tokens].tolist(), strict=True
            ):
                assert cells[contrast][tuple(place)] == (HIDDEN if hidden else VISIBLE)
            assert int((cells[contrast] != EMPTY).sum()) == batch.volume_lengths[volume]


def test_another_epoch_or_seed_hides_other_patches(config: Config, shelf: Shelf) -> None:
    def drawn(epoch: int, seed: int) -> bytes:
        return patch_cells(shelf.read(0), config, epoch=epoch, seed=seed)["DWI"].tobytes()

    assert drawn(0, 3) == drawn(0, 3)
    assert len({drawn(0, 3), drawn(1, 3), drawn(0, 4)}) == 3


def test_patches_without_foreground_are_empty(config: Config, shelf: Shelf) -> None:
    cells = patch_cells(shelf.read(0), config, epoch=0, seed=0)["DWI"]
    assert cells.shape == (5, 6, 4)
    assert (cells[0] == EMPTY).all()
    assert (cells[:, 0] == EMPTY).all()
    assert (cells[1:, 1:, 1:] != EMPTY).all()
    share = (cells == HIDDEN).sum() / (cells != EMPTY).sum()
    assert abs(share - MaskingConfig().hidden_fraction) < 0.02


def test_what_is_switched_off_is_not_drawn(config: Config, tmp_path: Path) -> None:
    def colors(**options: bool) -> tuple[bool, bool, bool]:
        view = ViewConfig(out=str(tmp_path / "b.png"), **options)  # type: ignore[arg-type]
        red, green, blue = np.moveaxis(pixels(run_view(config, "1", view)["picture"]), 2, 0)
        is_blue = ((blue - red) > 0.25).sum() > 500
        is_yellow = ((red - blue) > 0.2) & (green - blue > 0.15)
        is_red = (red - green > 0.4) & (red - blue > 0.4)
        return bool(is_blue), bool(is_yellow.sum() > 50), bool(is_red.sum() > 10)

    assert colors() == (True, True, True)
    assert colors(mask=False) == (False, True, True)
    assert colors(patches=False) == (True, False, True)


def test_planes_outside_of_the_study_are_refused(config: Config) -> None:
    with pytest.raises(ConfigError, match=r"reaches \[20, 24, 16\] mm"):
        run_view(config, "0", ViewConfig(slice_mm=(0.0, 0.0, 40.0)))
    for broken in ({"epoch": -1}, {"seed": -1}):
        with pytest.raises(ValueError, match="must be >= 0"):
            ViewConfig(**broken)  # type: ignore[arg-type]


def test_damaged_shards_are_named(
    config: Config, shelf: Shelf, monkeypatch: pytest.MonkeyPatch
) -> None:
    def read(*_: object, **__: object) -> StudyArrays:
        raise ShardError("shard 3 is damaged")

    monkeypatch.setattr(shelf, "read", read)
    with pytest.raises(ShardError, match="shard 3"):
        run_view(config, "0", ViewConfig())
    assert not (config.paths.report / "view-zero.png").exists()


def test_a_folder_of_files_is_drawn(config: Config, tmp_path: Path) -> None:
    from anycontrast_datasets.sources.phantom import write_phantom
    from anycontrast_datasets.sources.phantom_config import PhantomConfig

    phantom = PhantomConfig(
        num_studies=1, spacing_mm=(6.0, 6.0, 6.0), keep_probability={}, always=["T1w", "FLAIR"]
    )
    write_phantom(tmp_path / "source", phantom)
    (folder,) = (tmp_path / "source").glob("sub-*")
    config = replace(config, prepare=PrepareConfig(spacing_mm=(6.0, 6.0, 6.0)))
    view = ViewConfig(out=str(tmp_path / "folder.png"))
    result = run_view(config, str(folder), view)
    assert set(result["patches"]) == {"T1w", "FLAIR"}
    assert pixels(result["picture"]).shape[1] > 600
