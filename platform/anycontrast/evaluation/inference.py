"""Whole-volume inference: overlapping windows over the stored box, blended into one map.

Comes in: a prepared study of any size. Goes out: probabilities for the stored box exactly. Windows
lie and blend as in MONAI's `sliding_window_inference` (a box smaller than the window is padded on
both sides; the last window is moved back to end with the box). What differs is the content: a
window is packed like a training crop, code 0 outside the box and patch positions in mm from the
centre of the whole stored box, so the encoder sees the positions it was trained with.
"""

import itertools
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Literal

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from anycontrast.models.segmenter import Segmenter
from anycontrast_datasets.augment import StudyView
from anycontrast_datasets.batch import PackedBatch
from anycontrast_datasets.pack import pack_studies
from anycontrast_datasets.study import StudyArrays, StudyError

Triple = tuple[int, int, int]
Blending = Literal["gaussian", "constant"]


def predict_study(
    model: Segmenter,
    arrays: StudyArrays,
    *,
    window_vox: Triple | None = None,
    contrasts: Sequence[str] | None = None,
    overlap: float = 0.5,
    blending: Blending = "gaussian",
    windows_per_batch: int = 1,
    device: torch.device | str = "cpu",
) -> npt.NDArray[np.float32]:
    """Return the probability of every region in every voxel of the stored box.

    Args:
        model: the segmenter, on `device`; used in eval mode, its mode restored.
        arrays: the study, whole stored box.
        window_vox: window, whole patches along every axis; None takes the model's own.
        contrasts: contrasts shown to the model; None shows all the study has.
        overlap: share of a window that its neighbour covers too, 0 <= overlap < 1.
        blending: weights inside a window where windows overlap.
        windows_per_batch: windows packed together; more is faster on a GPU and takes more memory.
        device: where the model is.

    Returns:
        [R, X, Y, Z] float32 in 0..1, the shape of the stored box.

    Raises:
        StudyError: the study lacks one of `contrasts`.
        ValueError: the window is not whole patches, or `overlap` is out of range.
    """
    was_training = model.training
    model.eval()
    try:
        return sliding_window(
            model,
            with_contrasts(arrays, contrasts),
            patch_vox=model.patch_vox,
            window_vox=window_vox or model.window_vox,
            overlap=overlap,
            blending=blending,
            windows_per_batch=windows_per_batch,
            device=device,
        )
    finally:
        model.train(was_training)


def sliding_window(
    forward: Callable[[PackedBatch], Tensor],
    arrays: StudyArrays,
    *,
    patch_vox: Triple,
    window_vox: Triple,
    overlap: float = 0.5,
    blending: Blending = "gaussian",
    windows_per_batch: int = 1,
    device: torch.device | str = "cpu",
) -> npt.NDArray[np.float32]:
    """Run `forward` on every window and blend; see `predict_study` for what is not said here.

    Args:
        forward: a batch of windows to logits [S, R, X, Y, Z], e.g. a model inside a training
            engine; called without gradients.
        arrays: the study, whole stored box, with the contrasts to show.
        patch_vox: voxels per patch.
        window_vox: window, whole patches along every axis.
        overlap: share of a window that its neighbour covers too.
        blending: weights inside a window.
        windows_per_batch: windows packed together.
        device: where to pack the windows to.

    Raises:
        ValueError: the window is not whole patches, or `overlap` is out of range.
    """
    _check_window(patch_vox, window_vox, overlap)
    padded, before = _padding(arrays.record.shape, window_vox)
    weight_XYZ = _window_weight(window_vox, blending).to(device)
    total_RXYZ: Tensor | None = None
    weights_XYZ = torch.zeros(padded, device=device)
    origins = window_origins(arrays.record.shape, window_vox, overlap)
    for start in range(0, len(origins), windows_per_batch):
        some = origins[start : start + windows_per_batch]
        views = [window_view(arrays, origin, window_vox) for origin in some]
        batch = pack_studies(views, patch_vox, epochs=[0] * len(views), drop_empty=False)
        with torch.no_grad():
            probability_SRXYZ = torch.sigmoid(forward(batch.to(device)))
        if total_RXYZ is None:
            total_RXYZ = torch.zeros((probability_SRXYZ.shape[1], *padded), device=device)
        for origin, probability_RXYZ in zip(some, probability_SRXYZ, strict=True):
            place = _slices([o + b for o, b in zip(origin, before, strict=True)], window_vox)
            total_RXYZ[(slice(None), *place)] += probability_RXYZ * weight_XYZ
            weights_XYZ[place] += weight_XYZ
    assert total_RXYZ is not None, "a box has at least one window"
    blended_RXYZ = total_RXYZ / weights_XYZ
    inside = blended_RXYZ[(slice(None), *_slices(before, arrays.record.shape))]
    result: npt.NDArray[np.float32] = inside.clamp(0.0, 1.0).cpu().numpy()
    return np.ascontiguousarray(result)


def _check_window(patch_vox: Triple, window_vox: Triple, overlap: float) -> None:
    if any(w % p for w, p in zip(window_vox, patch_vox, strict=True)):
        raise ValueError(
            f"predicting a study: window_vox must be whole patches of {patch_vox}, got {window_vox}"
        )
    if not 0 <= overlap < 1:
        raise ValueError(f"predicting a study: overlap must be in 0 <= overlap < 1, got {overlap}")


def with_contrasts(arrays: StudyArrays, contrasts: Sequence[str] | None) -> StudyArrays:
    """Return the study as if it only had these contrasts, in stored order; None keeps all.

    Raises:
        StudyError: one of them is not there, or none is asked for.
    """
    if contrasts is None:
        return arrays
    record = arrays.record
    missing = [name for name in contrasts if name not in arrays.codes]
    if missing or not contrasts:
        raise StudyError(
            f"predicting study {record.study_id}: contrasts {list(contrasts)} were asked for, the "
            f"study has {list(record.contrasts)}; ask for a non-empty subset of those"
        )
    volumes = tuple(v for v in record.volumes if v.contrast in contrasts)
    return replace(
        arrays,
        record=replace(record, volumes=volumes),
        codes={v.contrast: arrays.codes[v.contrast] for v in volumes},
    )


def window_origins(shape: Triple, window_vox: Triple, overlap: float) -> list[Triple]:
    """Return the first voxel of every window in the stored box, negative where it is padded."""
    padded, before = _padding(shape, window_vox)
    starts = []
    for size, window, pad in zip(padded, window_vox, before, strict=True):
        step = max(1, int(window * (1 - overlap)))
        count = -(-(size - window) // step) + 1
        starts.append([min(k * step, size - window) - pad for k in range(count)])
    return [(i, j, k) for i, j, k in itertools.product(*starts)]


def _padding(shape: Triple, window_vox: Triple) -> tuple[Triple, Triple]:
    """Shape after padding up to one window per axis, and the voxels added before the box."""
    x, y, z = (max(n, w) for n, w in zip(shape, window_vox, strict=True))
    before = tuple((p - n) // 2 for p, n in zip((x, y, z), shape, strict=True))
    return (x, y, z), (before[0], before[1], before[2])


def window_view(arrays: StudyArrays, origin: Triple, window_vox: Triple) -> StudyView:
    """Cut one window out of a study, code 0 outside its box; it keeps its place in the box."""
    codes = {name: _cut(codes_XYZ, origin, window_vox) for name, codes_XYZ in arrays.codes.items()}
    return StudyView(StudyArrays(record=arrays.record, codes=codes), origin)


def _cut(
    codes_XYZ: npt.NDArray[np.int16], origin: Triple, window_vox: Triple
) -> npt.NDArray[np.int16]:
    out = np.zeros(window_vox, dtype=codes_XYZ.dtype)
    source, target = [], []
    for start, width, size in zip(origin, window_vox, codes_XYZ.shape, strict=True):
        low, high = max(start, 0), min(start + width, size)
        source.append(slice(low, high))
        target.append(slice(low - start, high - start))
    out[tuple(target)] = codes_XYZ[tuple(source)]
    return out


def _slices(start: Sequence[int], size: Sequence[int]) -> tuple[slice, ...]:
    return tuple(slice(a, a + n) for a, n in zip(start, size, strict=True))


def _window_weight(window_vox: Triple, blending: Blending) -> Tensor:
    """Weight of every voxel of a window, > 0; MONAI's importance map (sigma 1/8 of the window)."""
    from monai.data.utils import compute_importance_map

    weight: Tensor = compute_importance_map(window_vox, mode=blending, sigma_scale=0.125)
    # MONAI floors only when it blends: keep far corners from dividing by zero.
    return weight.float().clamp_min(1e-3)
