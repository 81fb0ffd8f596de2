"""Reconstruction panels and loss curves as PNG files."""

import json
import struct
from pathlib import Path

import numpy as np
import pytest
import torch

from anycontrast.evaluation import panels
from anycontrast.models.masking import MaskedPack, MaskingConfig, mask_batch
from anycontrast.models.patches import patch_zscores
from anycontrast_datasets.pack import pack_studies
from anycontrast_datasets.study import StudyArrays, StudyRecord, VolumeRecord


def make_pack(contrasts: tuple[str, ...], *, drop_empty: bool = True) -> MaskedPack:
    shape = (16, 24, 12)
    rng = np.random.default_rng(0)
    studies = []
    for number, names in enumerate((("T1w",), contrasts)):
        volumes, codes = [], {}
        for name in names:
            array = np.zeros(shape, dtype=np.int16)
            # Foreground in planes 4..7 only, and not in the first patches.
            array[4:, :, 4:8] = rng.integers(1, 4096, size=(12, 24, 4))
            codes[name] = array
            volumes.append(
                VolumeRecord(
                    contrast=name,
                    scale=1.0,
                    offset=0.0,
                    p0_5=0.0,
                    p99_5=4095.0,
                    mean=2000.0,
                    std=1000.0,
                    num_foreground=1,
                    occupancy="",
                    source_spacing_mm=(1.0, 1.0, 1.0),
                )
            )
        record = StudyRecord(
            study_id=f"study-{number}",
            dataset="test",
            subject_id="s",
            session_id="1",
            split="train",
            shape=shape,
            spacing_mm=(1.0, 0.5, 3.0),
            affine=((1, 0, 0, 0), (0, 1, 0, 0), (0, 0, 1, 0), (0, 0, 0, 1)),
            volumes=tuple(volumes),
        )
        studies.append(StudyArrays(record=record, codes=codes))
    batch = pack_studies(studies, (4, 4, 4), epochs=[0, 0], drop_empty=drop_empty)
    return mask_batch(batch, MaskingConfig(hidden_fraction=0.5), seed=0)


def truth(pack: MaskedPack) -> torch.Tensor:
    return patch_zscores(pack.batch, pack.target_index_M)


def png_size(path: Path) -> tuple[int, int]:
    head = path.read_bytes()[:24]
    assert head[:8] == b"\x89PNG\r\n\x1a\n"
    width, height = struct.unpack(">II", head[16:24])
    return width, height


def test_a_panel_has_one_row_per_contrast(tmp_path: Path) -> None:
    heights = {}
    for contrasts in (("T1w",), ("T1w", "FLAIR"), ("T1w", "FLAIR", "DWI", "ADC")):
        pack = make_pack(contrasts)
        path = tmp_path / "new" / f"{len(contrasts)}.png"
        panels.reconstruction_panel(path, pack, truth(pack), study=1)
        heights[len(contrasts)] = png_size(path)[1]
    assert heights == {1: 290, 2: 540, 4: 1040}


@pytest.mark.parametrize("drop_empty", [True, False])
def test_pictures_show_input_hidden_patches_and_prediction(drop_empty: bool) -> None:
    pack = make_pack(("FLAIR", "T1w"), drop_empty=drop_empty)
    predicted = torch.full_like(truth(pack), 7.0)
    for contrast, (image, masked, result) in zip(
        ("FLAIR", "T1w"), panels._panel_planes(pack, predicted, 1), strict=True
    ):
        assert image.shape == (16, 24)
        hidden = np.isnan(masked) & ~np.isnan(image)
        assert hidden.any()
        # Whole patches are hidden, prediction fills exactly those.
        assert np.array_equal(hidden, hidden[::4, ::4].repeat(4, 0).repeat(4, 1))
        assert np.all(result[hidden] == 7.0), contrast
        seen = ~np.isnan(masked)
        assert seen.any()
        assert np.array_equal(result[seen], image[seen])
        assert np.array_equal(masked[seen], image[seen])


def test_the_plane_is_one_with_foreground() -> None:
    pack = make_pack(("T1w",))
    (image, _, _), *rest = panels._panel_planes(pack, truth(pack), 1)
    assert not rest
    assert np.nanstd(image) > 0.5


def test_a_perfect_prediction_reconstructs_the_input() -> None:
    pack = make_pack(("T1w", "FLAIR"))
    for image, _, result in panels._panel_planes(pack, truth(pack), 1):
        np.testing.assert_array_equal(image, result)


def test_hidden_patches_that_were_not_decoded_stay_blank() -> None:
    whole = make_pack(("T1w",))
    config = MaskingConfig(hidden_fraction=0.5, target_fraction=0.3)
    pack = mask_batch(whole.batch, config, seed=0)
    assert len(pack.target_index_M) < int(pack.hidden_T.sum())
    blanks = 0
    for study in (0, 1):
        (image, _, result), *_ = panels._panel_planes(pack, truth(pack), study)
        blank = np.isnan(result)
        blanks += int(blank.sum())
        np.testing.assert_array_equal(result[~blank], image[~blank])
    assert blanks > 0


def test_wrong_study_or_prediction_is_refused(tmp_path: Path) -> None:
    pack = make_pack(("T1w",))
    with pytest.raises(ValueError, match=r"study must be in 0\.\.1"):
        panels.reconstruction_panel(tmp_path / "a.png", pack, truth(pack), study=2)
    with pytest.raises(ValueError, match="one prediction per target"):
        panels.reconstruction_panel(tmp_path / "a.png", pack, truth(pack)[1:])


def test_the_loss_curve_reads_what_has_the_number(tmp_path: Path) -> None:
    lines = [{"step": s, "loss": 1.0 / (s + 1)} for s in range(5)] + [{"step": 5, "val/dice": 0.5}]
    source = tmp_path / "metrics.jsonl"
    source.write_text("\n".join(json.dumps(line) for line in lines))
    assert panels._read_curve(source, "loss") == ([0, 1, 2, 3, 4], [1.0, 0.5, 1 / 3, 0.25, 0.2])
    panels.loss_curve(source, tmp_path / "loss.png")
    assert png_size(tmp_path / "loss.png") == (600, 350)
    with pytest.raises(ValueError, match=r"no line of metrics\.jsonl"):
        panels.loss_curve(source, tmp_path / "none.png", key="accuracy")
