"""Resampling: right millimetres, exact copies where nothing moves, no aliasing."""

import numpy as np
import numpy.typing as npt
import pytest

from anycontrast_datasets.resample import Grid, is_same_grid, resample

Triple = tuple[int, int, int]


def grid(
    shape: Triple,
    spacing: tuple[float, float, float] = (1.0, 1.0, 1.0),
    origin: tuple[float, float, float] = (0.0, 0.0, 0.0),
    angles: tuple[float, float, float] = (0.0, 0.0, 0.0),
) -> Grid:
    """Return a grid turned by `angles` (radians about x, y, z)."""
    rotation = np.eye(3)
    for axis, angle in enumerate(angles):
        turn = np.eye(3)
        a, b = [i for i in range(3) if i != axis]
        turn[a, a] = turn[b, b] = np.cos(angle)
        turn[a, b], turn[b, a] = -np.sin(angle), np.sin(angle)
        rotation = turn @ rotation
    affine = np.eye(4)
    affine[:3, :3] = rotation * np.asarray(spacing)
    affine[:3, 3] = origin
    return Grid(shape=shape, affine=affine)


def voxel_mm(g: Grid) -> npt.NDArray[np.float64]:
    ijk = np.stack(np.meshgrid(*[np.arange(n) for n in g.shape], indexing="ij"), axis=-1)
    return ijk @ g.affine[:3, :3].T + g.affine[:3, 3]


def ramp(g: Grid) -> npt.NDArray[np.float32]:
    """A field linear in mm: trilinear interpolation must reproduce it exactly."""
    return np.asarray(voxel_mm(g) @ np.array([1.0, -2.0, 0.5]) + 30, dtype=np.float32)


def blob(
    g: Grid, centre_mm: tuple[float, float, float], width_mm: float = 4.0
) -> npt.NDArray[np.float32]:
    distance = np.linalg.norm(voxel_mm(g) - np.asarray(centre_mm), axis=-1)
    return np.asarray(np.exp(-0.5 * (distance / width_mm) ** 2), dtype=np.float32)


def centroid_mm(array: npt.NDArray[np.float32], g: Grid) -> npt.NDArray[np.float64]:
    return np.asarray((voxel_mm(g) * array[..., None]).reshape(-1, 3).sum(0) / array.sum())


SOURCES = {
    "offset": grid((30, 32, 34), origin=(-3.3, -4.2, -5.1)),
    "anisotropic": grid((40, 30, 12), spacing=(0.8, 1.1, 3.0), origin=(-4, -4, -4)),
    "oblique": grid((40, 42, 44), origin=(-9, -4, -6), angles=(0.1, -0.2, 0.15)),
    "oblique_anisotropic": grid((40, 42, 15), (1, 1, 3), (-9, -4, -6), (0.1, -0.2, 0.15)),
    "flipped": Grid(shape=(30, 30, 30), affine=np.diag([-1.0, 1.0, 1.0, 1.0]) + 0),
}
SOURCES["flipped"].affine[0, 3] = 28.0


def test_same_grid_is_copied_to_the_bit_and_not_aliased() -> None:
    g = grid((5, 6, 7), angles=(0.3, 0, 0))
    array = np.random.default_rng(0).normal(size=g.shape).astype(np.float32)
    out = resample(array, g, g)
    np.testing.assert_array_equal(out, array)
    out[0, 0, 0] += 1
    assert out[0, 0, 0] != array[0, 0, 0]


def test_box_of_whole_voxels_is_a_slice_to_the_bit() -> None:
    g = grid((9, 10, 11), spacing=(1.1, 0.9, 2), angles=(0.3, 0.1, 0))
    array = np.random.default_rng(0).normal(size=g.shape).astype(np.float32)
    out = resample(array, g, g.box((2, 3, 1), (4, 7, 10)))
    np.testing.assert_array_equal(out, array[2:6, 3:10, 1:11])
    assert out.flags.c_contiguous and not np.shares_memory(out, array)


@pytest.mark.parametrize("name", SOURCES)
def test_linear_field_is_reproduced_inside_the_field_of_view(name: str) -> None:
    source, target = SOURCES[name], grid((9, 9, 9), origin=(8, 9, 7), spacing=(1, 1, 1))
    out = resample(ramp(source), source, target)
    np.testing.assert_allclose(out, ramp(target), atol=2e-3)


@pytest.mark.parametrize("name", SOURCES)
def test_blob_stays_at_its_millimetre(name: str) -> None:
    source, target = SOURCES[name], grid((26, 26, 26))
    centre = (13.3, 12.1, 12.7)
    out = resample(blob(source, centre, 2.5), source, target)
    assert np.abs(centroid_mm(out, target) - centre).max() < 0.1


def test_aligned_and_oblique_paths_agree() -> None:
    source = SOURCES["anisotropic"]
    array = np.random.default_rng(1).normal(size=source.shape).astype(np.float32)
    aligned = grid((12, 12, 12), (1.7, 1.6, 1.0), (3, 3, 3))
    turned = grid((12, 12, 12), (1.7, 1.6, 1.0), (3, 3, 3), (0, 0, 0.0011))
    difference = resample(array, source, aligned) - resample(array, source, turned)
    assert np.abs(difference).max() < 0.05 and np.abs(difference).max() > 0


def test_downsampling_averages_what_it_cannot_show() -> None:
    source = grid((64, 64, 64))
    stripes = np.broadcast_to(np.arange(64) % 2, source.shape).astype(np.float32)
    out = resample(stripes, source, source.with_spacing((4, 4, 4)))
    assert out.shape == (16, 16, 16)
    np.testing.assert_allclose(out, 0.5, atol=0.05)


def test_oblique_downsampling_averages_too() -> None:
    source = grid((64, 64, 64))
    stripes = np.broadcast_to(np.arange(64) % 2, source.shape).astype(np.float32)
    target = grid((8, 8, 8), (4, 4, 4), (20, 20, 20), (0.2, 0.1, 0))
    np.testing.assert_allclose(resample(stripes, source, target), 0.5, atol=0.05)


@pytest.mark.parametrize("angle", [0.0, 0.2])
def test_nearest_keeps_values_and_is_zero_outside(angle: float) -> None:
    source = grid((10, 10, 10), origin=(5, 5, 5))
    array = np.full(source.shape, 7, dtype=np.float32)
    target = grid((40, 40, 40), spacing=(0.5, 0.5, 0.5), angles=(0, 0, angle))
    out = resample(array, source, target, nearest=True)
    assert set(np.unique(out)) == {0, 7}
    index = voxel_mm(target) - 5
    inside = ((index > -0.49) & (index < 9.49)).all(-1)
    outside = ((index < -0.51) | (index > 9.51)).any(-1)
    assert (out[inside] == 7).all() and (out[outside] == 0).all()


def test_linear_holds_the_border_outside() -> None:
    source = grid((4, 4, 4))
    array = np.full(source.shape, 3, dtype=np.float32)
    target = grid((8, 8, 8), origin=(-2, -2, -2), angles=(0, 0.1, 0))
    np.testing.assert_allclose(resample(array, source, target), 3, rtol=1e-5)


def test_single_slice_can_be_resampled() -> None:
    source = grid((8, 8, 1), spacing=(1, 1, 5))
    array = np.random.default_rng(0).normal(size=source.shape).astype(np.float32)
    target = grid((8, 8, 5), origin=(0, 0, -2))
    np.testing.assert_allclose(resample(array, source, target), np.repeat(array, 5, 2), atol=1e-6)


def test_with_spacing_keeps_centre_and_field_of_view() -> None:
    g = grid((10, 21, 7), (0.7, 1.0, 3.0), (4, 5, 6), (0.1, 0.2, 0.3))
    new = g.with_spacing((1, 1, 1))
    assert new.shape == (7, 21, 21)
    np.testing.assert_allclose(new.spacing_mm, 1)

    def middle(h: Grid) -> npt.NDArray[np.float64]:
        return np.asarray(h.affine @ [*((np.asarray(h.shape) - 1) / 2), 1])

    np.testing.assert_allclose(middle(new), middle(g), atol=1e-9)


def test_spacing_within_a_thousandth_is_left_alone() -> None:
    g = grid((10, 10, 10), (1.0004, 0.9997, 1))
    assert is_same_grid(g, g.with_spacing((1, 1, 1)))


def test_shape_of_the_array_is_checked() -> None:
    with pytest.raises(ValueError, match="its grid"):
        resample(np.zeros((2, 2, 2), np.float32), grid((3, 3, 3)), grid((3, 3, 3)))


def test_read_only_array_is_accepted() -> None:
    g = grid((6, 6, 6))
    array = ramp(g)
    array.flags.writeable = False
    resample(array, g, grid((4, 4, 4), origin=(0.5, 0.5, 0.5)))
