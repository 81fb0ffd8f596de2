"""UNETR's decoder beside MONAI's, and the stock head: fixed channels, zeros for missing."""

from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

from anycontrast.models.amae import AMAE, AMAEConfig
from anycontrast.models.segmenter import SegmenterConfig, build_segmenter
from anycontrast.models.unetr import (
    UNETR,
    UNETRDecoder,
    dense_volumes,
    full_resolution_stem,
    level_strides,
    tap_blocks,
)
from anycontrast_datasets.batch import PackedBatch
from anycontrast_datasets.pack import pack_studies
from anycontrast_datasets.study import StudyArrays, StudyError

Triple = tuple[int, int, int]
CHANNELS = ["FLAIR", "T1w", "T2w"]


@pytest.fixture
def make_batch(study_of: Callable[..., StudyArrays]) -> Callable[..., PackedBatch]:
    def make(contrasts: Sequence[Sequence[str]], shape: Triple = (16, 16, 8)) -> PackedBatch:
        studies = []
        for number, names in enumerate(contrasts):
            codes = {}
            for contrast in names:
                rng = np.random.default_rng([number, *contrast.encode()])
                codes[contrast] = rng.integers(1, 4096, size=shape, dtype=np.int16)
            studies.append(study_of(codes, f"study-{number}"))
        return pack_studies(studies, (8, 8, 8), epochs=[0] * len(studies), drop_empty=False)

    return make


def tiny_model(**changes: object) -> AMAEConfig:
    config = AMAEConfig(preset="tiny", width=64, depth=2, num_heads=1, patch_vox=(8, 8, 8))
    return replace(config, **changes)  # type: ignore[arg-type]


def tiny_unetr(*, tile: bool = True) -> UNETR:
    torch.manual_seed(0)
    config = SegmenterConfig(
        head="unetr",
        contrasts=CHANNELS,
        window_vox=(16, 16, 8),
        feature_size=4,
        tile_patch_embedding=tile,
    )
    model = build_segmenter(config, tiny_model())
    assert isinstance(model, UNETR)
    return model.eval()


def num_parameters(*modules: nn.Module) -> int:
    return sum(p.numel() for module in modules for p in module.parameters())


def test_patch_sixteen_has_exactly_the_layers_of_unetr() -> None:
    from monai.networks.nets import UNETR as MonaiUNETR

    monai = MonaiUNETR(in_channels=4, out_channels=3, img_size=32, hidden_size=96, num_heads=12)
    theirs = num_parameters(*(child for name, child in monai.named_children() if name != "vit"))
    ours = num_parameters(UNETRDecoder(96, (16, 16, 16), 16, 3), full_resolution_stem(4, 16))
    assert ours == theirs


def test_decoder_with_the_weights_of_unetr_gives_its_output() -> None:
    from monai.networks.nets import UNETR as MonaiUNETR

    torch.manual_seed(0)
    monai = MonaiUNETR(
        in_channels=2, out_channels=3, img_size=32, feature_size=4, hidden_size=48, num_heads=12
    )
    decoder, stem = UNETRDecoder(48, (16, 16, 16), 4, 3), full_resolution_stem(2, 4)
    pairs = [
        (decoder.taps[0], monai.encoder4),
        (decoder.taps[1], monai.encoder3),
        (decoder.taps[2], monai.encoder2),
        (decoder.ups[0], monai.decoder5),
        (decoder.ups[1], monai.decoder4),
        (decoder.ups[2], monai.decoder3),
        (decoder.ups[3], monai.decoder2),
        (decoder.out, monai.out),
        (stem, monai.encoder1),
    ]
    for ours, theirs in pairs:
        values = list(theirs.state_dict().values())
        ours.load_state_dict(dict(zip(ours.state_dict(), values, strict=True)))
    image = torch.randn(1, 2, 32, 32, 32)
    with torch.no_grad():
        last, hidden = monai.vit(image)
        maps = [monai.proj_feat(hidden[i]) for i in (3, 6, 9)]
        result = decoder(maps, monai.proj_feat(last), stem(image))
        torch.testing.assert_close(result, monai(image), atol=1e-5, rtol=0)


def test_levels_and_taps() -> None:
    assert level_strides((16, 16, 16)) == [(2, 2, 2)] * 4
    assert level_strides((8, 8, 4)) == [(2, 2, 2), (2, 2, 2), (2, 2, 1)]
    assert tap_blocks(12, 4) == [3, 6, 9]
    assert tap_blocks(24, 4) == [6, 12, 18]
    assert tap_blocks(2, 4) == [0, 1, 1]
    assert tap_blocks(12, 1) == []
    for patch_vox in ((1, 1, 1), (12, 16, 16), (0, 8, 8)):
        with pytest.raises(ValueError, match="power of 2"):
            level_strides(patch_vox)


def test_dense_volumes_are_the_z_scored_codes_in_place(
    make_batch: Callable[..., PackedBatch],
) -> None:
    batch = make_batch([["T1w"], ["T2w", "FLAIR"]])
    rng = np.random.default_rng([1, *b"FLAIR"])
    codes = rng.integers(1, 4096, size=(16, 16, 8), dtype=np.int16)
    expected = np.clip((codes - 2000.0) / 1000.0, -2.0, 2.095).astype(np.float32)
    torch.testing.assert_close(dense_volumes(batch)[2], torch.from_numpy(expected))


def test_a_missing_contrast_equals_one_that_is_zero_everywhere(
    make_batch: Callable[..., PackedBatch],
) -> None:
    model = tiny_unetr()
    missing = make_batch([["T1w", "T2w"]])
    explicit = make_batch([["T1w", "T2w", "FLAIR"]])
    intensity = explicit.intensity_V4.clone()
    intensity[2] = torch.tensor([0.0, 0.0, -1.0, 1.0])
    with torch.no_grad():
        first = model(missing)
        second = model(replace(explicit, intensity_V4=intensity))
        third = model(explicit)
    torch.testing.assert_close(first, second, atol=1e-6, rtol=0)
    assert not torch.allclose(first, third, atol=1e-3)


def test_channels_follow_the_configured_order_and_not_the_study(
    make_batch: Callable[..., PackedBatch],
) -> None:
    model = tiny_unetr()
    image = model.channels(make_batch([["T2w", "FLAIR"], ["T1w"]]))
    volumes = dense_volumes(make_batch([["T2w", "FLAIR"], ["T1w"]]))
    assert image.shape == (2, 3, 16, 16, 8)
    assert torch.equal(image[0, 0], volumes[1])
    assert torch.equal(image[0, 2], volumes[0])
    assert torch.equal(image[1, 1], volumes[2])
    assert not image[0, 1].any()
    assert not image[1, 0].any()


def test_a_batch_equals_its_studies_alone(make_batch: Callable[..., PackedBatch]) -> None:
    model = tiny_unetr()
    first, second = make_batch([["T1w"], ["T2w", "FLAIR"]]), make_batch([["T1w"]])
    with torch.no_grad():
        torch.testing.assert_close(model(first)[:1], model(second), atol=1e-5, rtol=0)


def test_a_study_without_any_channel_is_refused(make_batch: Callable[..., PackedBatch]) -> None:
    with pytest.raises(StudyError, match="study-1"):
        tiny_unetr()(make_batch([["T1w"], ["ADC"]]))


def test_only_contrasts_with_a_channel_are_accepted() -> None:
    assert tiny_unetr().accepts(CHANNELS)
    assert tiny_unetr().accepts(CHANNELS[:1])
    assert not tiny_unetr().accepts([*CHANNELS, "ADC"])


def test_channel_order_is_required() -> None:
    with pytest.raises(ValueError, match=r"segmenter.contrasts"):
        SegmenterConfig(head="unetr")


def test_blocks_are_taken_over_and_the_patch_embedding_is_the_mean_of_the_tokenizer(
    make_batch: Callable[..., PackedBatch],
) -> None:
    torch.manual_seed(1)
    pretrained = AMAE(tiny_model())
    nn.init.normal_(pretrained.encoder.tokenizer.modulation.weight, std=0.3)
    nn.init.normal_(pretrained.encoder.tokenizer.modulation.bias, std=0.3)
    model = tiny_unetr()
    report = model.load_pretrained(pretrained.state_dict())
    for part in ("blocks", "norm"):
        for name, value in getattr(pretrained.encoder, part).state_dict().items():
            assert torch.equal(getattr(model, part).state_dict()[name], value)
    assert "patch_embedding.weight" in report.loaded
    batch = make_batch([CHANNELS])
    with torch.no_grad():
        tokens, _ = pretrained.encoder.embed(batch)
        bare = make_batch([CHANNELS])
        position = pretrained.encoder.embed(
            replace(bare, position_mm_T3=torch.zeros_like(bare.position_mm_T3))
        )[0]
        # Positions cancel in the difference; what is left of the mean is the tokens' own part.
        zero = model.patch_embedding(model.channels(batch)).flatten(2)[0].T
    origin = torch.zeros(64)
    from anycontrast.models.positions import sincos_position

    origin = sincos_position(torch.zeros(1, 3), 64, patch_mm=16.0)[0]
    mean = (position - origin).view(3, -1, 64).mean(dim=0)
    torch.testing.assert_close(zero, mean, atol=1e-4, rtol=1e-4)
    assert tokens.shape == (12, 64)


def test_without_tiling_the_patch_embedding_stays_fresh() -> None:
    model = tiny_unetr(tile=False)
    before = model.patch_embedding.weight.clone()
    report = model.load_pretrained(AMAE(tiny_model()).state_dict())
    assert torch.equal(before, model.patch_embedding.weight)
    assert "patch_embedding.weight" in report.fresh
    tensors = AMAE(tiny_model()).state_dict()
    del tensors["encoder.norm.weight"]
    with pytest.raises(ValueError, match=r"encoder\.norm\.weight"):
        model.load_pretrained(tensors)


def test_gradient_reaches_blocks_and_head(make_batch: Callable[..., PackedBatch]) -> None:
    model = tiny_unetr().train()
    model(make_batch([["T1w", "FLAIR"], ["T2w"]])).square().mean().backward()
    dead = [n for n, p in model.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0]
    assert dead == []
