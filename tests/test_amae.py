from collections.abc import Callable
from dataclasses import replace

import pytest
import torch

from anycontrast.models.amae import AMAE, PRESETS, AMAEConfig, target_voxels
from anycontrast.models.masking import MaskedPack, MaskingConfig, mask_batch
from anycontrast.models.patches import patch_codes
from anycontrast_datasets.batch import PackedBatch
from anycontrast_datasets.study import StudyArrays
from anycontrast_kernels.patch_loss import normalize_patches
from anycontrast_kernels.patchify import intensity_map

PATCH = (4, 2, 6)


SEVEN = ("ADC", "DWI", "T2w", "GRE", "SWI", "T1w", "FLAIR")
DECODERS = ("joint", "cross")


def build(decoder: str = "joint", **changes: object) -> AMAE:
    torch.manual_seed(0)
    settings: dict[str, object] = {"preset": "tiny", "patch_vox": PATCH, "decoder": decoder}
    model = AMAE(AMAEConfig(**(settings | changes)))  # type: ignore[arg-type]
    # Contrasts differ from the start, so that a mixed-up contrast shows.
    torch.nn.init.normal_(model.encoder.tokenizer.modulation.weight, std=0.5)
    torch.nn.init.normal_(model.decoder.contrast_embedding.weight)
    return model


@pytest.fixture
def mask(noise_pack: Callable[..., PackedBatch]) -> Callable[..., MaskedPack]:
    def make(*studies: StudyArrays, seed: int = 0, **settings: object) -> MaskedPack:
        config = MaskingConfig(**settings)  # type: ignore[arg-type]
        return mask_batch(noise_pack(*studies), config, seed)

    return make


def with_float_codes(pack: MaskedPack) -> tuple[MaskedPack, torch.Tensor]:
    """The same pack with codes that take a gradient."""
    codes_B = pack.batch.codes_B.float().requires_grad_()
    return replace(pack, batch=replace(pack.batch, codes_B=codes_B)), codes_B


@pytest.mark.parametrize("norm_target", [False, True])
@pytest.mark.parametrize("decoder", DECODERS)
def test_loss_looks_at_the_voxels_of_hidden_patches_only(
    decoder: str,
    norm_target: bool,
    study_a: StudyArrays,
    study_b: StudyArrays,
    mask: Callable[..., MaskedPack],
    token_voxels: Callable[[PackedBatch], torch.Tensor],
) -> None:
    model = build(decoder, norm_target=norm_target)
    plain = mask(study_a, study_b)
    prediction = model.decode(model.encode(plain), plain)
    pack_with_grad, codes_B = with_float_codes(plain)
    loss = (prediction - model.target(pack_with_grad)).square().mean()
    (grad,) = torch.autograd.grad(loss, codes_B)
    size = grad[token_voxels(plain.batch)].abs().sum(1)
    assert bool((size[plain.hidden_T] > 0).all())
    assert float(size[~plain.hidden_T].max()) == 0.0


@pytest.mark.parametrize("decoder", DECODERS)
def test_prediction_looks_at_the_voxels_of_visible_patches_only(
    decoder: str,
    study_a: StudyArrays,
    study_b: StudyArrays,
    mask: Callable[..., MaskedPack],
    token_voxels: Callable[[PackedBatch], torch.Tensor],
) -> None:
    model = build(decoder)
    pack_with_grad, codes_B = with_float_codes(mask(study_a, study_b))
    prediction = model.decode(model.encode(pack_with_grad), pack_with_grad)
    (grad,) = torch.autograd.grad(prediction.square().sum(), codes_B)
    size = grad[token_voxels(pack_with_grad.batch)].abs().sum(1)
    assert bool((size[~pack_with_grad.hidden_T] > 0).all())
    assert float(size[pack_with_grad.hidden_T].max()) == 0.0


@pytest.mark.parametrize("decoder", DECODERS)
def test_stored_codes_of_hidden_patches_do_not_change_the_prediction(
    decoder: str,
    study_a: StudyArrays,
    study_b: StudyArrays,
    mask: Callable[..., MaskedPack],
    token_voxels: Callable[[PackedBatch], torch.Tensor],
) -> None:
    model = build(decoder)
    masked = mask(study_a, study_b)
    before = model(masked)
    masked.batch.codes_B[token_voxels(masked.batch)[masked.hidden_T]] //= 2
    after = model(masked)
    assert torch.equal(before.prediction_MP, after.prediction_MP)
    assert bool((before.loss_M != after.loss_M).all())


@pytest.mark.parametrize("strategy", ["per_contrast", "dirichlet"])
@pytest.mark.parametrize("decoder", DECODERS)
def test_a_packed_batch_gives_what_its_studies_give_alone(
    decoder: str,
    strategy: str,
    study_a: StudyArrays,
    study_b: StudyArrays,
    study_c: StudyArrays,
    mask: Callable[..., MaskedPack],
) -> None:
    model = build(decoder)
    together = model(mask(study_a, study_b, study_c, strategy=strategy))
    alone = [model(mask(one, strategy=strategy)) for one in (study_a, study_b, study_c)]
    for number, name in enumerate(together._fields):
        expected = torch.cat([out[number] for out in alone])
        torch.testing.assert_close(together[number], expected, atol=1e-5, rtol=0, msg=name)


def per_contrast(model: AMAE, masked: MaskedPack) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """Loss and prediction of every contrast of a pack of one study."""
    out = model(masked)
    row_M = masked.batch.volume_T[masked.target_index_M]
    return {
        name: (out.loss_M[row_M == row], out.prediction_MP[row_M == row])
        for row, name in enumerate(masked.batch.contrasts[0])
    }


@pytest.mark.parametrize("decoder", DECODERS)
def test_permuting_the_contrasts_of_a_study_permutes_nothing_else(
    decoder: str, noise_study: Callable[..., StudyArrays], mask: Callable[..., MaskedPack]
) -> None:
    model = build(decoder)
    straight = per_contrast(model, mask(noise_study("a", ("T1w", "FLAIR", "ADC", "SWI"))))
    permuted = per_contrast(model, mask(noise_study("a", ("SWI", "ADC", "T1w", "FLAIR"))))
    assert list(straight) != list(permuted)
    for name, (loss, prediction) in straight.items():
        torch.testing.assert_close(permuted[name][0], loss, atol=1e-5, rtol=0)
        torch.testing.assert_close(permuted[name][1], prediction, atol=1e-5, rtol=0)


@pytest.mark.parametrize("decoder", DECODERS)
def test_calling_a_contrast_by_another_name_changes_the_prediction(
    decoder: str, study_a: StudyArrays, mask: Callable[..., MaskedPack]
) -> None:
    model = build(decoder)
    masked = mask(study_a)
    before = model(masked).prediction_MP
    masked.batch.contrast_V[0] = 3
    assert not torch.allclose(model(masked).prediction_MP, before, atol=1e-3)


@pytest.mark.parametrize("decoder", DECODERS)
@pytest.mark.parametrize("paper_exact", [False, True])
@pytest.mark.parametrize("contrasts", [("DWI",), SEVEN, ("unknown",), ("T1w", "unknown")])
def test_any_set_of_contrasts_trains(
    contrasts: tuple[str, ...],
    paper_exact: bool,
    decoder: str,
    noise_study: Callable[..., StudyArrays],
    mask: Callable[..., MaskedPack],
) -> None:
    torch.manual_seed(0)
    model = AMAE(
        AMAEConfig(
            preset="tiny",
            patch_vox=PATCH,
            decoder=decoder,  # type: ignore[arg-type]
            paper_exact=paper_exact,
            use_descriptor=True,
        )
    )
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    masked = mask(noise_study("s", contrasts))
    losses = []
    for _ in range(6):
        optimizer.zero_grad()
        loss = model(masked).loss_M.mean()
        torch.autograd.backward(loss)
        for name, parameter in model.named_parameters():
            assert parameter.grad is not None, name
            assert bool(parameter.grad.isfinite().all()), name
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.9 * losses[0]


def test_norm_target_predicts_normalised_patches(
    study_a: StudyArrays, mask: Callable[..., MaskedPack]
) -> None:
    out, masked = build(norm_target=True)(mask(study_a)), mask(study_a)
    voxels = target_voxels(masked)
    torch.testing.assert_close(out.target_MP, normalize_patches(voxels))
    torch.testing.assert_close(
        out.loss_M, (out.prediction_MP - out.target_MP).square().mean(1), atol=1e-5, rtol=0
    )
    plain = build()(masked)
    torch.testing.assert_close(plain.target_MP, voxels)


@pytest.mark.parametrize("norm_target", [False, True])
@pytest.mark.parametrize("decoder", DECODERS)
def test_the_loss_alone_trains_as_with_predictions(
    decoder: str, norm_target: bool, study_a: StudyArrays, mask: Callable[..., MaskedPack]
) -> None:
    masked = mask(study_a)
    gradients = []
    for loss_only in (False, True):
        model = build(decoder, norm_target=norm_target)
        out = model(masked, loss_only=loss_only)
        torch.autograd.backward(out.loss_M.sum())
        gradients.append({name: p.grad for name, p in model.named_parameters()})
        assert len(out.prediction_MP) == len(out.target_MP) == (0 if loss_only else len(out.loss_M))
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradient, gradients[1][name], atol=1e-5, rtol=1e-4)


def test_target_is_the_z_score_of_the_hidden_voxels(
    study_a: StudyArrays, study_b: StudyArrays, mask: Callable[..., MaskedPack]
) -> None:
    masked = mask(study_a, study_b)
    batch = masked.batch
    every = intensity_map(patch_codes(batch), batch.volume_T, batch.intensity_V4)
    torch.testing.assert_close(target_voxels(masked), every[masked.hidden_T])


def test_only_the_sampled_targets_are_predicted(
    study_a: StudyArrays, study_b: StudyArrays, mask: Callable[..., MaskedPack]
) -> None:
    model = build("cross")
    every, some = mask(study_a, study_b), mask(study_a, study_b, target_fraction=0.25)
    rows = torch.isin(every.target_index_M, some.target_index_M)
    found, expected = model(some), model(every)
    assert len(found.loss_M) == some.num_targets < every.num_targets
    torch.testing.assert_close(found.loss_M, expected.loss_M[rows], atol=1e-5, rtol=0)


@pytest.mark.parametrize("norm_target", [False, True])
def test_reconstruction_is_in_z_scores(
    norm_target: bool, study_a: StudyArrays, study_b: StudyArrays, mask: Callable[..., MaskedPack]
) -> None:
    model = build(norm_target=norm_target)
    masked = mask(study_a, study_b)
    found = model.reconstruct(masked)
    assert found.shape == (masked.num_targets, 48) and not found.requires_grad
    prediction = model(masked).prediction_MP.detach()
    if norm_target:
        voxels = target_voxels(masked)
        deviation = (voxels.var(1, keepdim=True) + 1e-6).sqrt()
        prediction = prediction * deviation + voxels.mean(1, keepdim=True)
    torch.testing.assert_close(found, prediction)


def test_recomputing_activations_changes_no_gradient(
    study_a: StudyArrays, study_b: StudyArrays, mask: Callable[..., MaskedPack]
) -> None:
    grads = []
    for recompute in (False, True):
        model = build(recompute=recompute)
        torch.autograd.backward(model(mask(study_a, study_b)).loss_M.mean())
        grads.append([p.grad for p in model.parameters() if p.grad is not None])
    for plain, recomputed in zip(*grads, strict=True):
        torch.testing.assert_close(plain, recomputed)


def test_the_same_step_twice_is_equal_to_the_bit(
    study_a: StudyArrays,
    study_b: StudyArrays,
    study_c: StudyArrays,
    mask: Callable[..., MaskedPack],
) -> None:
    losses = []
    for _ in range(2):
        model = build()
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
        for step in range(3):
            optimizer.zero_grad()
            loss = model(mask(study_a, study_b, study_c, seed=step)).loss_M.mean()
            torch.autograd.backward(loss)
            optimizer.step()
        losses.append(loss.detach())
    assert torch.equal(losses[0], losses[1])


def count(model: torch.nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


@pytest.mark.parametrize("preset", PRESETS)
def test_presets_keep_a_head_dim_of_64(preset: str) -> None:
    config = AMAEConfig(preset=preset).resolved()  # type: ignore[arg-type]
    assert config.width is not None and config.num_heads is not None
    assert config.decoder_width is not None and config.decoder_num_heads is not None
    assert config.width == 64 * config.num_heads
    assert config.decoder_width == 64 * config.decoder_num_heads
    assert config.resolved() == config


def test_base_has_the_blocks_of_vit_b() -> None:
    with torch.device("meta"):
        model = AMAE(AMAEConfig(preset="base"))
    assert count(model.encoder.blocks) == 85_054_464


def test_the_size_of_bm_mae_can_be_written_down() -> None:
    with torch.device("meta"):
        model = AMAE(AMAEConfig(mlp_ratio=2.0))
    # BM-MAE's encoder blocks, and its decoder with 64 contrast rows instead of 4.
    assert count(model.encoder.blocks) == 56_724_480
    assert abs(count(model.decoder) - 7.2e6) < 0.1e6


def test_overrides_win_over_the_preset() -> None:
    config = AMAEConfig(preset="tiny", depth=5, mlp_ratio=2.0).resolved()
    assert (config.width, config.depth, config.mlp_ratio) == (128, 5, 2.0)


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"preset": "giant"}, r"model\.preset .*'giant'"),
        ({"patch_vox": (16, 16, 0)}, r"model\.patch_vox .*\(16, 16, 0\)"),
        ({"patch_vox": (16, 16)}, r"model\.patch_vox"),
        ({"norm_target": True, "patch_vox": (1, 1, 1)}, r"model\.norm_target"),
        ({"contrast_vector_size": 0}, r"model\.contrast_vector_size"),
        ({"position_patch_mm": 0.0}, r"model\.position_patch_mm"),
        ({"decoder": "conv"}, "joint or cross, got 'conv'"),
        ({"num_heads": 24}, r"encoder: head dim .* 768 / 24 = 32"),
        ({"decoder_num_heads": 12}, r"decoder: head dim .* 384 / 12 = 32.*num_heads=6"),
        ({"mlp_ratio": 0.0}, "encoder: mlp_ratio"),
        ({"width": 0}, "encoder: width"),
    ],
)
def test_bad_settings_are_named(changes: dict[str, object], match: str) -> None:
    with pytest.raises(ValueError, match=match):
        AMAEConfig(**changes)  # type: ignore[arg-type]
