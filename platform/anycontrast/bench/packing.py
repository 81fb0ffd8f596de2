"""Packed against padded batches of studies with differing contrasts: `anycontrast bench packing`.

Forward and backward of the AMAE preset `small` on one batch: packed, padded to the longest study,
and padded in buckets of studies of similar length. Useful tokens per CPU second; padded tokens are
not useful. All parts of a padded batch are alike, so one of them is timed and counted for all.
"""

import json
import logging
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from anycontrast.bench.packing_batch import (
    BATCHES_DRAWN,
    DISTRIBUTIONS,
    PATCH_VOX,
    draw_plan,
    masked_pack,
    noise_study,
)
from anycontrast.bench.padded_model import padded_loss
from anycontrast.bench.timing import Timing, at_least, markdown_table
from anycontrast.models.amae import AMAE, AMAEConfig
from anycontrast.models.masking import MaskedPack, MaskingConfig
from anycontrast_kernels.bench.environment import environment
from anycontrast_kernels.bench.plot import bar_plot

logger = logging.getLogger(__name__)

BAR_ONE_SIZE = 1.8
BAR_MIXED = 3.0


Part = tuple[int, MaskedPack, tuple[int, int, int] | None]
"""How often it counts, the studies, and the lengths to which they are padded."""


@dataclass(frozen=True, kw_only=True)
class PackingBenchConfig:
    """What is measured."""

    folder: str = "runs/bench/packing"
    """Where the tables are saved: packing.json, packing.md and packing.svg."""
    distributions: tuple[str, ...] = ("uniform",)
    """Of the number of contrasts: uniform, skewed, clinical, halves. Each takes its minutes."""
    sizes: tuple[str, ...] = ("one", "mixed")
    """`one`: all volumes alike. `mixed`: 0.6 to 2.4 times the volume."""
    num_studies: int = 16
    """Studies of a batch."""
    studies_at_once: int = 2
    """Studies whose activations are in memory together, a part of the batch."""
    num_buckets: int = 2
    """Batches of similar length, by sorting the studies."""
    grid: int = 8
    """Patches along each side of a volume of size 1."""
    hidden_fraction: float = 0.75
    preset: str = "small"
    threads: int = 1
    """Of torch; a second one spends part of its CPU time waiting, the more the smaller the work."""
    rounds: int = 1
    """Measurements of every way; the median is taken."""
    seed: int = 0

    def __post_init__(self) -> None:
        wrong = [name for name in self.distributions if name not in DISTRIBUTIONS]
        if wrong or not self.distributions:
            raise ValueError(
                f"distributions: must be of {', '.join(DISTRIBUTIONS)}, got {self.distributions}"
            )
        if not self.sizes or set(self.sizes) - {"one", "mixed"}:
            raise ValueError(f"sizes: must be of one, mixed, got {self.sizes}")
        if self.num_studies % self.num_buckets or self.num_buckets < 1:
            raise ValueError(
                f"num_buckets: must divide num_studies, got {self.num_buckets} and "
                f"{self.num_studies}"
            )
        if min(self.studies_at_once, self.rounds, self.threads) < 1 or self.grid < 2:
            raise ValueError("studies_at_once, rounds, threads: must be at least 1, and grid 2")


def run(config: PackingBenchConfig) -> dict[str, Any]:
    """Measure, save and return the table as numbers and as Markdown."""
    torch.manual_seed(0)
    model = AMAE(AMAEConfig(preset=config.preset, patch_vox=PATCH_VOX))  # type: ignore[arg-type]
    threads_before = torch.get_num_threads()
    torch.set_num_threads(config.threads)
    try:
        rows = [
            _measure(model, config, distribution, sizes)
            for distribution in config.distributions
            for sizes in config.sizes
        ]
        place = environment(torch.device("cpu"), torch.float32)
    finally:
        torch.set_num_threads(threads_before)
    bars = {
        f"packed_over_padded_{row['contrasts']}_{row['sizes']}": at_least(
            row["packed_over_padded"], BAR_MIXED if row["sizes"] == "mixed" else BAR_ONE_SIZE
        )
        for row in rows
    }
    result = {"environment": place, "rows": rows, "bars": bars}
    table = _table(rows)
    folder = Path(config.folder)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "packing.json").write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    title = (
        f"# Packing against padding on {place['device']}\n\nMade by `anycontrast bench packing`."
    )
    title = f"{title}\n\n{_setting(config, place)}"
    (folder / "packing.md").write_text(f"{title}\n\n{table}\n", encoding="utf-8")
    (folder / "packing.svg").write_text(_plot(rows, place) + "\n", encoding="utf-8")
    return {**result, "markdown": {"packing": table}}


def _measure(
    model: AMAE, config: PackingBenchConfig, distribution: str, sizes: str
) -> dict[str, Any]:
    plan = draw_plan(
        config.num_studies, distribution, config.grid, mixed=sizes == "mixed", seed=config.seed
    )
    logger.info("packing: %s contrasts, %s size, %d tokens", distribution, sizes, sum(plan.tokens))
    order = sorted(range(config.num_studies), key=lambda number: plan.tokens[number])
    studies = [noise_study(number, plan.counts[number], plan.grids[number]) for number in order]
    masking = MaskingConfig(hidden_fraction=config.hidden_fraction)
    packs = [
        masked_pack(studies[start : start + config.studies_at_once], masking)
        for start in range(0, len(studies), config.studies_at_once)
    ]
    per_bucket = config.num_studies // config.num_buckets // config.studies_at_once or 1
    buckets = [packs[start : start + per_bucket] for start in range(0, len(packs), per_bucket)]
    ways: dict[str, list[Part]] = {
        "packed": [(1, pack, None) for pack in packs],
        "padded": [_one_part(packs)],
        "bucketed": [_one_part(group) for group in buckets],
    }
    _step(model, packs[0], None)
    times = _timed(model, ways, config.rounds)
    num_tokens = sum(plan.tokens)
    row: dict[str, Any] = {
        "contrasts": distribution,
        "sizes": sizes,
        "tokens": num_tokens,
        "padded_tokens": config.num_studies * max(plan.tokens),
    }
    for name, timing in times.items():
        row[f"{name}_tokens_per_cpu_s"] = 1e3 * num_tokens / timing.cpu_ms
        row[f"{name}_tokens_per_s"] = 1e3 * num_tokens / timing.wall_ms
    for rival in ("padded", "bucketed"):
        row[f"packed_over_{rival}"] = times[rival].cpu_ms / times["packed"].cpu_ms
    return row


def _timed(model: AMAE, ways: Mapping[str, Sequence[Part]], rounds: int) -> dict[str, Timing]:
    """Time every way in alternating rounds."""
    found = {name: Timing() for name in ways}
    for _ in range(rounds):
        for name, parts in ways.items():
            cpu_s = wall_s = 0.0
            for times, pack, longest in parts:
                wall, cpu = time.perf_counter(), time.process_time()
                _step(model, pack, longest)
                cpu_s += times * (time.process_time() - cpu)
                wall_s += times * (time.perf_counter() - wall)
            found[name].cpu_s.append(cpu_s)
            found[name].wall_s.append(wall_s)
    return found


def _one_part(packs: Sequence[MaskedPack]) -> Part:
    """One of several packs that are padded to the longest of all, so that all take the same."""
    longest = (
        max(max(pack.batch.lengths) for pack in packs),
        max(max(pack.visible_lengths) for pack in packs),
        max(max(pack.target_lengths) for pack in packs),
    )
    return len(packs), packs[len(packs) // 2], longest


def _step(model: AMAE, pack: MaskedPack, longest: tuple[int, int, int] | None) -> None:
    """Forward and backward of a pack, padded if lengths to pad to are given."""
    model.zero_grad()
    loss_M = model(pack).loss_M if longest is None else padded_loss(model, pack, longest)
    loss_M.sum().backward()


def _setting(config: PackingBenchConfig, place: dict[str, Any]) -> str:
    versions = ", ".join(f"{name} {version}" for name, version in place["versions"].items())
    return (
        f"{place['date']}, threads: {place['threads']}, {versions}. AMAE `{config.preset}`, joint "
        f"decoder, float32, forward and backward of {config.num_studies} studies, "
        f"{config.grid**3} tokens a volume of size 1, {100 * config.hidden_fraction:.0f} % hidden. "
        f"{config.studies_at_once} studies at once; of a padded batch one such part is timed and "
        f"counted for all, which are alike. Bucketed: {config.num_buckets} padded batches of "
        f"studies of similar length. Of {BATCHES_DRAWN} batches drawn, the one of median waste."
    )


def _plot(rows: list[dict[str, Any]], place: dict[str, Any]) -> str:
    groups = {
        f"{row['contrasts']}, {row['sizes']}": {
            way: row[f"{way}_tokens_per_cpu_s"] for way in ("packed", "padded", "bucketed")
        }
        for row in rows
    }
    return bar_plot(f"Useful tokens per CPU second ({place['device']})", groups)


def _table(rows: list[dict[str, Any]]) -> str:
    header = ["contrasts, sizes", "tokens", "padded tokens", "packed", "padded", "bucketed"]
    header += ["packed / padded", "packed / bucketed"]
    ways = ("packed", "padded", "bucketed")
    body = [
        [
            f"{row['contrasts']}, {row['sizes']}",
            str(row["tokens"]),
            str(row["padded_tokens"]),
            *(f"{row[f'{way}_tokens_per_cpu_s']:.0f}" for way in ways),
            f"{row['packed_over_padded']:.2f}",
            f"{row['packed_over_bucketed']:.2f}",
        ]
        for row in rows
    ]
    note = "Useful tokens per CPU second."
    return f"{markdown_table(header, body)}\n\n{note}"
