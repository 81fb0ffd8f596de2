"""A training step: packed and naive dense give the same run; memory; compiled code is reused."""

import math
import random
from collections.abc import Callable
from itertools import accumulate, pairwise

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from anycontrast.measure_cost import _noise
from anycontrast.models.amae import AMAE, AMAEConfig, target_voxels
from anycontrast.models.blocks import Block, CrossBlock, Linear, recompute_policy
from anycontrast.models.capacity import padded_rows
from anycontrast.models.compiled import compile_blocks
from anycontrast.models.encoder import EncoderConfig
from anycontrast.models.masking import MaskedPack, MaskingConfig, mask_batch
from anycontrast.models.patches import patch_zscores
from anycontrast.models.positions import sincos_position
from anycontrast.training.optim import OptimConfig, build_adamw
from anycontrast.training.pretrain import PretrainConfig
from anycontrast_datasets.batch import PackedBatch
from anycontrast_datasets.study import StudyArrays
from anycontrast_kernels.sequences import sequences

PATCH = (4, 2, 6)

compiles = pytest.mark.usefixtures("own_linear")
looks_at_gradients = pytest.mark.filterwarnings(
    "ignore:The .grad attribute of a Tensor that is not a leaf"
)
"""torch's compiler asks every input for its gradient."""


def tiny(**changes: object) -> AMAE:
    torch.manual_seed(0)
    settings: dict[str, object] = {"preset": "tiny", "patch_vox": PATCH}
    return AMAE(AMAEConfig(**(settings | changes)))  # type: ignore[arg-type]


def noise(lengths: list[int], seed: int = 0) -> MaskedPack:
    return mask_batch(_noise(lengths, PATCH), MaskingConfig(hidden_fraction=0.75), seed)


def dense_block(block: Block, x_LD: Tensor) -> Tensor:
    """A textbook block on one study: every head's full matrix of scores."""
    heads = block.attention.num_heads
    length, width = x_LD.shape
    normed = F.layer_norm(x_LD, (width,), block.norm1.weight, block.norm1.bias, block.norm1.eps)
    qkv = normed @ block.attention.qkv.weight.T + block.attention.qkv.bias
    q, k, v = qkv.view(length, 3, heads, -1).permute(1, 2, 0, 3)
    scores = q @ k.transpose(-1, -2) / math.sqrt(width // heads)
    out = (scores.softmax(-1) @ v).transpose(0, 1).reshape(length, width)
    x_LD = x_LD + out @ block.attention.out.weight.T + block.attention.out.bias
    normed = F.layer_norm(x_LD, (width,), block.norm2.weight, block.norm2.bias, block.norm2.eps)
    wide, narrow = block.mlp[0], block.mlp[2]
    assert isinstance(wide, Linear)
    assert isinstance(narrow, Linear)
    inner = F.gelu(normed @ wide.weight.T + wide.bias)
    out_LD: Tensor = x_LD + inner @ narrow.weight.T + narrow.bias
    return out_LD


def dense_loss(model: AMAE, pack: MaskedPack) -> Tensor:
    """The same step without packing: every study by itself, the decoder on all of its tokens."""
    batch, errors = pack.batch, []
    for start, stop in pairwise(batch.offsets):
        here = torch.arange(start, stop)
        visible = here[~pack.hidden_T[start:stop]]
        hidden = here[pack.hidden_T[start:stop]]
        voxels = patch_zscores(batch, here)
        place = sincos_position(batch.position_mm_T3[here], 128, patch_mm=16.0)
        tokens = model.encoder.tokenizer(
            voxels, batch.volume_T[here], batch.contrast_V, batch.descriptor_VK
        )
        x = (tokens + place)[visible - start]
        for block in model.encoder.blocks:
            assert isinstance(block, Block)
            x = dense_block(block, x)
        x = model.decoder.project(model.encoder.norm(x))
        y = model.decoder.mask_token.repeat(stop - start, 1)
        y[visible - start] = x
        y = y + model.decoder.contrast_embedding(batch.contrast_V[batch.volume_T[here]])
        y = y + sincos_position(batch.position_mm_T3[here], 64, patch_mm=16.0)
        for block in model.decoder.blocks:
            assert isinstance(block, Block)
            y = dense_block(block, y)
        prediction = model.decoder.head(model.decoder.norm(y[hidden - start]))
        errors.append((prediction - voxels[hidden - start]).square().mean(1))
    return torch.cat(errors).mean()


def test_packed_and_naive_dense_training_follow_one_trajectory(
    noise_pack: Callable[..., PackedBatch], study_a: StudyArrays, study_b: StudyArrays
) -> None:
    packed, dense = tiny(), tiny()
    optimizers = [build_adamw(model, OptimConfig(lr=1e-3)) for model in (packed, dense)]
    losses: list[list[float]] = [[], []]
    for step in range(20):
        batch = noise_pack(*((study_a, study_b) if step % 2 else (study_b, study_a, study_a)))
        pack = mask_batch(batch, MaskingConfig(hidden_fraction=0.75), seed=step)
        for number, model in enumerate((packed, dense)):
            loss = model(pack).loss_M.mean() if number == 0 else dense_loss(model, pack)
            optimizers[number].zero_grad()
            torch.autograd.backward(loss)
            optimizers[number].step()
            losses[number].append(float(loss.detach()))
    one, other = torch.tensor(losses)
    assert float((one - other).abs().max()) <= 1e-4
    assert float(one[-1]) < 0.99 * float(one[0]), "it learned something"


def kept_bytes(block: torch.nn.Module, *inputs: object) -> int:
    """Bytes kept for the backward pass, weights and inputs of the pack left out."""
    left_out = {p.untyped_storage().data_ptr() for p in block.parameters()}
    left_out |= {
        x.untyped_storage().data_ptr()
        for value in inputs
        for x in (value if isinstance(value, tuple) else (value,))
        if isinstance(x, Tensor) and not x.requires_grad
    }
    kept: dict[int, int] = {}

    def pack(x: Tensor) -> Tensor:
        storage = x.untyped_storage()
        if storage.data_ptr() not in left_out:
            kept[storage.data_ptr()] = storage.nbytes()
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        out = block(*inputs)
    assert out.requires_grad
    return sum(kept.values())


@pytest.mark.parametrize(("recompute", "least", "most"), [("none", 31, 33), ("selective", 15, 17)])
def test_bytes_kept_per_token_and_layer(recompute: str, least: float, most: float) -> None:
    width, tokens = 256, 192
    block = Block(width, 4, 4 * width, recompute=recompute).to(torch.bfloat16)
    x = torch.randn(tokens, width, dtype=torch.bfloat16, requires_grad=True)
    found = kept_bytes(block, x, sequences([128, 64])) / (tokens * width)
    assert least <= found <= most, f"{found:.1f} bytes per token and unit of width"


@pytest.mark.parametrize("decoder", ["joint", "cross"])
def test_every_way_of_recomputing_gives_the_same_gradients(decoder: str) -> None:
    grads = []
    for recompute in ("none", "selective", "full"):
        model = tiny(decoder=decoder, recompute=recompute)
        torch.autograd.backward(model(noise([40, 24])).loss_M.sum())
        grads.append([p.grad for p in model.parameters() if p.grad is not None])
    for other in grads[1:]:
        for expected, found in zip(grads[0], other, strict=True):
            torch.testing.assert_close(found, expected)


def test_recompute_takes_the_bools_of_older_configurations() -> None:
    assert AMAEConfig(preset="tiny", recompute=True).recompute == "full"
    assert AMAEConfig(preset="tiny", recompute=False) == AMAEConfig(preset="tiny")
    assert EncoderConfig(width=64, depth=1, num_heads=1, recompute=True).recompute is True
    with pytest.raises(ValueError, match=r"model\.recompute must be one of"):
        AMAEConfig(recompute="half")
    assert recompute_policy("selective", "x") == "selective"


@pytest.mark.parametrize("block", [Block, CrossBlock])
def test_parts_of_a_block_keep_their_order(block: type[torch.nn.Module]) -> None:
    names = [name for name, _ in block(64, 1, 128).named_children()]
    assert names == ["norm1", "attention", "norm2", "mlp"]


def test_rows_are_padded_to_few_sizes() -> None:
    sizes = [padded_rows(n) for n in range(8193)]
    assert all(size >= n and size % 128 == 0 for n, size in enumerate(sizes))
    assert all(size - n < max(128, n / 8) for n, size in enumerate(sizes) if n)
    assert len(set(sizes[1025:2049])) == len(set(sizes[4097:8193])) == 8
    assert sizes[0] == 128


@pytest.fixture
def own_linear(monkeypatch: pytest.MonkeyPatch) -> None:
    """Undo what DeepSpeed's stage 3 leaves behind where an earlier test used it."""
    monkeypatch.setattr(F, "linear", torch._C._nn.linear)


class Counter:
    """A backend of `torch.compile` that only counts."""

    def __init__(self) -> None:
        self.count = 0

    def __call__(self, graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Callable[..., object]:
        self.count += 1
        return graph.forward


def compiled_run(packs: list[MaskedPack], decoder: str) -> int:
    """Train compiled and plain on the packs; how often something was compiled."""
    torch._dynamo.reset()
    plain, compiled, counter = tiny(decoder=decoder), tiny(decoder=decoder), Counter()
    names = list(compiled.state_dict())
    assert compile_blocks(compiled, backend=counter) == 3
    assert list(compiled.state_dict()) == names
    for pack in packs:
        losses = [model(pack).loss_M for model in (plain, compiled)]
        assert losses[0].shape == losses[1].shape == (pack.num_targets,)
        for loss in losses:
            torch.autograd.backward(loss.sum())
        torch.testing.assert_close(losses[1], losses[0], rtol=1e-5, atol=1e-5)
    for one, other in zip(plain.parameters(), compiled.parameters(), strict=True):
        torch.testing.assert_close(one.grad, other.grad, rtol=1e-4, atol=1e-4)
    return counter.count


@compiles
@looks_at_gradients
def test_ragged_packs_of_one_budget_compile_one_encoder_and_one_decoder_block() -> None:
    packs = [noise(lengths) for lengths in ([200, 40], [70, 70, 70], [240], [30] * 8)]
    assert compiled_run(packs, "joint") == 2


@pytest.mark.slow
@compiles
@looks_at_gradients
def test_fifty_ragged_packs_compile_a_few_times() -> None:
    draw = random.Random(0)
    packs = [
        noise([draw.randrange(20, 400) for _ in range(draw.randrange(1, 6))]) for _ in range(50)
    ]
    assert len({tuple(accumulate(pack.batch.lengths)) for pack in packs}) == 50
    assert compiled_run(packs, "joint") <= 8


def test_compiling_is_for_cuda_and_not_for_sharded_weights() -> None:
    cpu, cuda = torch.device("cpu"), torch.device("cuda")
    assert not PretrainConfig().compiles_on(cpu)
    assert PretrainConfig().compiles_on(cuda)
    assert PretrainConfig(compile=True).compiles_on(cpu)
    sharded = PretrainConfig().engine.__class__(zero_stage=3)
    assert not PretrainConfig(engine=sharded).compiles_on(cuda)
    with pytest.raises(ValueError, match=r"pretrain\.compile needs engine\.zero_stage below 3"):
        PretrainConfig(compile=True, engine=sharded)


def test_targets_are_what_the_dense_step_predicts() -> None:
    pack = noise([40, 24])
    torch.testing.assert_close(target_voxels(pack), patch_zscores(pack.batch, pack.target_index_M))
