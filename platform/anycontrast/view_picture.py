"""The drawing of a study in three planes: slices in mm, patch grid, mask, label.

In: voxels, what becomes of each patch, the voxel where the planes cross. Out: PNG bytes. Axes are
placed in inches, every plane to the same scale, the subject's right on the left.
"""

import io
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:
    from anycontrast_datasets.study import StudyRecord, VolumeRecord

PAGE, INK, SOFT = "#11151b", "#eef1f5", "#9aa6b5"
HIDDEN_COLOR, EMPTY_COLOR, LABEL_COLOR = "#3f7fc4", "#c9a13b", "#ff5d5d"
EMPTY, HIDDEN = 0, 2

_EMPTY_STYLE: dict[str, Any] = {
    "facecolor": "none",
    "edgecolor": EMPTY_COLOR,
    "linestyle": (0, (2, 2)),
}

LONGEST_IN = 3.0
"""Inches of the longest side of the box."""
_TIMES, _DOT = " \u00d7 ", "  \u00b7  "
GAP_IN, MARGIN_IN, TITLE_IN, HEAD_IN, FOOT_IN = 0.16, 0.3, 0.46, 0.72, 0.5


@dataclass(frozen=True)
class Plane:
    """One of the three planes: which axes run to the right and up, and from which end."""

    name: str
    across: int
    """Axis of the columns, drawn from its far end on the left."""
    up: int
    """Axis of the rows, drawn from its near end at the bottom."""
    through: int
    letters: tuple[str, str, str, str]
    """Left, right, top, bottom."""


PLANES = (
    Plane("sagittal", 1, 2, 0, ("A", "P", "S", "I")),
    Plane("coronal", 0, 2, 1, ("R", "L", "S", "I")),
    Plane("axial", 0, 1, 2, ("R", "L", "A", "P")),
)


@dataclass(frozen=True)
class Panel:
    """One contrast of the picture."""

    volume: "VolumeRecord"
    codes_XYZ: npt.NDArray[np.int16]
    cells: npt.NDArray[np.uint8]
    """[GX, GY, GZ], 0 no token, 1 visible, 2 hidden."""


def draw(
    record: "StudyRecord",
    panels: Sequence[Panel],
    crossing: tuple[int, int, int],
    patch_vox: tuple[int, int, int],
    *,
    label_XYZ: npt.NDArray[np.uint8] | None,
    show_mask: bool,
    show_patches: bool,
    title: str,
    notes: Sequence[str],
) -> bytes:
    """Return a PNG with a row per contrast and a column per plane.

    Args:
        record: Of the study; spacing and names.
        panels: Contrasts from top to bottom.
        crossing: Voxel where the planes cross.
        patch_vox: Voxels of a patch.
        label_XYZ: Drawn as a contour.
        show_mask: Shade hidden patches.
        show_patches: Draw the patch grid and outline patches without a token.
        title: Of the picture.
        notes: What else the line below it says: where the study is from, what mask is shown.
    """
    from matplotlib.figure import Figure

    size_mm = np.array(record.shape) * np.array(record.spacing_mm)
    scale = LONGEST_IN / size_mm.max()
    widths = [size_mm[plane.across] * scale for plane in PLANES]
    height = max(size_mm[plane.up] for plane in PLANES) * scale
    total_w = 2 * MARGIN_IN + sum(widths) + 2 * GAP_IN
    total_h = HEAD_IN + len(panels) * (height + TITLE_IN) + FOOT_IN
    figure = Figure(figsize=(total_w, total_h), dpi=110, facecolor=PAGE)
    _head(figure, record, title, notes, total_w, total_h)
    top = total_h - HEAD_IN
    for panel in panels:
        _row_title(figure, panel, total_w, total_h, top, show_mask=show_mask)
        left = MARGIN_IN
        for plane, width in zip(PLANES, widths, strict=True):
            own = size_mm[plane.up] * scale
            bottom = top - TITLE_IN - own
            place = (left / total_w, bottom / total_h, width / total_w, own / total_h)
            axis = figure.add_axes(place)
            _slice(axis, record, panel, plane, crossing)
            if show_patches or show_mask:
                _patches(axis, record, panel, plane, crossing, patch_vox, show_mask, show_patches)
            if label_XYZ is not None:
                _contour(axis, record, label_XYZ, plane, crossing)
            _letters(axis, plane)
            left += width + GAP_IN
        top -= height + TITLE_IN
    _key(figure, total_w, total_h, show_mask, show_patches, label_XYZ is not None)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", facecolor=PAGE, metadata={"Software": None})
    return buffer.getvalue()


def _head(
    figure: Any,
    record: "StudyRecord",
    title: str,
    notes: Sequence[str],
    width: float,
    height: float,
) -> None:
    shape = _TIMES.join(map(str, record.shape))
    spacing = _TIMES.join(f"{s:.3g}" for s in record.spacing_mm)
    x = MARGIN_IN / width
    figure.text(x, 1 - 0.3 / height, title, color=INK, fontsize=13, weight="bold")
    text = _DOT.join([f"{shape} voxels", f"{spacing} mm", *notes])
    figure.text(x, 1 - 0.54 / height, text, color=SOFT, fontsize=8.5)


def _row_title(
    figure: Any, panel: Panel, width: float, height: float, top: float, *, show_mask: bool
) -> None:
    volume = panel.volume
    empty, visible, hidden = (int((panel.cells == kind).sum()) for kind in (0, 1, 2))
    seen = (
        f"{visible} visible, {hidden} hidden" if show_mask else f"{visible + hidden} with a token"
    )
    facts = [
        "file " + _TIMES.join(f"{s:.3g}" for s in volume.source_spacing_mm) + " mm",
        f"patches: {seen}, {empty} empty",
        *volume.flags,
    ]
    x, y = MARGIN_IN / width, (top - TITLE_IN + 0.12) / height
    figure.text(x, y, volume.contrast, color=INK, fontsize=11, weight="bold")
    figure.text((MARGIN_IN + 0.85) / width, y, _DOT.join(facts), color=SOFT, fontsize=8.5)


def _extent(size: Sequence[float], plane: Plane) -> tuple[float, float, float, float]:
    """Left, right, bottom, top in mm from the near corner; the far end of `across` is left."""
    return (size[plane.across], 0.0, 0.0, size[plane.up])


def _section(array: npt.NDArray[Any], plane: Plane, index: int) -> npt.NDArray[Any]:
    """Cut [X, Y, Z] at an index: rows from bottom to top, columns along the axis as stored."""
    section: npt.NDArray[Any] = np.take(array, index, axis=plane.through)
    return section.T


def _slice(
    axis: Any, record: "StudyRecord", panel: Panel, plane: Plane, crossing: tuple[int, int, int]
) -> None:
    volume = panel.volume
    codes = _section(panel.codes_XYZ, plane, crossing[plane.through])
    span = max(volume.p99_5 - volume.p0_5, 1e-12)
    grey = np.clip((codes * volume.scale + volume.offset - volume.p0_5) / span, 0, 1)
    size = np.array(record.shape) * np.array(record.spacing_mm)
    # imshow draws the first column at `left`, so columns are turned to start at the far end.
    axis.imshow(
        np.where(codes == 0, 0, grey)[:, ::-1],
        cmap="gray",
        vmin=0,
        vmax=1,
        origin="lower",
        extent=_extent(size, plane),
        aspect="auto",
        interpolation="nearest",
    )
    axis.set_xticks([])
    axis.set_yticks([])
    axis.set_xlim(size[plane.across], 0)
    axis.set_ylim(0, size[plane.up])
    for spine in axis.spines.values():
        spine.set_color("#39424f")


def _patches(
    axis: Any,
    record: "StudyRecord",
    panel: Panel,
    plane: Plane,
    crossing: tuple[int, int, int],
    patch_vox: tuple[int, int, int],
    show_mask: bool,
    show_patches: bool,
) -> None:
    from matplotlib.collections import PatchCollection
    from matplotlib.patches import Rectangle

    step_mm = np.array(patch_vox) * np.array(record.spacing_mm)
    cells = _section(panel.cells, plane, crossing[plane.through] // patch_vox[plane.through])
    wide, high = step_mm[plane.across], step_mm[plane.up]
    boxes: dict[int, list[Rectangle]] = {0: [], 1: [], 2: []}
    for row, column in np.ndindex(cells.shape):
        inset = 0.08 * min(wide, high) if cells[row, column] == EMPTY else 0.0
        corner = (column * wide + inset, row * high + inset)
        box = Rectangle(corner, wide - 2 * inset, high - 2 * inset)
        boxes[int(cells[row, column])].append(box)
    if show_mask:
        axis.add_collection(
            PatchCollection(boxes[HIDDEN], facecolor=HIDDEN_COLOR, alpha=0.62, linewidth=0)
        )
    if show_patches:
        seen = boxes[1] + boxes[HIDDEN]
        axis.add_collection(
            PatchCollection(seen, facecolor="none", edgecolor=INK, alpha=0.28, linewidth=0.6)
        )
        axis.add_collection(
            PatchCollection(boxes[EMPTY], **_EMPTY_STYLE, alpha=0.75, linewidth=0.7)
        )


def _contour(
    axis: Any,
    record: "StudyRecord",
    label_XYZ: npt.NDArray[np.uint8],
    plane: Plane,
    crossing: tuple[int, int, int],
) -> None:
    section = _section(label_XYZ, plane, crossing[plane.through]) > 0
    if not section.any():
        return
    spacing = record.spacing_mm
    # A rim of zeros closes contours at the edge of the box.
    padded = np.pad(section.astype(float), 1)
    columns = (np.arange(padded.shape[1]) - 0.5) * spacing[plane.across]
    rows = (np.arange(padded.shape[0]) - 0.5) * spacing[plane.up]
    axis.contour(columns, rows, padded, levels=[0.5], colors=[LABEL_COLOR], linewidths=1.3)


def _letters(axis: Any, plane: Plane) -> None:
    import matplotlib.patheffects as effects

    rim = [effects.withStroke(linewidth=2, foreground="#000000")]
    places = ((0.02, 0.5, "left"), (0.98, 0.5, "right"), (0.5, 0.97, "center"))
    for letter, (x, y, side) in zip(plane.letters, (*places, (0.5, 0.03, "center")), strict=True):
        vertical = "center" if y == 0.5 else "top" if y > 0.5 else "bottom"
        axis.text(
            x,
            y,
            letter,
            transform=axis.transAxes,
            ha=side,
            va=vertical,
            color=INK,
            fontsize=8,
            path_effects=rim,
        )


def _key(figure: Any, width: float, height: float, mask: bool, patches: bool, label: bool) -> None:
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    handles: list[Any] = []
    if mask:
        handles.append(Patch(facecolor=HIDDEN_COLOR, alpha=0.62, label="hidden from the encoder"))
    if patches:
        handles.append(Patch(label="empty, no token", **_EMPTY_STYLE))
    if label:
        handles.append(Line2D([], [], color=LABEL_COLOR, linewidth=1.3, label="label"))
    if handles:
        figure.legend(
            handles=handles,
            loc="lower left",
            bbox_to_anchor=((MARGIN_IN - 0.05) / width, 0.08 / height),
            ncols=len(handles),
            frameon=False,
            labelcolor=SOFT,
            fontsize=8.5,
            borderaxespad=0,
        )
