import math

import pytest
import torch

from anycontrast.models.positions import sincos_position


def classical_index_code(index: tuple[int, int, int], width: int) -> list[float]:
    num = width // 6
    code: list[float] = []
    for i in index:
        angles = [i / 10000 ** (f / num) for f in range(num)]
        code += [math.sin(a) for a in angles] + [math.cos(a) for a in angles]
    return code


def test_equals_the_index_code_where_patches_have_the_given_width() -> None:
    index = [(0, 0, 0), (1, 2, 3), (7, 0, 5), (15, 11, 9)]
    position = torch.tensor(index) * 16.0
    code = sincos_position(position, 96, patch_mm=16.0)
    expected = torch.tensor([classical_index_code(i, 96) for i in index])
    torch.testing.assert_close(code, expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("width", [6, 64, 128, 384, 1024, 1280])
def test_any_width_is_filled_with_zeros_at_the_end(width: int) -> None:
    code = sincos_position(torch.randn(3, 3), width, patch_mm=16.0)
    assert code.shape == (3, width)
    assert code.dtype == torch.float32
    used = width // 6 * 6
    assert torch.equal(code[:, used:], torch.zeros(3, width - used))
    # sin^2 + cos^2 of every frequency and axis.
    torch.testing.assert_close(code.square().sum(1), torch.full((3,), used / 2))


def test_one_place_has_one_code_whatever_the_patch_grid() -> None:
    fine = (torch.arange(8.0) * 4.0)[:, None].expand(8, 3)
    coarse = (torch.arange(4.0) * 8.0)[:, None].expand(4, 3)
    torch.testing.assert_close(
        sincos_position(fine, 128, patch_mm=16.0)[::2],
        sincos_position(coarse, 128, patch_mm=16.0),
    )


def test_places_a_brain_apart_have_different_codes() -> None:
    axis = torch.arange(-96.0, 97.0, 16.0)
    code = sincos_position(torch.cartesian_prod(axis, axis, axis), 128, patch_mm=16.0)
    distance = torch.cdist(code, code) + 10 * torch.eye(len(code))
    assert float(distance.min()) > 0.1


def test_bad_arguments_are_named() -> None:
    with pytest.raises(ValueError, match="width must be >= 6"):
        sincos_position(torch.zeros(2, 3), 5, patch_mm=16.0)
    with pytest.raises(ValueError, match="patch_mm must be > 0"):
        sincos_position(torch.zeros(2, 3), 12, patch_mm=0.0)
    with pytest.raises(ValueError, match=r"must be \[T, 3\]"):
        sincos_position(torch.zeros(2, 2), 12, patch_mm=16.0)
