from collections.abc import Callable

import pytest
import torch

from anycontrast.models.encoder import Encoder, EncoderConfig
from anycontrast.models.masking import MaskingConfig, mask_batch
from anycontrast.models.patches import patch_zscores
from anycontrast.models.positions import sincos_position
from anycontrast_datasets.batch import PackedBatch
from anycontrast_datasets.study import StudyArrays

PATCH = (4, 2, 6)


def config(**changes: object) -> EncoderConfig:
    sizes: dict[str, object] = {"width": 128, "depth": 2, "num_heads": 2, "patch_vox": PATCH}
    return EncoderConfig(**(sizes | changes))  # type: ignore[arg-type]


def build(**changes: object) -> Encoder:
    torch.manual_seed(0)
    encoder = Encoder(config(**changes))
    # Contrasts differ from the start, so that a mixed-up contrast shows.
    torch.nn.init.normal_(encoder.tokenizer.modulation.weight, std=0.5)
    return encoder


def test_a_packed_study_is_encoded_as_if_alone(
    noise_pack: Callable[..., PackedBatch],
    study_a: StudyArrays,
    study_b: StudyArrays,
    study_c: StudyArrays,
) -> None:
    encoder = build()
    together, (tap,) = encoder(noise_pack(study_a, study_b, study_c), taps=[0])
    alone = [encoder(noise_pack(one), taps=[0]) for one in (study_a, study_b, study_c)]
    torch.testing.assert_close(together, torch.cat([x for x, _ in alone]), atol=1e-5, rtol=0)
    torch.testing.assert_close(tap, torch.cat([t[0] for _, t in alone]), atol=1e-5, rtol=0)


def test_contrasts_of_a_study_see_each_other(
    noise_study: Callable[..., StudyArrays],
    noise_pack: Callable[..., PackedBatch],
    study_a: StudyArrays,
) -> None:
    encoder = build()
    flair_alone = encoder(noise_pack(noise_study("a", ("FLAIR",))))[0]
    with_others = encoder(noise_pack(study_a))[0][24:48]
    assert not torch.allclose(flair_alone, with_others, atol=1e-2)


def test_visible_tokens_are_encoded_as_if_the_hidden_ones_did_not_exist(
    noise_pack: Callable[..., PackedBatch],
    study_a: StudyArrays,
    study_b: StudyArrays,
    token_voxels: Callable[[PackedBatch], torch.Tensor],
) -> None:
    encoder = build()
    masked = mask_batch(noise_pack(study_a, study_b), MaskingConfig(), 0)
    visible = (masked.visible_index_N, masked.visible_lengths, masked.cu_visible)
    found = encoder(masked.batch, visible=visible)[0]
    assert found.shape == (sum(masked.visible_lengths), 128)
    masked.batch.codes_B[token_voxels(masked.batch)[masked.hidden_T]] = 0
    torch.testing.assert_close(encoder(masked.batch, visible=visible)[0], found, atol=0, rtol=0)


def test_tokens_are_projection_plus_position_shared_by_contrasts(
    noise_pack: Callable[..., PackedBatch], study_a: StudyArrays
) -> None:
    encoder = build(depth=1)
    batch = noise_pack(study_a)
    tokens, runs = encoder.embed(batch)
    assert runs.cu_seqlens.tolist() == [0, 72]
    x = patch_zscores(batch)
    projected = encoder.tokenizer(x, batch.volume_T, batch.contrast_V, batch.descriptor_VK)
    position = tokens - projected
    expected = sincos_position(batch.position_mm_T3, 128, patch_mm=16.0)
    torch.testing.assert_close(position, expected, atol=1e-5, rtol=0)
    torch.testing.assert_close(position[:24], position[48:], atol=1e-5, rtol=0)


def test_contrast_embedding_is_optional_and_counts(
    noise_pack: Callable[..., PackedBatch], study_a: StudyArrays
) -> None:
    assert build().contrast_embedding is None
    encoder = build(contrast_embedding=True)
    assert encoder.contrast_embedding is not None
    batch = noise_pack(study_a)
    before = encoder.embed(batch)[0].detach()
    with torch.no_grad():
        encoder.contrast_embedding.weight[int(batch.contrast_V[1])] += 1.0
    moved = encoder.embed(batch)[0].detach() - before
    torch.testing.assert_close(moved[24:48], torch.ones(24, 128))
    assert float(moved[:24].abs().max()) == float(moved[48:].abs().max()) == 0.0


def test_taps_come_in_the_order_asked_and_before_the_norm(
    noise_pack: Callable[..., PackedBatch], study_b: StudyArrays
) -> None:
    encoder = build(depth=3)
    batch = noise_pack(study_b)
    normed, taps = encoder(batch, taps=(2, 0))
    torch.testing.assert_close(encoder.norm(taps[0]), normed)
    # A normed tap would pass the line above too.
    assert not torch.allclose(taps[0], normed, atol=1e-2)
    torch.testing.assert_close(taps[1], encoder(batch, taps=[0])[1][0])
    assert encoder(batch)[1] == []


def test_recomputing_activations_changes_no_gradient(
    noise_pack: Callable[..., PackedBatch], study_a: StudyArrays, study_b: StudyArrays
) -> None:
    grads = []
    for recompute in (False, True):
        encoder = build(recompute=recompute)
        torch.autograd.backward(encoder(noise_pack(study_a, study_b))[0].square().sum())
        grads.append([p.grad for p in encoder.parameters() if p.grad is not None])
    assert len(grads[0]) == len(grads[1]) > 20
    for plain, recomputed in zip(*grads, strict=True):
        torch.testing.assert_close(plain, recomputed)


@torch.no_grad()
def test_bfloat16_weights_give_bfloat16_tokens_near_the_float32_ones(
    noise_pack: Callable[..., PackedBatch], study_a: StudyArrays, study_b: StudyArrays
) -> None:
    encoder = build()
    expected = encoder(noise_pack(study_a, study_b))[0]
    found = encoder.bfloat16()(noise_pack(study_a, study_b))[0]
    assert found.dtype == torch.bfloat16
    assert float((found.float() - expected).abs().mean()) < 0.05


@torch.no_grad()
def test_autocast_keeps_the_residual_stream_in_float32(
    noise_pack: Callable[..., PackedBatch], study_a: StudyArrays, study_b: StudyArrays
) -> None:
    encoder = build()
    expected = encoder(noise_pack(study_a, study_b))[0]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        normed, (tap,) = encoder(noise_pack(study_a, study_b), taps=[1])
    assert tap.dtype == torch.float32
    assert float((normed.float() - expected).abs().mean()) < 0.05


def test_another_patch_size_is_refused(
    noise_pack: Callable[..., PackedBatch], study_b: StudyArrays
) -> None:
    with pytest.raises(ValueError, match=r"patches must be \(4, 4, 3\).*has \(4, 2, 6\)"):
        build(patch_vox=(4, 4, 3))(noise_pack(study_b))


@pytest.mark.parametrize("taps", [(2,), (-1,)])
def test_a_tap_that_does_not_exist_is_refused(
    taps: tuple[int, ...], noise_pack: Callable[..., PackedBatch], study_b: StudyArrays
) -> None:
    with pytest.raises(ValueError, match="blocks 0 to 1"):
        build()(noise_pack(study_b), taps=taps)


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"num_heads": 4}, r"head dim .* 128 / 4 = 32.*num_heads=2"),
        ({"num_heads": 3}, "multiple of num_heads"),
        ({"width": 192, "num_heads": 1}, "from 64 to 128"),
        ({"width": 136}, "multiple of 8"),
        ({"depth": 0}, "must be >= 1"),
        ({"mlp_ratio": 0.0}, "mlp_ratio must be > 0"),
        ({"mlp_ratio": 1.001}, "whole"),
    ],
)
def test_shapes_that_do_not_work_are_refused(changes: dict[str, object], match: str) -> None:
    with pytest.raises(ValueError, match=f"encoder: .*{match}"):
        config(**changes)
