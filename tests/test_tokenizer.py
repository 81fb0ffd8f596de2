import pytest
import torch
import torch.nn.functional as F

from anycontrast.models.tokenizer import DynamicTokenizer
from anycontrast_datasets.contrast import DESCRIPTOR_SIZE, ContrastDescriptor, contrast_id
from anycontrast_kernels.patchify import patchify

PATCH = (4, 2, 6)
NUM_VOXELS = 48
WIDTH = 24
CONTRASTS = ("T1w", "T2w", "FLAIR", "DWI", "ADC", "GRE", "SWI")


def build(*, paper_exact: bool = False, use_descriptor: bool = False) -> DynamicTokenizer:
    torch.manual_seed(0)
    return DynamicTokenizer(
        NUM_VOXELS,
        WIDTH,
        contrast_vector_size=8,
        paper_exact=paper_exact,
        use_descriptor=use_descriptor,
    )


def stir(tokenizer: DynamicTokenizer) -> None:
    """Move every weight away from its initial value, so that contrasts differ."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in tokenizer.parameters():
            parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator))


@torch.no_grad()
def conv_equivalent(
    tokenizer: DynamicTokenizer, volume_XYZ: torch.Tensor, contrast: int
) -> torch.Tensor:
    """The paper's way: build the kernel and bias of one contrast, then convolve its volume."""
    m = tokenizer.contrast_vector.weight[contrast]
    scale, shift = (tokenizer.modulation.weight @ m + tokenizer.modulation.bias).chunk(2)
    kernel = tokenizer.projection.weight.reshape(WIDTH, 1, *PATCH)
    if tokenizer.paper_exact:
        kernel, bias = kernel * scale[:, None, None, None, None], tokenizer.bias * shift
    else:
        kernel, bias = kernel * (1 + scale)[:, None, None, None, None], tokenizer.bias + shift
    out = F.conv3d(volume_XYZ[None, None], kernel, bias, stride=PATCH)
    return out[0].flatten(1).T


@pytest.mark.parametrize("paper_exact", [False, True])
def test_equals_a_convolution_per_contrast(paper_exact: bool) -> None:
    tokenizer = build(paper_exact=paper_exact)
    stir(tokenizer)
    generator = torch.Generator().manual_seed(2)
    volumes = [torch.randn(8, 8, 12, generator=generator) for _ in CONTRASTS]
    ids = torch.tensor([contrast_id(name) for name in CONTRASTS])
    patches = torch.cat([patchify(v, PATCH) for v in volumes])
    rows = torch.arange(len(CONTRASTS)).repeat_interleave(len(patches) // len(CONTRASTS))
    found = tokenizer(patches, rows, ids, torch.zeros(len(CONTRASTS), DESCRIPTOR_SIZE))
    expected = torch.cat(
        [conv_equivalent(tokenizer, v, int(i)) for v, i in zip(volumes, ids, strict=True)]
    )
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=0)
    # The contrasts do differ, so a single shared convolution would not pass.
    shared = torch.cat([conv_equivalent(tokenizer, v, int(ids[0])) for v in volumes])
    assert not torch.allclose(found, shared, atol=1e-1)


def test_starts_as_the_plain_projection_for_every_contrast() -> None:
    tokenizer = build()
    x = torch.randn(5, NUM_VOXELS)
    plain = tokenizer.projection(x)
    for number in (0, 1, 5, 63):
        found = tokenizer(
            x,
            torch.zeros(5, dtype=torch.int64),
            torch.tensor([number]),
            torch.zeros(1, DESCRIPTOR_SIZE),
        )
        torch.testing.assert_close(found, plain, atol=0, rtol=0)


def test_paper_form_starts_with_small_tokens() -> None:
    """The trap that the default avoids; if this fails the docstring's warning is out of date."""
    torch.manual_seed(0)
    tokenizer = DynamicTokenizer(NUM_VOXELS, 512, contrast_vector_size=64, paper_exact=True)
    x = torch.randn(200, NUM_VOXELS)
    found = tokenizer(
        x, torch.zeros(200, dtype=torch.int64), torch.tensor([1]), torch.zeros(1, DESCRIPTOR_SIZE)
    )
    plain = tokenizer.projection(x)
    assert 0.2 < float((found.std() / plain.std()).detach()) < 0.8


@pytest.mark.parametrize("paper_exact", [False, True])
def test_contrasts_and_the_unknown_one_have_rows_of_their_own(paper_exact: bool) -> None:
    tokenizer = build(paper_exact=paper_exact)
    stir(tokenizer)
    ids = torch.tensor([contrast_id("unknown"), contrast_id("T1w")])
    x = torch.randn(1, NUM_VOXELS).repeat(2, 1)
    out = tokenizer(x, torch.tensor([0, 1]), ids, torch.zeros(2, DESCRIPTOR_SIZE))
    assert not torch.allclose(out[0], out[1], atol=1e-2)
    torch.autograd.backward(out[0].sum())
    grad = tokenizer.contrast_vector.weight.grad
    assert grad is not None
    assert sorted(grad.abs().sum(1).nonzero().flatten().tolist()) == [0]


def test_all_parameters_learn_from_the_first_steps() -> None:
    tokenizer = build(use_descriptor=True)
    optimizer = torch.optim.SGD(tokenizer.parameters(), lr=0.1)
    x = torch.randn(6, NUM_VOXELS)
    rows = torch.tensor([0, 0, 0, 1, 1, 1])
    descriptor = torch.stack(
        [
            torch.from_numpy(ContrastDescriptor(family="t1", te_s=0.01).vector()),
            torch.from_numpy(ContrastDescriptor(family="t2", te_s=0.1).vector()),
        ]
    )
    goal = torch.randn(6, WIDTH)
    for _ in range(2):
        optimizer.zero_grad()
        out = tokenizer(x, rows, torch.tensor([1, 3]), descriptor)
        torch.autograd.backward((out - goal).square().mean())
        optimizer.step()
    for name, parameter in tokenizer.named_parameters():
        assert parameter.grad is not None and float(parameter.grad.abs().max()) > 0, name


def test_descriptor_counts_only_when_known() -> None:
    tokenizer = build(use_descriptor=True)
    stir(tokenizer)
    x = torch.randn(1, NUM_VOXELS).repeat(3, 1)
    unknown = torch.from_numpy(ContrastDescriptor().vector())
    known = torch.from_numpy(ContrastDescriptor(te_s=0.09).vector())
    out = tokenizer(
        x, torch.tensor([0, 1, 2]), torch.tensor([3, 3, 3]), torch.stack([unknown, known, unknown])
    )
    torch.testing.assert_close(out[0], out[2], atol=0, rtol=0)
    assert not torch.allclose(out[0], out[1], atol=1e-3)
    without = build()
    without.load_state_dict({k: v for k, v in tokenizer.state_dict().items() if "descr" not in k})
    plain = without(x[:1], torch.tensor([0]), torch.tensor([3]), unknown[None])
    torch.testing.assert_close(out[:1], plain)
