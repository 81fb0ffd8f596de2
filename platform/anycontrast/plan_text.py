"""A plan as text: what `anycontrast plan` prints."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any


def render(plan: Mapping[str, Any]) -> str:
    """Return the text of what `run_plan` returned."""
    lines = [
        *_studies(plan),
        *_storage(plan["storage"]),
        *_memory(plan),
        *_training(plan),
        *_ranks(plan),
    ]
    return "\n".join(lines)


def _studies(plan: Mapping[str, Any]) -> Iterable[str]:
    studies, tokens = plan["studies"], plan["tokens"]
    yield f"studies      {studies['manifest']:,} in the manifest, {studies['served']:,} served"
    yield f"tokens       from {tokens['basis']}"
    rows = [["volumes", "studies", "mean", "p50", "p99", "max"]]
    for name, spread in tokens["by_volumes"].items():
        values = (spread[key] for key in ("studies", "mean", "p50", "p99", "max"))
        rows.append([name, *(f"{value:,.0f}" for value in values)])
    yield from _table(rows)


def _storage(storage: Mapping[str, Any]) -> Iterable[str]:
    yield (
        f"shards       {storage['num_shards']:,} of {_bytes(storage['shard_bytes'])}, "
        f"{_bytes(storage['disk_bytes'])} on disk "
        f"({storage['bytes_per_voxel']:.2f} bytes a voxel, {storage['bytes_basis']})"
    )
    yield (f"sharding     {storage['sharding_cpu_h']:,.1f} CPU hours ({storage['sharding_basis']})")


def _memory(plan: Mapping[str, Any]) -> Iterable[str]:
    memory = plan["memory"]
    gpu, host = memory["gpu_bytes"], memory["host_bytes"]
    yield (
        f"GPU memory   {_bytes(gpu['total'])} a rank: weights and optimiser "
        f"{_bytes(gpu['state'])} ({plan['model']['parameters'] / 1e6:,.1f} M parameters), "
        f"activations {_bytes(gpu['activations'])} ({memory['pack_tokens']:,.0f} tokens a pack), "
        f"voxels {_bytes(gpu['voxels'])}"
    )
    yield (
        f"host memory  {_bytes(host['total'])} a rank: studies being decoded "
        f"{_bytes(host['studies'])}, packs made ready {_bytes(host['packs'])}"
    )


def _training(plan: Mapping[str, Any]) -> Iterable[str]:
    training, assumed = plan["training"], plan["assumed"]
    yield (
        f"steps        {training['steps']:,} = {training['epochs']:,.2f} epochs of "
        f"{training['steps_per_epoch']:,.1f} steps of {training['studies_per_step']:,.1f} studies"
    )
    yield (
        f"time         {_hours(training['hours'])} of computing on {assumed['gpus']} GPUs at "
        f"{assumed['tflops_per_gpu']:g} TFLOP/s each, assuming {assumed['mfu']:.0%} of it: "
        f"{training['studies_per_s']:,.1f} studies/s, "
        f"{training['flops_per_study'] / 1e12:,.2f} TFLOP a study"
    )
    if assumed["gpus"] != assumed["gpus_asked"]:
        yield (
            f"             (too few studies for a step on {assumed['gpus_asked']:,} GPUs, so this "
            f"is for {assumed['gpus']:,})"
        )
    yield f"reading      {_bytes(training['bytes_per_s'])}/s of shards, over all ranks"


def _ranks(plan: Mapping[str, Any]) -> Iterable[str]:
    cost = plan["cost"]
    yield (
        f"balance      a study costs its tokens + {cost['ratio']:.3g} tokens^2 ({cost['basis']}); "
        "imbalance: dearest rank over mean rank"
    )
    if not 0.8 <= cost["stream_ratio"] / max(cost["ratio"], 1e-12) <= 1.25:
        yield (
            f"             the stream balances by {cost['stream_ratio']:.3g} tokens^2; set "
            f"pretrain.stream.cost.linear=1 pretrain.stream.cost.quadratic={cost['ratio']:.3g}"
        )
    if not plan["tokens"]["pack_tokens"]:
        yield "             fill: of the largest pack met, since stream.pack_tokens sets no limit"
    rows = [["ranks", "packs/step", "steps", "fill", "but last", "imbalance", "p99", "max"]]
    for row in plan["ranks"]:
        stats = row["stats"]
        rows.append(
            [
                f"{stats['world_size']:,}",
                f"{row['packs_per_step']:,}",
                f"{stats['num_steps']:,}",
                f"{stats['fill']:.1%}",
                f"{stats['fill_whole_steps']:.1%}",
                *(f"{stats[key]:.3f}" for key in ("imbalance", "imbalance_p99", "imbalance_max")),
            ]
        )
    yield from _table(rows)
    if plan["ranks_skipped"]:
        names = ", ".join(map(str, plan["ranks_skipped"]))
        yield f"             too few studies for a step on {names} ranks"


def _table(rows: Sequence[Sequence[str]]) -> Iterable[str]:
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    for row in rows:
        cells = (text.rjust(width) for text, width in zip(row, widths, strict=True))
        yield " " * 13 + "  ".join(cells)


def _bytes(value: float) -> str:
    for unit in ("B", "KiB", "MiB", "GiB"):
        if value < 1024:
            return f"{value:.0f} {unit}" if unit == "B" else f"{value:.1f} {unit}"
        value /= 1024
    return f"{value:,.2f} TiB"


def _hours(hours: float) -> str:
    if hours < 0.1:
        return f"{hours * 3600:,.0f} s"
    return f"{hours:,.1f} h" if hours < 72 else f"{hours:,.0f} h ({hours / 24:,.1f} days)"
