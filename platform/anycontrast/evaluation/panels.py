"""Pictures for people: reconstruction panels and loss curves, as PNG files.

matplotlib is used through `Figure` objects with the Agg canvas: no display, no global state.
"""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from anycontrast.models.patches import patch_codes, patch_zscores
from anycontrast_datasets.batch import PackedBatch
from anycontrast_kernels.patchify import unpatchify

if TYPE_CHECKING:
    from anycontrast.models.masking import MaskedPack

# T tokens of a pack, M decoded hidden tokens, P voxels per patch.

HIDDEN_COLOR = "#3b5b7a"
"""Of hidden patches: no grey, so that it is no voxel's value."""

Planes = npt.NDArray[np.float32]


def reconstruction_panel(
    path: Path, pack: "MaskedPack", reconstruction_MP: Tensor, *, study: int = 0
) -> None:
    """Write one study's reconstruction as a PNG: a row per contrast, three pictures each.

    The pictures are the input, the input with its hidden patches blanked, and the reconstruction:
    visible patches as in the input, hidden ones as predicted (blank if not decoded). The plane is
    the axial plane with the most foreground, drawn at its real aspect ratio.

    Args:
        path: the file to write; its folder is made.
        pack: the masked batch, on any device.
        reconstruction_MP: [M, P] predictions for `pack.target_index_M`, z-score units.
        study: which study of the batch.

    Raises:
        ValueError: `study` is not in the batch, or the predictions do not fit the targets.
    """
    from matplotlib import colormaps
    from matplotlib.figure import Figure

    batch = pack.batch
    if not 0 <= study < batch.num_studies:
        raise ValueError(
            "drawing a reconstruction panel: study must be in "
            f"0..{batch.num_studies - 1}, got {study}"
        )
    if reconstruction_MP.shape[0] != pack.target_index_M.shape[0]:
        raise ValueError(
            "drawing a reconstruction panel: one prediction per target token is needed, got "
            f"{reconstruction_MP.shape[0]} for {pack.target_index_M.shape[0]} targets"
        )
    rows = _panel_planes(pack, reconstruction_MP, study)
    figure = Figure(figsize=(7.5, 2.5 * len(rows) + 0.4), dpi=100, layout="compressed")
    axes = figure.subplots(len(rows), 3, squeeze=False)
    spacing_mm = batch.spacing_mm[study]
    grey = colormaps["gray"].with_extremes(bad=HIDDEN_COLOR)
    for row, (contrast, planes) in enumerate(zip(batch.contrasts[study], rows, strict=True)):
        low, high = _display_range(planes[0])
        titles = (contrast, "masked input", "reconstruction")
        for axis, plane, title in zip(axes[row], planes, titles, strict=True):
            axis.imshow(
                plane.T,
                origin="lower",
                cmap=grey,
                vmin=low,
                vmax=high,
                aspect=spacing_mm[1] / spacing_mm[0],
                interpolation="nearest",
            )
            axis.set_title(title, fontsize=9)
            axis.set_axis_off()
    figure.suptitle(batch.study_ids[study], fontsize=10)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)


def _panel_planes(
    pack: "MaskedPack", reconstruction_MP: Tensor, study: int
) -> list[tuple[Planes, Planes, Planes]]:
    """Input, masked input and reconstruction of every volume, cut to one axial plane."""
    batch = pack.batch.to("cpu")
    hidden_T = pack.hidden_T.cpu()
    x_TP = patch_zscores(batch)
    masked_TP = x_TP.masked_fill(hidden_T[:, None], float("nan"))
    predicted_TP = masked_TP.clone()
    predicted_TP[pack.target_index_M.cpu()] = reconstruction_MP.detach().float().cpu()
    occupied_TP = (patch_codes(batch) != 0).float()
    offsets = batch.volume_offsets
    volumes = [v for v, owner in enumerate(batch.study_V.tolist()) if owner == study]
    # A patch without a token is all code 0; this is what code 0 is mapped to.
    empty_V = batch.intensity_V4[:, 1].clamp(batch.intensity_V4[:, 2], batch.intensity_V4[:, 3])
    grids = [
        [
            _dense(x, batch, offsets[v], offsets[v + 1], study, float(empty_V[v]) if fill else 0.0)
            for v in volumes
        ]
        for x, fill in ((x_TP, 1), (masked_TP, 1), (predicted_TP, 1), (occupied_TP, 0))
    ]
    plane = int(np.argmax(sum(o.sum(axis=(0, 1)) for o in grids[3])))
    return [
        (a[:, :, plane], b[:, :, plane], c[:, :, plane])
        for a, b, c in zip(grids[0], grids[1], grids[2], strict=True)
    ]


def _dense(
    tokens_TP: Tensor, batch: PackedBatch, start: int, stop: int, study: int, fill: float
) -> Planes:
    """Lay one volume's tokens out on the study's grid; patches without a token get `fill`."""
    grid = batch.patch_grids[study]
    index_T3 = batch.grid_T3[start:stop]
    flat_T = (index_T3[:, 0] * grid[1] + index_T3[:, 1]) * grid[2] + index_T3[:, 2]
    full_LP = torch.full((grid[0] * grid[1] * grid[2], tokens_TP.shape[1]), fill)
    full_LP[flat_T] = tokens_TP[start:stop]
    dense: Planes = unpatchify(full_LP, grid, batch.patch_vox).numpy()
    return dense


def _display_range(plane: Planes) -> tuple[float, float]:
    """Grey range of a row: the input's 1st to 99th percentile."""
    seen = plane[np.isfinite(plane)]
    if seen.size == 0:
        return 0.0, 1.0
    low, high = np.percentile(seen, (1, 99))
    return float(low), float(max(high, low + 1e-6))


def loss_curve(metrics_jsonl: Path, out_png: Path, *, key: str = "loss") -> None:
    """Draw one number of `metrics.jsonl` against the step.

    Args:
        metrics_jsonl: one JSON object per line; lines without `step` and `key` are left out.
        out_png: the file to write; its folder is made.
        key: which number.

    Raises:
        ValueError: no line holds the number.
    """
    from matplotlib.figure import Figure

    steps, values = _read_curve(metrics_jsonl, key)
    if not steps:
        raise ValueError(f"drawing a curve: no line of {metrics_jsonl.name} holds step and {key!r}")
    figure = Figure(figsize=(6.0, 3.5), dpi=100, layout="constrained")
    axis = figure.subplots()
    axis.plot(steps, values, marker="." if len(steps) < 60 else None, linewidth=1.2)
    axis.set_xlabel("step")
    axis.set_ylabel(key)
    axis.grid(alpha=0.3)
    out_png.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(out_png)


def _read_curve(metrics_jsonl: Path, key: str) -> tuple[list[int], list[float]]:
    steps: list[int] = []
    values: list[float] = []
    for line in metrics_jsonl.read_text(encoding="utf-8").splitlines():
        entry: dict[str, Any] = json.loads(line)
        if isinstance(entry.get("step"), int) and isinstance(entry.get(key), int | float):
            steps.append(entry["step"])
            values.append(float(entry[key]))
    return steps, values
