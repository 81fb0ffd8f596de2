"""Dice per contrast subset as CSV, Markdown and a plot, pretrained beside from-scratch.

One `StudyScore` per model, study, subset and region goes in; means with bootstrap intervals over
studies come out. The difference of two models is taken study by study before it is averaged.
"""

import csv
import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from anycontrast.evaluation.metrics import Interval, bootstrap_mean
from anycontrast.evaluation.subsets import Subset, subset_name

BASELINE = "scratch"
"""The variant every other one is compared with."""


@dataclass(frozen=True)
class StudyScore:
    """Dice of one region of one study, predicted by one model from one contrast subset."""

    variant: str
    """`pretrained` or `scratch`."""
    study_id: str
    subset: Subset
    region: str
    dice: float


@dataclass(frozen=True)
class SubsetRow:
    """One line of the table."""

    variant: str
    subset: Subset
    region: str
    score: Interval
    gain: Interval | None
    """Paired difference to `scratch` over the same studies; None where there is nothing to pair."""


def summarise(scores: Sequence[StudyScore], *, num_bootstrap: int, seed: int) -> list[SubsetRow]:
    """Average over studies: one row per subset, region and variant, in order of appearance."""
    groups: dict[tuple[Subset, str, str], dict[str, float]] = {}
    for score in scores:
        key = (score.subset, score.region, score.variant)
        groups.setdefault(key, {})[score.study_id] = score.dice
    subsets = list(dict.fromkeys(s.subset for s in scores))
    regions = list(dict.fromkeys(s.region for s in scores))
    variants = list(dict.fromkeys(s.variant for s in scores))
    rows = []
    for subset in sorted(subsets, key=len):
        for region in regions:
            baseline = groups.get((subset, region, BASELINE))
            for variant in variants:
                mine = groups.get((subset, region, variant))
                if mine is None:
                    continue
                score_mean = bootstrap_mean(
                    list(mine.values()), num_bootstrap=num_bootstrap, seed=seed
                )
                gain = None
                if variant != BASELINE and baseline is not None:
                    differences = [mine[s] - baseline[s] for s in mine if s in baseline]
                    gain = bootstrap_mean(differences, num_bootstrap=num_bootstrap, seed=seed)
                rows.append(SubsetRow(variant, subset, region, score_mean, gain))
    return rows


CSV_HEADER = (
    "variant",
    "subset",
    "num_contrasts",
    "region",
    "num_studies",
    "dice_mean",
    "dice_low",
    "dice_high",
    "gain_mean",
    "gain_low",
    "gain_high",
)


def write_csv(rows: Sequence[SubsetRow], path: Path) -> None:
    """Write one line per subset, region and variant; empty cells where there is no number."""
    table: list[list[str]] = [list(CSV_HEADER)]
    for row in rows:
        gain = row.gain or Interval(float("nan"), float("nan"), float("nan"), 0)
        numbers = (*row.score[:3], *gain[:3])
        table.append(
            [
                row.variant,
                subset_name(row.subset),
                str(len(row.subset)),
                row.region,
                str(row.score.num_studies),
                *("" if np.isnan(n) else f"{n:.6f}" for n in numbers),
            ]
        )
    _write_rows(table, path)


def write_study_csv(scores: Sequence[StudyScore], path: Path) -> None:
    """Write every single score, for paired tests elsewhere."""
    table = [["variant", "study_id", "subset", "region", "dice"]]
    table += [
        [s.variant, s.study_id, subset_name(s.subset), s.region, f"{s.dice:.6f}"] for s in scores
    ]
    _write_rows(table, path)


def _write_rows(table: Sequence[Sequence[str]], path: Path) -> None:
    buffer = io.StringIO()
    csv.writer(buffer, lineterminator="\n").writerows(table)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(buffer.getvalue(), encoding="utf-8")


def markdown_table(rows: Sequence[SubsetRow], *, note: str) -> str:
    """Return the table as Markdown: a line per subset and region, a column per variant.

    Args:
        rows: from `summarise`.
        note: the conventions behind the numbers, printed under the table.
    """
    variants = list(dict.fromkeys(row.variant for row in rows))
    has_gain = any(row.gain is not None for row in rows)
    header = ["contrasts", "region", "studies", *variants, *(["gain"] if has_gain else [])]
    lines = ["| " + " | ".join(header) + " |", "|" + "---|" * len(header)]
    for subset, region in dict.fromkeys((row.subset, row.region) for row in rows):
        found = {r.variant: r for r in rows if r.subset == subset and r.region == region}
        num_studies = max(r.score.num_studies for r in found.values())
        cells = [subset_name(subset), region, str(num_studies)]
        cells += [_cell(found[v].score) if v in found else "" for v in variants]
        if has_gain:
            gains = [r.gain for r in found.values() if r.gain is not None]
            cells.append(_cell(gains[0], signed=True) if gains else "")
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join([*lines, "", note, ""])


def _cell(interval: Interval, *, signed: bool = False) -> str:
    sign = "+" if signed else ""
    if np.isnan(interval.mean):
        return "n/a"
    if np.isnan(interval.low):
        return f"{interval.mean:{sign}.3f}"
    return f"{interval.mean:{sign}.3f} ({interval.low:{sign}.3f} to {interval.high:{sign}.3f})"


def write_markdown(rows: Sequence[SubsetRow], path: Path, *, title: str, note: str) -> None:
    """Write the Markdown table under a heading."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"# {title}\n\n{markdown_table(rows, note=note)}", encoding="utf-8")


def write_plot(rows: Sequence[SubsetRow], path: Path, *, title: str) -> None:
    """Draw one panel per region: subsets from top to bottom, a dot and interval per variant."""
    from matplotlib.figure import Figure

    regions = list(dict.fromkeys(row.region for row in rows))
    subsets = list(dict.fromkeys(row.subset for row in rows))
    height = 1.4 + 0.32 * len(subsets)
    figure = Figure(figsize=(2.5 + 3.5 * len(regions), height), dpi=100, layout="constrained")
    axes = figure.subplots(1, len(regions), squeeze=False, sharey=True)[0]
    for axis, region in zip(axes, regions, strict=True):
        _draw_region(axis, [row for row in rows if row.region == region], subsets)
        axis.set_title(region, fontsize=10)
    axes[0].set_yticks(range(len(subsets)), [subset_name(s) for s in subsets], fontsize=8)
    axes[0].invert_yaxis()
    axes[0].legend(fontsize=8, loc="best")
    figure.suptitle(title, fontsize=11)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)


def _draw_region(axis: Any, rows: Sequence[SubsetRow], subsets: Sequence[Subset]) -> None:
    variants = list(dict.fromkeys(row.variant for row in rows))
    for order, variant in enumerate(variants):
        mine = [r for r in rows if r.variant == variant and not np.isnan(r.score.mean)]
        shift = 0.16 * (order - (len(variants) - 1) / 2)
        y = [subsets.index(r.subset) + shift for r in mine]
        bounds = [
            [max(0.0, r.score.mean - r.score.low) for r in mine],
            [max(0.0, r.score.high - r.score.mean) for r in mine],
        ]
        axis.errorbar(
            [r.score.mean for r in mine],
            y,
            xerr=np.nan_to_num(np.asarray(bounds)),
            fmt="o",
            markersize=4,
            capsize=2,
            linewidth=1,
            label=variant,
        )
    axis.set_xlim(-0.02, 1.02)
    axis.set_xlabel("Dice (mean, 95 % interval)", fontsize=8)
    axis.grid(axis="x", alpha=0.3)
