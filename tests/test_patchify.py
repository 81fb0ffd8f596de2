import numpy as np
import pytest
import torch

from anycontrast_kernels.patchify import intensity_map, patchify, unpatchify

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
