import itertools
from typing import Any

import numpy as np
import pytest
import torch

from anycontrast_kernels import gather_cpu, reference
from anycontrast_kernels.patchify import (
    gather_patches,
    gather_zscores,
    intensity_map,
    patchify,
    unpatchify,
)

PATCH = (2, 3, 5)
GRID = (3, 2, 4)
SHAPE = (6, 6, 20)


def volume() -> torch.Tensor:
    return torch.arange(6 * 6 * 20, dtype=torch.int16).reshape(SHAPE)


def test_patches_and_their_voxels_are_in_c_order() -> None:
    patches = patchify(volume(), PATCH)
    assert patches.shape == (24, 30)
    array = volume().numpy()
    for number, (i, j, k) in enumerate(np.ndindex(GRID)):
        block = array[2 * i : 2 * i + 2, 3 * j : 3 * j + 3, 5 * k : 5 * k + 5]
        np.testing.assert_array_equal(patches[number].numpy(), block.ravel())


def test_unpatchify_undoes_patchify_on_a_non_cubic_patch() -> None:
    assert torch.equal(unpatchify(patchify(volume(), PATCH), GRID, PATCH), volume())


def test_a_volume_of_part_patches_is_refused() -> None:
    with pytest.raises(ValueError, match=r"multiple of patch_vox \(4, 3, 5\).*\(6, 6, 20\)"):
        patchify(volume(), (4, 3, 5))
    with pytest.raises(ValueError, match=r"must be \[X, Y, Z\]"):
        patchify(volume()[0], PATCH)
    with pytest.raises(ValueError, match="three sizes >= 1"):
        patchify(volume(), (0, 3, 5))


def test_unpatchify_wants_every_patch() -> None:
    with pytest.raises(ValueError, match=r"must be \(24, 30\).*got \(23, 30\)"):
        unpatchify(patchify(volume(), PATCH)[1:], GRID, PATCH)


def test_intensity_map_is_the_clipped_line_of_each_volume() -> None:
    rng = np.random.default_rng(0)
    codes = rng.integers(-4000, 4000, size=(7, 11)).astype(np.int16)
    row = np.array([0, 2, 1, 1, 0, 2, 2])
    table = np.array(
        [[1e-3, 0.1, -1.0, 2.0], [2e-3, -0.5, -0.7, 0.7], [5e-4, 0.0, -9.0, 9.0]], np.float32
    )
    gain, bias, low, high = (table[row, i : i + 1] for i in range(4))
    expected = np.clip(codes * gain + bias, low, high)
    found = intensity_map(torch.from_numpy(codes), torch.from_numpy(row), torch.from_numpy(table))
    assert found.dtype == torch.float32
    np.testing.assert_allclose(found.numpy(), expected, atol=1e-6)
    assert np.isclose(found.numpy(), low).any() and np.isclose(found.numpy(), high).any()


def test_intensity_map_leaves_float_codes_unchanged_and_differentiates() -> None:
    codes = torch.tensor([[0.0, 100.0], [50.0, 9000.0]], requires_grad=True)
    table = torch.tensor([[0.01, 0.0, -1.0, 2.0]])
    mapped = intensity_map(codes, torch.zeros(2, dtype=torch.int64), table)
    torch.autograd.backward(mapped.sum())
    assert codes.grad is not None
    # The clipped voxel has no gradient.
    torch.testing.assert_close(codes.grad, torch.tensor([[0.01, 0.01], [0.01, 0.0]]))
    assert codes[0, 1] == 100.0


@pytest.mark.parametrize(
    ("change", "error", "match"),
    [
        ({"codes_TP": torch.zeros(3, 4, dtype=torch.int64)}, TypeError, "codes_TP must be int16"),
        ({"volume_T": torch.zeros(3, dtype=torch.int32)}, TypeError, "volume_T must be int64"),
        ({"intensity_V4": torch.zeros(1, 4).double()}, TypeError, "intensity_V4 must be float32"),
        ({"volume_T": torch.zeros(2, dtype=torch.int64)}, ValueError, r"volume_T \[T\]"),
        ({"intensity_V4": torch.zeros(1, 3)}, ValueError, r"must be \[V, 4\]"),
        ({"intensity_V4": torch.zeros(1, 4, device="meta")}, ValueError, "one device"),
    ],
)
def test_bad_arguments_are_named(
    change: dict[str, torch.Tensor], error: type[Exception], match: str
) -> None:
    arguments = {
        "codes_TP": torch.zeros(3, 4, dtype=torch.int16),
        "volume_T": torch.zeros(3, dtype=torch.int64),
        "intensity_V4": torch.zeros(1, 4),
    }
    with pytest.raises(error, match=match):
        intensity_map(**(arguments | change))


FLIPS = list(itertools.product([False, True], repeat=3))


def packed(flip: tuple[bool, ...]) -> dict[str, torch.Tensor]:
    """Three volumes of different boxes; the last two rows are one volume seen in two ways."""
    shapes = torch.tensor([[7, 9, 10], [8, 6, 12], [3, 5, 6], [3, 5, 6]])
    sizes = shapes.prod(dim=1)
    starts = torch.tensor([0, int(sizes[0]), int(sizes[:2].sum()), int(sizes[:2].sum())])
    generator = torch.Generator().manual_seed(1)
    flips = torch.tensor([flip, flip, flip, [not f for f in flip]])
    codes = torch.randint(-3000, 4000, (int(sizes[:3].sum()),), generator=generator)
    return {
        "codes_B": codes.to(torch.int16),
        "volume_start_V": starts,
        "volume_shape_V3": shapes,
        "flip_V3": flips,
    }


def every_patch(shapes: torch.Tensor, patch: tuple[int, int, int]) -> dict[str, torch.Tensor]:
    """All patches of all volumes, in order."""
    grids = [
        torch.cartesian_prod(*(torch.arange(-(-n // p)) for n, p in zip(s, patch, strict=True)))
        for s in shapes.tolist()
    ]
    volumes = [torch.full((len(grid),), v) for v, grid in enumerate(grids)]
    return {"volume_N": torch.cat(volumes), "grid_N3": torch.cat(grids)}


@pytest.mark.parametrize("patch", [(2, 3, 4), (4, 4, 4), (3, 5, 1), (8, 2, 6), (16, 16, 16)])
@pytest.mark.parametrize("flip", FLIPS)
def test_gathered_patches_are_those_of_the_flipped_and_padded_volume(
    patch: tuple[int, int, int], flip: tuple[bool, ...]
) -> None:
    volumes = packed(flip)
    expected = []
    for start, shape, flips in zip(
        volumes["volume_start_V"], volumes["volume_shape_V3"], volumes["flip_V3"], strict=True
    ):
        box = volumes["codes_B"][start : start + shape.prod()].view(*shape.tolist())
        seen = torch.flip(box, [axis for axis in range(3) if flips[axis]])
        whole = [-(-n // p) * p for n, p in zip(shape.tolist(), patch, strict=True)]
        padded = torch.zeros(whole, dtype=torch.int16)
        padded[: shape[0], : shape[1], : shape[2]] = seen
        expected.append(reference.patchify(padded, patch))
    places = every_patch(volumes["volume_shape_V3"], patch)
    found = reference.gather_patches(**volumes, **places, patch_vox=patch)
    assert torch.equal(found, torch.cat(expected))
    assert torch.equal(gather_patches(**volumes, **places, patch_vox=patch), found)


@pytest.mark.parametrize("patch", [(2, 3, 4), (4, 2, 6), (16, 16, 16)])
@pytest.mark.parametrize("flip", FLIPS)
def test_any_patches_in_any_order_are_as_defined(
    patch: tuple[int, int, int], flip: tuple[bool, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gather_cpu, "PIECE_VOX", 5 * 24)
    volumes: dict[str, Any] = packed(flip)
    generator = torch.Generator().manual_seed(2)
    volume_N = torch.randint(0, 4, (60,), generator=generator)
    volume_N[:30] = volume_N[:30].sort().values
    # Some lie beyond their grid, at either end.
    grid_N3 = torch.randint(-1, 5, (60, 3), generator=generator)
    table = torch.rand(4, 4, generator=generator) * torch.tensor([1e-2, 1.0, 1.0, 1.0])
    table[:, 2] *= -1
    picked: dict[str, Any] = {"volume_N": volume_N, "grid_N3": grid_N3, "patch_vox": patch}
    codes = gather_patches(**volumes, **picked)
    assert torch.equal(codes, reference.gather_patches(**volumes, **picked))
    volumes["intensity_V4"] = table
    found = gather_zscores(**volumes, **picked)
    torch.testing.assert_close(found, reference.gather_zscores(**volumes, **picked))
    torch.testing.assert_close(found, intensity_map(codes, volume_N, table))
    low = gather_zscores(**volumes, **picked, dtype=torch.bfloat16)
    assert torch.equal(low, found.to(torch.bfloat16))


def test_no_patches_are_no_rows_and_float_codes_take_a_gradient() -> None:
    volumes: dict[str, Any] = packed((True, False, False))
    none: dict[str, Any] = {
        "volume_N": torch.zeros(0, dtype=torch.int64),
        "grid_N3": torch.zeros(0, 3).long(),
    }
    assert gather_patches(**volumes, **none, patch_vox=PATCH).shape == (0, 30)
    volumes["codes_B"] = volumes["codes_B"].float().requires_grad_()
    one: dict[str, Any] = {"volume_N": torch.tensor([1]), "grid_N3": torch.tensor([[0, 0, 0]])}
    table = torch.tensor([[2.0, 0.0, -1e9, 1e9]]).repeat(4, 1)
    x = gather_zscores(**volumes, intensity_V4=table, **one, patch_vox=PATCH)
    (grad,) = torch.autograd.grad(x.sum(), volumes["codes_B"])
    box = grad[630 : 630 + 8 * 6 * 12].view(8, 6, 12)
    assert bool((box[-2:, :3, :5] == 2.0).all())
    assert float(grad.sum()) == 60.0


@pytest.mark.parametrize(
    ("change", "error", "match"),
    [
        ({"codes_B": torch.zeros(9, dtype=torch.int64)}, TypeError, "codes_B must be int16"),
        ({"codes_B": torch.zeros(9, 9, dtype=torch.int16)}, ValueError, r"codes_B must be \[B\]"),
        ({"flip_V3": torch.zeros(4, 3)}, TypeError, "flip_V3 must be torch.bool"),
        ({"volume_shape_V3": torch.ones(3, 3).long()}, ValueError, r"must be \(4, 3\)"),
        ({"grid_N3": torch.zeros(2, 3).long()}, ValueError, r"grid_N3 must be \(1, 3\)"),
        ({"volume_N": torch.zeros(1, dtype=torch.int32)}, TypeError, "volume_N must be"),
        ({"volume_N": torch.tensor([4])}, ValueError, r"0 \.\. 3"),
        ({"volume_start_V": torch.tensor([0, 0, 0, 1250])}, ValueError, "within the 1296 voxels"),
        ({"intensity_V4": torch.zeros(3, 4)}, ValueError, r"\[V, 4\]"),
        ({"intensity_V4": torch.zeros(4, 4).double()}, TypeError, "float32"),
        ({"intensity_V4": torch.zeros(4, 4, device="meta")}, ValueError, "must lie on cpu"),
        ({"grid_N3": torch.zeros(1, 3, device="meta").long()}, ValueError, "must lie on cpu"),
        ({"patch_vox": (2, 0, 2)}, ValueError, "three sizes"),
    ],
)
def test_what_cannot_be_gathered_is_named(
    change: dict[str, Any], error: type[Exception], match: str
) -> None:
    arguments: dict[str, Any] = {
        **packed((False, False, False)),
        "intensity_V4": torch.zeros(4, 4),
        "volume_N": torch.tensor([0]),
        "grid_N3": torch.tensor([[0, 0, 0]]),
        "patch_vox": PATCH,
    }
    with pytest.raises(error, match=match):
        gather_zscores(**(arguments | change))
