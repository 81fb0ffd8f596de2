"""Adaptive UNETR: any contrasts in any order, alone or packed, any power-of-two patch."""

import json
from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np
import pytest
import torch

from anycontrast.models.adaptive_unetr import AdaptiveUNETR, occupied_tokens
from anycontrast.models.amae import AMAE, AMAEConfig
from anycontrast.models.segmenter import (
    SegmenterConfig,
    build_segmenter,
    parse_segmenter_model_config,
    region_targets,
    segmentation_loss,
    segmenter_model_config,
)
from anycontrast_datasets.batch import PackedBatch
from anycontrast_datasets.pack import pack_studies
from anycontrast_datasets.study import StudyArrays

Triple = tuple[int, int, int]
ALL = ("T1w", "T2w", "FLAIR", "DWI")


@pytest.fixture
def make_study(study_of: Callable[..., StudyArrays]) -> Callable[..., StudyArrays]:
    def make(
        study_id: str, contrasts: Sequence[str], shape: Triple = (16, 16, 8), *, seed: int = 0
    ) -> StudyArrays:
        codes = {}
        for contrast in contrasts:
            # One stream per contrast: a contrast looks the same whatever it is listed with.
            rng = np.random.default_rng([seed, *contrast.encode()])
            codes[contrast] = rng.integers(1, 4096, size=shape, dtype=np.int16)
        label = np.zeros(shape, dtype=np.uint8)
        label[4:8, 4:8, 2:6] = 1
        spacing_mm = (1.0, 1.0, 2.0)
        return study_of(codes, study_id, spacing_mm=spacing_mm, step_mm=spacing_mm, label=label)

    return make


def tiny_model(patch_vox: Triple = (8, 8, 8), *, depth: int = 2) -> AMAEConfig:
    return AMAEConfig(preset="tiny", width=64, depth=depth, num_heads=1, patch_vox=patch_vox)


def tiny_segmenter(
    window_vox: Triple = (16, 16, 8), patch_vox: Triple = (8, 8, 8)
) -> AdaptiveUNETR:
    torch.manual_seed(0)
    config = SegmenterConfig(window_vox=window_vox, feature_size=4, regions={"a": [1], "b": [1, 2]})
    model = build_segmenter(config, tiny_model(patch_vox))
    assert isinstance(model, AdaptiveUNETR)
    # The tokenizer starts equal for all contrasts; make contrasts differ as training would.
    torch.nn.init.normal_(model.encoder.tokenizer.modulation.weight, std=0.3)
    return model.eval()


def pack(*studies: StudyArrays, patch_vox: Triple = (8, 8, 8)) -> PackedBatch:
    return pack_studies(
        list(studies), patch_vox, epochs=[0] * len(studies), drop_empty=False, labels=True
    )


def test_the_order_of_contrasts_changes_nothing(make_study: Callable[..., StudyArrays]) -> None:
    model = tiny_segmenter()
    study = make_study("a", ALL)
    order = (2, 0, 3, 1)
    volumes = tuple(study.record.volumes[i] for i in order)
    shuffled = replace(study, record=replace(study.record, volumes=volumes))
    with torch.no_grad():
        first, second = model(pack(study)), model(pack(shuffled))
    assert pack(shuffled).contrasts[0] == tuple(ALL[i] for i in order)
    torch.testing.assert_close(first, second, atol=1e-5, rtol=0)
    assert first.std() > 0.01


def test_which_contrast_a_volume_is_does_matter(make_study: Callable[..., StudyArrays]) -> None:
    model = tiny_segmenter()
    study = make_study("a", ("T1w",))
    renamed = replace(
        study,
        record=replace(study.record, volumes=(replace(study.record.volumes[0], contrast="FLAIR"),)),
        codes={"FLAIR": study.codes["T1w"]},
    )
    with torch.no_grad():
        assert not torch.allclose(model(pack(study)), model(pack(renamed)), atol=1e-4)


def test_studies_with_one_to_four_contrasts_in_one_batch_equal_themselves_alone(
    make_study: Callable[..., StudyArrays],
) -> None:
    model = tiny_segmenter()
    studies = [make_study(f"s{n}", ALL[:n], seed=n) for n in (1, 2, 3, 4)]
    with torch.no_grad():
        together = model(pack(*studies))
        alone = torch.cat([model(pack(study)) for study in studies])
    assert together.shape == (4, 2, 16, 16, 8)
    torch.testing.assert_close(together, alone, atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    ("patch_vox", "window_vox"),
    [
        ((8, 8, 4), (16, 24, 8)),
        ((4, 4, 4), (8, 12, 16)),
        ((16, 16, 16), (32, 16, 16)),
        ((2, 2, 1), (4, 6, 3)),
    ],
    ids=str,
)
def test_logits_have_the_shape_of_the_window(
    patch_vox: Triple, window_vox: Triple, make_study: Callable[..., StudyArrays]
) -> None:
    model = tiny_segmenter(window_vox, patch_vox)
    study = make_study("a", ("T1w", "ADC"), window_vox)
    with torch.no_grad():
        logits = model(pack(study, patch_vox=patch_vox))
    assert logits.shape == (1, 2, *window_vox)
    assert logits.dtype == torch.float32
    assert torch.isfinite(logits).all()


def test_the_head_sees_where_things_are(make_study: Callable[..., StudyArrays]) -> None:
    # A change of one voxel's code far from a corner must change the logits most near that voxel.
    model = tiny_segmenter((32, 16, 8))
    study = make_study("a", ("T1w",), (32, 16, 8))
    changed = replace(study, codes={"T1w": study.codes["T1w"].copy()})
    changed.codes["T1w"][26, 3, 5] = 4095 if study.codes["T1w"][26, 3, 5] < 2000 else 1
    with torch.no_grad():
        difference = (model(pack(study)) - model(pack(changed))).abs().sum(dim=(0, 1))
    where = np.unravel_index(int(difference.argmax()), difference.shape)
    assert np.abs(np.subtract(where, (26, 3, 5))).max() <= 2


def test_gradient_reaches_every_part(make_study: Callable[..., StudyArrays]) -> None:
    model = tiny_segmenter().train()
    # Three levels tap two blocks of the encoder; the last block feeds its norm.
    batch = pack(make_study("a", ALL[:2]), make_study("b", ALL[2:]))
    labels = torch.stack([label for label in batch.labels if label is not None])
    target = region_targets(labels, model.regions)
    loss = segmentation_loss(model(batch), target, kind="dice_ce").sum()
    torch.autograd.backward([loss])
    dead = [n for n, p in model.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0]
    # A convolution's bias before an instance norm has no effect; MONAI's blocks have none.
    assert dead == []


def test_weights_are_taken_over_and_reported() -> None:
    torch.manual_seed(1)
    pretrained = AMAE(tiny_model())
    model = tiny_segmenter()
    report = model.load_pretrained(pretrained.state_dict())
    for name, value in pretrained.encoder.state_dict().items():
        assert torch.equal(model.encoder.state_dict()[name], value)
    assert set(report.loaded) == {n for n in model.state_dict() if n.startswith("encoder.")}
    assert report.fresh
    assert all(n.startswith(("stem.", "decoder.")) for n in report.fresh)
    assert report.unused
    assert all(n.startswith("decoder.") for n in report.unused)


def test_a_missing_or_reshaped_encoder_tensor_is_refused_and_nothing_is_loaded() -> None:
    model = tiny_segmenter()
    before = {n: v.clone() for n, v in model.state_dict().items()}
    tensors = AMAE(tiny_model()).state_dict()
    del tensors["encoder.blocks.1.attention.qkv.weight"]
    with pytest.raises(ValueError, match=r"missing \['encoder.blocks.1.attention.qkv.weight'\]"):
        model.load_pretrained(tensors)
    with pytest.raises(ValueError, match="other shape"):
        model.load_pretrained(AMAE(tiny_model((4, 4, 4))).state_dict())
    assert all(torch.equal(before[n], v) for n, v in model.state_dict().items())


def test_batches_the_head_cannot_take_are_refused(make_study: Callable[..., StudyArrays]) -> None:
    model = tiny_segmenter()
    study = make_study("a", ("T1w",))
    study.codes["T1w"][:8] = 0
    dropped = pack_studies([study], (8, 8, 8), epochs=[0], drop_empty=True)
    with pytest.raises(ValueError, match="drop_empty=False"):
        model(dropped)
    with pytest.raises(ValueError, match="one patch grid"):
        model(pack(make_study("a", ("T1w",)), make_study("b", ("T1w",), (8, 8, 8))))


def test_window_and_patch_must_fit() -> None:
    with pytest.raises(ValueError, match="window_vox must be whole patches"):
        build_segmenter(SegmenterConfig(window_vox=(20, 16, 16)), tiny_model())
    with pytest.raises(ValueError, match="power of 2"):
        build_segmenter(SegmenterConfig(window_vox=(12, 12, 12)), tiny_model((6, 6, 6)))


def test_channels_keep_their_order_when_a_file_sorts_its_keys() -> None:
    config = SegmenterConfig(window_vox=(16, 16, 8), regions={"whole": [1, 2], "core": [1]})
    stored = json.dumps(segmenter_model_config(config, tiny_model()), sort_keys=True)
    loaded, _ = parse_segmenter_model_config(json.loads(stored))
    first, second = (build_segmenter(c, tiny_model()).regions for c in (config, loaded))
    assert list(first.items()) == list(second.items()) == [("core", [1]), ("whole", [1, 2])]


def test_model_config_survives_json() -> None:
    config = SegmenterConfig(window_vox=(16, 16, 8), regions={"whole": [1, 2], "core": [1]})
    stored = json.loads(json.dumps(segmenter_model_config(config, tiny_model())))
    assert parse_segmenter_model_config(stored) == (config, tiny_model().resolved())
    with pytest.raises(ValueError, match="must hold 'segmenter'"):
        parse_segmenter_model_config({"preset": "tiny"})


def test_loss_is_low_for_the_truth_and_binary_per_region() -> None:
    target = torch.zeros(2, 2, 4, 4, 4)
    target[:, :, :2] = 1.0
    right, wrong = (target * 2 - 1) * 20, (1 - target * 2) * 20
    for kind in ("dice", "dice_ce"):
        good = segmentation_loss(right, target, kind=kind)
        bad = segmentation_loss(wrong, target, kind=kind)
        assert good.shape == (2,)
        # Overlapping regions cost nothing: a softmax over regions would charge log 2 here.
        assert float(good.max()) < 1e-3
        assert float(bad.min()) > 0.9


def test_regions_are_unions_of_label_values() -> None:
    label = torch.tensor([[[[0, 1, 2, 4]]]], dtype=torch.uint8)
    channels = region_targets(label, {"whole": [1, 2, 4], "core": [1, 4]})
    assert channels[0, :, 0, 0].tolist() == [[0, 1, 1, 1], [0, 1, 0, 1]]


def test_background_patches_are_no_tokens(make_study: Callable[..., StudyArrays]) -> None:
    """Pretraining has no background tokens, so the encoder must not meet any in a finetune."""
    torch.manual_seed(0)
    study = make_study("a", ALL[:2], (16, 16, 16))
    for codes in study.codes.values():
        codes[:, :, 8:] = 0
    batch = pack_studies([study], (8, 8, 8), epochs=[0], drop_empty=False)
    model = AdaptiveUNETR(SegmenterConfig(window_vox=(16, 16, 16)), tiny_model()).eval()
    index_N, lengths, cu_seqlens = occupied_tokens(batch)
    assert (batch.num_tokens, lengths, cu_seqlens.tolist()) == (16, (8,), [0, 8])
    assert batch.grid_T3[index_N][:, 2].tolist() == [0] * 8
    seen: list[int] = []
    hook = model.encoder.blocks[0].register_forward_pre_hook(
        lambda _, inputs: seen.append(int(inputs[0].shape[0]))
    )
    logits = model(batch)
    hook.remove()
    assert seen == [8]
    assert bool(torch.isfinite(logits).all())


def test_a_window_of_nothing_but_background_is_predicted_too(
    make_study: Callable[..., StudyArrays],
) -> None:
    study = make_study("a", ALL[:1], (16, 16, 16))
    study.codes[ALL[0]][:] = 0
    batch = pack_studies([study], (8, 8, 8), epochs=[0], drop_empty=False)
    model = AdaptiveUNETR(SegmenterConfig(window_vox=(16, 16, 16)), tiny_model()).eval()
    assert bool(torch.isfinite(model(batch)).all())
