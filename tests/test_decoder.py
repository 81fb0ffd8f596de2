from collections.abc import Callable

import pytest
import torch

from anycontrast.models.decoder import CrossDecoder, DecoderConfig, JointDecoder, build_decoder
from anycontrast.models.masking import MaskedPack, MaskingConfig, mask_batch
from anycontrast.models.patches import patch_codes
from anycontrast_datasets.batch import PackedBatch
from anycontrast_datasets.study import StudyArrays

PATCH = (4, 2, 6)


KINDS = ("joint", "cross")
WIDTH = 24


def config(**changes: object) -> DecoderConfig:
    sizes: dict[str, object] = {
        "encoder_width": WIDTH,
        "num_voxels": 48,
        "width": 64,
        "depth": 2,
        "num_heads": 1,
    }
    return DecoderConfig(**(sizes | changes))  # type: ignore[arg-type]


def build(kind: str, **changes: object) -> JointDecoder | CrossDecoder:
    torch.manual_seed(0)
    decoder = build_decoder(config(kind=kind, **changes))
    torch.nn.init.normal_(decoder.contrast_embedding.weight)
    return decoder


def encode(pack: MaskedPack) -> torch.Tensor:
    """Stands in for an encoder: any function of the visible patches, each by itself."""
    codes = patch_codes(pack.batch, pack.visible_index_N).float()
    return torch.sin(codes[:, :WIDTH])


@pytest.fixture
def mask(noise_pack: Callable[..., PackedBatch]) -> Callable[..., MaskedPack]:
    def make(*studies: StudyArrays, fraction: float = 1.0) -> MaskedPack:
        return mask_batch(noise_pack(*studies), MaskingConfig(target_fraction=fraction), 0)

    return make


@pytest.mark.parametrize("kind", KINDS)
def test_a_packed_study_is_decoded_as_if_alone(
    kind: str, study_a: StudyArrays, study_b: StudyArrays, mask: Callable[..., MaskedPack]
) -> None:
    decoder = build(kind)
    together, alone = mask(study_a, study_b), [mask(study_a), mask(study_b)]
    found = decoder(encode(together), together)
    expected = torch.cat([decoder(encode(one), one) for one in alone])
    assert found.shape == (together.num_targets, 48)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)


def test_cross_predictions_do_not_depend_on_which_targets_are_sampled(
    study_a: StudyArrays, study_b: StudyArrays, mask: Callable[..., MaskedPack]
) -> None:
    decoder = build("cross")
    every, some = mask(study_a, study_b), mask(study_a, study_b, fraction=0.25)
    assert 0 < some.num_targets < every.num_targets
    rows = torch.isin(every.target_index_M, some.target_index_M)
    torch.testing.assert_close(
        decoder(encode(some), some), decoder(encode(every), every)[rows], atol=1e-5, rtol=0
    )


def test_joint_decodes_a_sample_of_the_same_predictions(
    study_a: StudyArrays, study_b: StudyArrays, mask: Callable[..., MaskedPack]
) -> None:
    decoder = build("joint")
    every, some = mask(study_a, study_b), mask(study_a, study_b, fraction=0.25)
    rows = torch.isin(every.target_index_M, some.target_index_M)
    torch.testing.assert_close(
        decoder(encode(some), some), decoder(encode(every), every)[rows], atol=1e-5, rtol=0
    )


@pytest.mark.parametrize("kind", KINDS)
def test_every_visible_token_of_the_study_counts_and_none_of_another(
    kind: str, study_a: StudyArrays, study_b: StudyArrays, mask: Callable[..., MaskedPack]
) -> None:
    decoder = build(kind)
    both = mask(study_a, study_b)
    encoded = encode(both).requires_grad_()
    of_a = both.target_lengths[0]
    prediction = decoder(encoded, both)
    (grad,) = torch.autograd.grad(prediction[:of_a].sum(), encoded)
    num_a = both.visible_lengths[0]
    assert bool((grad[:num_a].abs().sum(1) > 0).all())
    assert float(grad[num_a:].abs().max()) == 0.0


@pytest.mark.parametrize("kind", KINDS)
def test_targets_differ_by_place_and_by_contrast(
    kind: str, study_a: StudyArrays, mask: Callable[..., MaskedPack]
) -> None:
    decoder = build(kind)
    one = mask(study_a)
    prediction = decoder(encode(one), one)
    distance = torch.cdist(prediction, prediction) + 10 * torch.eye(len(prediction))
    assert float(distance.detach().min()) > 1e-3


@pytest.mark.parametrize("kind", KINDS)
def test_visible_tokens_are_told_by_place(
    kind: str, study_b: StudyArrays, mask: Callable[..., MaskedPack]
) -> None:
    """Swapping what two visible tokens of a contrast hold changes the predictions."""
    decoder = build(kind)
    one = mask(study_b)
    encoded = encode(one)
    swapped = encoded.clone()
    swapped[[0, 1]] = encoded[[1, 0]]
    assert not torch.allclose(decoder(encoded, one), decoder(swapped, one), atol=1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_all_parameters_get_a_gradient(
    kind: str, study_a: StudyArrays, study_b: StudyArrays, mask: Callable[..., MaskedPack]
) -> None:
    decoder = build(kind)
    one = mask(study_a, study_b)
    torch.autograd.backward(decoder(encode(one), one).square().mean())
    for name, parameter in decoder.named_parameters():
        assert parameter.grad is not None and float(parameter.grad.abs().max()) > 0, name


@pytest.mark.parametrize("kind", KINDS)
def test_recomputing_activations_changes_no_gradient(
    kind: str, study_a: StudyArrays, study_b: StudyArrays, mask: Callable[..., MaskedPack]
) -> None:
    grads = []
    one = mask(study_a, study_b)
    for recompute in (False, True):
        decoder = build(kind, recompute=recompute)
        torch.autograd.backward(decoder(encode(one), one).square().mean())
        grads.append([parameter.grad for parameter in decoder.parameters()])
    for plain, recomputed in zip(*grads, strict=True):
        torch.testing.assert_close(plain, recomputed)


def test_bad_settings_are_named() -> None:
    with pytest.raises(ValueError, match=r"decoder\.kind must be joint or cross, got 'unet'"):
        config(kind="unet")
    with pytest.raises(ValueError, match=r"decoder: head dim .* = 32"):
        config(width=384, num_heads=12)
