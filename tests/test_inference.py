"""Sliding windows: where they lie, how they blend, and that positions follow training."""

from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np
import numpy.typing as npt
import pytest
import torch
from torch import Tensor

from anycontrast.evaluation.inference import (
    predict_study,
    sliding_window,
    window_origins,
    window_view,
    with_contrasts,
)
from anycontrast.models.amae import AMAEConfig
from anycontrast.models.patches import patch_codes
from anycontrast.models.segmenter import Segmenter, SegmenterConfig, build_segmenter
from anycontrast.models.unetr import dense_volumes
from anycontrast_datasets.augment import augment_study
from anycontrast_datasets.batch import PackedBatch
from anycontrast_datasets.pack import pack_studies
from anycontrast_datasets.study import StudyArrays, StudyError

Triple = tuple[int, int, int]
PATCH: Triple = (4, 4, 4)
WINDOW: Triple = (8, 8, 4)


@pytest.fixture
def make_study(study_of: Callable[..., StudyArrays]) -> Callable[..., StudyArrays]:
    def make(shape: Triple, contrasts: Sequence[str] = ("T1w", "FLAIR")) -> StudyArrays:
        rng = np.random.default_rng(0)
        codes = {c: rng.integers(1, 4096, size=shape, dtype=np.int16) for c in contrasts}
        label = np.zeros(shape, dtype=np.uint8)
        return study_of(codes, split="test", spacing_mm=(1.0, 1.5, 2.0), label=label)

    return make


def tiny_segmenter() -> Segmenter:
    torch.manual_seed(0)
    model = AMAEConfig(preset="tiny", width=64, depth=2, num_heads=1, patch_vox=PATCH)
    config = SegmenterConfig(window_vox=WINDOW, feature_size=4, regions={"a": [1], "b": [2]})
    return build_segmenter(config, model)


def voxelwise(batch: PackedBatch) -> Tensor:
    """A 'model' whose logit depends on the voxel alone: blending must not change it."""
    return dense_volumes(batch)[:, None]


def expected_voxelwise(study: StudyArrays, contrast: str) -> npt.NDArray[np.float32]:
    z = np.clip((study.codes[contrast].astype(np.float32) - 2000) / 1000, -2.0, 2.095)
    return np.asarray(1 / (1 + np.exp(-z)), dtype=np.float32)


def test_a_box_of_one_window_equals_the_direct_forward(
    make_study: Callable[..., StudyArrays],
) -> None:
    model, study = tiny_segmenter(), make_study(WINDOW)
    batch = pack_studies([study], PATCH, epochs=[0], drop_empty=False)
    model.train()
    result = predict_study(model, study)
    assert model.training
    with torch.no_grad():
        direct = torch.sigmoid(model(batch))[0].numpy()
    assert result.shape == (2, *WINDOW)
    assert result.dtype == np.float32
    np.testing.assert_allclose(result, direct, atol=1e-6)


@pytest.mark.parametrize("blending", ["gaussian", "constant"])
@pytest.mark.parametrize("overlap", [0.0, 0.5, 0.75])
@pytest.mark.parametrize("shape", [(13, 9, 7), (5, 20, 3), (8, 8, 4), (3, 3, 3)], ids=str)
def test_every_voxel_of_any_box_is_predicted_once_over(
    shape: Triple, overlap: float, blending: str, make_study: Callable[..., StudyArrays]
) -> None:
    study = make_study(shape, ("T1w",))
    result = sliding_window(
        voxelwise,
        study,
        patch_vox=PATCH,
        window_vox=WINDOW,
        overlap=overlap,
        blending=blending,  # type: ignore[arg-type]
    )
    assert result.shape == (1, *shape)
    np.testing.assert_allclose(result[0], expected_voxelwise(study, "T1w"), atol=1e-5)


def test_windows_and_weights_are_those_of_monai(make_study: Callable[..., StudyArrays]) -> None:
    from monai.inferers import sliding_window_inference

    study = make_study((13, 18, 7), ("T1w",))
    ramp = torch.linspace(-3, 3, 8)[:, None, None] * torch.linspace(0.5, 1, 4)

    def uneven(window: Tensor) -> Tensor:
        return torch.sigmoid(window + ramp)

    def ours(batch: PackedBatch) -> Tensor:
        return torch.logit(uneven(dense_volumes(batch)[:, None]), eps=1e-6)

    image = dense_volumes(pack_studies([study], (1, 1, 1), epochs=[0], drop_empty=False))[None]
    for mode in ("gaussian", "constant"):
        theirs = sliding_window_inference(image, WINDOW, 1, uneven, overlap=0.5, mode=mode)
        result = sliding_window(
            ours,
            study,
            patch_vox=PATCH,
            window_vox=WINDOW,
            overlap=0.5,
            blending=mode,
        )
        np.testing.assert_allclose(result, np.asarray(theirs)[0], atol=1e-4)


def test_the_number_of_windows_per_batch_changes_nothing(
    make_study: Callable[..., StudyArrays],
) -> None:
    model, study = tiny_segmenter(), make_study((13, 9, 7))
    one = predict_study(model, study, windows_per_batch=1)
    np.testing.assert_allclose(one, predict_study(model, study, windows_per_batch=5), atol=1e-5)


def test_a_window_has_the_positions_of_the_same_training_crop(
    make_study: Callable[..., StudyArrays],
) -> None:
    study = make_study((20, 17, 6))
    seen = 0
    for seed in range(6):
        crop = augment_study(study, np.random.default_rng(seed), crop_vox=WINDOW)
        window = window_view(study, crop.origin_vox, WINDOW)
        first, second = (
            pack_studies([view], PATCH, epochs=[0], drop_empty=False) for view in (crop, window)
        )
        assert torch.equal(first.position_mm_T3, second.position_mm_T3)
        assert torch.equal(patch_codes(first), patch_codes(second))
        seen += crop.origin_vox != (0, 0, 0)
    assert seen >= 3


def test_a_small_box_is_padded_like_a_training_crop(make_study: Callable[..., StudyArrays]) -> None:
    study = make_study((5, 20, 3))
    crop = augment_study(study, np.random.default_rng(0), crop_vox=(8, 20, 4))
    assert window_origins((5, 20, 3), (8, 20, 4), 0.5) == [crop.origin_vox]


def test_positions_reach_the_model(make_study: Callable[..., StudyArrays]) -> None:
    # Two windows with equal voxels at different places must not get equal logits.
    model = tiny_segmenter().eval()
    study = make_study((16, 8, 4), ("T1w",))
    study.codes["T1w"][8:] = study.codes["T1w"][:8]
    result = predict_study(model, study, overlap=0.0)
    assert np.abs(result[:, :8] - result[:, 8:]).max() > 1e-4


def test_a_subset_is_predicted_as_if_the_study_had_nothing_else(
    make_study: Callable[..., StudyArrays],
) -> None:
    model, study = tiny_segmenter(), make_study((13, 9, 7))
    only = replace(
        study,
        record=replace(study.record, volumes=study.record.volumes[1:]),
        codes={"FLAIR": study.codes["FLAIR"]},
    )
    subset = predict_study(model, study, contrasts=["FLAIR"])
    np.testing.assert_array_equal(subset, predict_study(model, only))
    assert np.abs(subset - predict_study(model, study)).max() > 1e-4
    assert with_contrasts(study, ("FLAIR", "T1w")).record.contrasts == ("T1w", "FLAIR")


@pytest.mark.parametrize("contrasts", [["T2w"], [], ["T1w", "ADC"]])
def test_contrasts_the_study_lacks_are_refused(
    contrasts: list[str], make_study: Callable[..., StudyArrays]
) -> None:
    with pytest.raises(StudyError, match=r"study study.*T1w.*FLAIR"):
        predict_study(tiny_segmenter(), make_study(WINDOW), contrasts=contrasts)


def test_windows_that_are_not_whole_patches_and_full_overlap_are_refused(
    make_study: Callable[..., StudyArrays],
) -> None:
    call: Callable[..., object] = predict_study
    with pytest.raises(ValueError, match="whole patches"):
        call(tiny_segmenter(), make_study(WINDOW), window_vox=(8, 8, 6))
    with pytest.raises(ValueError, match="overlap"):
        call(tiny_segmenter(), make_study(WINDOW), overlap=1.0)
