from zlib import crc32

import numpy as np
import pytest
import torch

from anycontrast.models.encoder import Encoder, EncoderConfig
from anycontrast.models.masking import MaskingConfig, mask_batch
from anycontrast.models.positions import sincos_position
from anycontrast_datasets.batch import PackedBatch
from anycontrast_datasets.contrast import ContrastDescriptor
from anycontrast_datasets.pack import pack_studies
from anycontrast_datasets.study import StudyArrays, StudyRecord, VolumeRecord
from anycontrast_kernels.patchify import intensity_map

PATCH = (4, 2, 6)


def study(
    study_id: str,
    contrasts: tuple[str, ...],
    *,
    grid: tuple[int, int, int] = (3, 4, 2),
    spacing_mm: tuple[float, float, float] = (4.0, 8.0, 3.0),
) -> StudyArrays:
    """A prepared study of noise; a volume depends on study id and contrast alone."""
    shape = (grid[0] * PATCH[0], grid[1] * PATCH[1], grid[2] * PATCH[2])
    codes, volumes = {}, []
    for name in contrasts:
        rng = np.random.default_rng(crc32(f"{study_id} {name}".encode()))
        codes[name] = rng.integers(1, 4000, size=shape).astype(np.int16)
        volumes.append(
            VolumeRecord(
                contrast=name,
                scale=0.5,
                offset=3.0,
                p0_5=0.0,
                p99_5=2000.0,
                mean=1000.0,
                std=580.0,
                num_foreground=codes[name].size,
                occupancy="",
                source_spacing_mm=spacing_mm,
                descriptor=ContrastDescriptor(te_s=0.01),
            )
        )
    record = StudyRecord(
        study_id=study_id,
        dataset="noise",
        subject_id=study_id,
        session_id="1",
        split="train",
        shape=shape,
        spacing_mm=spacing_mm,
        affine=((1.0, 0, 0, 0), (0, 1.0, 0, 0), (0, 0, 1.0, 0), (0, 0, 0, 1.0)),
        volumes=tuple(volumes),
    )
    return StudyArrays(record, codes)


def pack(*studies: StudyArrays) -> PackedBatch:
    return pack_studies(studies, PATCH, epochs=[0] * len(studies), drop_empty=False)


def config(**changes: object) -> EncoderConfig:
    sizes: dict[str, object] = {"width": 128, "depth": 2, "num_heads": 2, "patch_vox": PATCH}
    return EncoderConfig(**(sizes | changes))  # type: ignore[arg-type]


def build(**changes: object) -> Encoder:
    torch.manual_seed(0)
    encoder = Encoder(config(**changes))
    # Contrasts differ from the start, so that a mixed-up contrast shows.
    torch.nn.init.normal_(encoder.tokenizer.modulation.weight, std=0.5)
    return encoder


A = study("a", ("T1w", "FLAIR", "ADC"))
B = study("b", ("DWI",), grid=(2, 5, 3), spacing_mm=(2.0, 2.0, 5.0))
C = study("c", ("T2w", "unknown"), grid=(4, 1, 2))


def test_a_packed_study_is_encoded_as_if_alone() -> None:
    encoder = build()
    together, (tap,) = encoder(pack(A, B, C), taps=[0])
    alone = [encoder(pack(one), taps=[0]) for one in (A, B, C)]
    torch.testing.assert_close(together, torch.cat([x for x, _ in alone]), atol=1e-5, rtol=0)
    torch.testing.assert_close(tap, torch.cat([t[0] for _, t in alone]), atol=1e-5, rtol=0)


def test_contrasts_of_a_study_see_each_other() -> None:
    encoder = build()
    flair_alone = encoder(pack(study("a", ("FLAIR",))))[0]
    with_others = encoder(pack(A))[0][24:48]
    assert not torch.allclose(flair_alone, with_others, atol=1e-2)


def test_visible_tokens_are_encoded_as_if_the_hidden_ones_did_not_exist() -> None:
    encoder = build()
    masked = mask_batch(pack(A, B), MaskingConfig(), 0)
    visible = (masked.visible_index_N, masked.visible_lengths, masked.cu_visible)
    found = encoder(masked.batch, visible=visible)[0]
    assert found.shape == (sum(masked.visible_lengths), 128)
    masked.batch.codes_TP[masked.hidden_T] = 0
    torch.testing.assert_close(encoder(masked.batch, visible=visible)[0], found, atol=0, rtol=0)


def test_tokens_are_projection_plus_position_shared_by_contrasts() -> None:
    encoder = build(depth=1)
    batch = pack(A)
    tokens, runs = encoder.embed(batch)
    assert runs.lengths == (72,)
    x = intensity_map(batch.codes_TP, batch.volume_T, batch.intensity_V4)
    projected = encoder.tokenizer(x, batch.volume_T, batch.contrast_V, batch.descriptor_VK)
    position = tokens - projected
    expected = sincos_position(batch.position_mm_T3, 128, patch_mm=16.0)
    torch.testing.assert_close(position, expected, atol=1e-5, rtol=0)
    torch.testing.assert_close(position[:24], position[48:], atol=1e-5, rtol=0)


def test_contrast_embedding_is_optional_and_counts() -> None:
    assert build().contrast_embedding is None
    encoder = build(contrast_embedding=True)
    assert encoder.contrast_embedding is not None
    batch = pack(A)
    before = encoder.embed(batch)[0].detach()
    with torch.no_grad():
        encoder.contrast_embedding.weight[int(batch.contrast_V[1])] += 1.0
    moved = encoder.embed(batch)[0].detach() - before
    torch.testing.assert_close(moved[24:48], torch.ones(24, 128))
    assert float(moved[:24].abs().max()) == float(moved[48:].abs().max()) == 0.0


def test_taps_come_in_the_order_asked_and_before_the_norm() -> None:
    encoder = build(depth=3)
    batch = pack(B)
    normed, taps = encoder(batch, taps=(2, 0))
    torch.testing.assert_close(encoder.norm(taps[0]), normed)
    # A normed tap would pass the line above too.
    assert not torch.allclose(taps[0], normed, atol=1e-2)
    torch.testing.assert_close(taps[1], encoder(batch, taps=[0])[1][0])
    assert encoder(batch)[1] == []


def test_recomputing_activations_changes_no_gradient() -> None:
    grads = []
    for recompute in (False, True):
        encoder = build(recompute=recompute)
        torch.autograd.backward(encoder(pack(A, B))[0].square().sum())
        grads.append([p.grad for p in encoder.parameters() if p.grad is not None])
    assert len(grads[0]) == len(grads[1]) > 20
    for plain, recomputed in zip(*grads, strict=True):
        torch.testing.assert_close(plain, recomputed)


@torch.no_grad()
def test_bfloat16_weights_give_bfloat16_tokens_near_the_float32_ones() -> None:
    encoder = build()
    expected = encoder(pack(A, B))[0]
    found = encoder.bfloat16()(pack(A, B))[0]
    assert found.dtype == torch.bfloat16
    assert float((found.float() - expected).abs().mean()) < 0.05


@torch.no_grad()
def test_autocast_keeps_the_residual_stream_in_float32() -> None:
    encoder = build()
    expected = encoder(pack(A, B))[0]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        normed, (tap,) = encoder(pack(A, B), taps=[1])
    assert tap.dtype == torch.float32
    assert float((normed.float() - expected).abs().mean()) < 0.05


def test_another_patch_size_is_refused() -> None:
    with pytest.raises(ValueError, match=r"patches must be \(4, 4, 3\).*has \(4, 2, 6\)"):
        build(patch_vox=(4, 4, 3))(pack(B))


@pytest.mark.parametrize("taps", [(2,), (-1,)])
def test_a_tap_that_does_not_exist_is_refused(taps: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="blocks 0 to 1"):
        build()(pack(B), taps=taps)


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
