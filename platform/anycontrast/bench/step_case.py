"""Measure one training step of one model, in a process of its own: `step.py` starts it.

Comes in: a `StepCase` as JSON, the only argument. Goes out: one line of JSON on standard output.
Beside the step run large matrix products of the same precision, round by round, so that a busy
machine slows both alike. Needs torch and numpy only.

Letters: T tokens, N visible, M targets.
"""

import json
import math
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch

from anycontrast.bench.timing import alternate
from anycontrast.models.amae import AMAE, AMAEConfig
from anycontrast.models.compiled import compile_blocks
from anycontrast.models.masking import MaskedPack, MaskingConfig, mask_batch
from anycontrast.training.optim import OptimConfig, build_adamw
from anycontrast_datasets.batch import PackedBatch
from anycontrast_datasets.contrast import DESCRIPTOR_SIZE, contrast_id

CONTRASTS = ("T1w", "T1wCE", "T2w", "FLAIR", "DWI", "ADC", "SWI")
PRODUCT_SIDE = {"cpu": 2048, "cuda": 8192}
PRODUCTS = {"cpu": 6, "cuda": 20}
"""Products per round: about as long as a step."""


@dataclass(frozen=True, kw_only=True)
class StepCase:
    """What is measured."""

    model: dict[str, Any]
    """Of `AMAEConfig`."""
    num_studies: int
    num_contrasts: int
    side_vox: int
    hidden_fraction: float
    target_fraction: float
    device: str
    precision: str
    """`fp32` or `bf16`, which is autocast as in training."""
    compile: bool
    threads: int
    rounds: int


def noise_pack(
    num_studies: int, num_contrasts: int, side_vox: int, patch_vox: tuple[int, int, int]
) -> PackedBatch:
    """Make a pack of studies of noise, every volume a cube with all of its patches."""
    grid = tuple(side_vox // p for p in patch_vox)
    contrasts = CONTRASTS[:num_contrasts]
    num_volumes, length = num_studies * num_contrasts, math.prod(grid)
    place_L3 = torch.cartesian_prod(*(torch.arange(n) for n in grid))
    grid_T3 = place_L3.repeat(num_volumes, 1)
    per_study = num_contrasts * length
    voxels = side_vox**3
    return PackedBatch(
        codes_B=torch.randint(
            1, 4096, (num_volumes * voxels,), dtype=torch.int16,
            generator=torch.Generator().manual_seed(0),
        ),
        volume_start_V=torch.arange(num_volumes) * voxels,
        volume_shape_V3=torch.full((num_volumes, 3), side_vox),
        flip_V3=torch.zeros(num_volumes, 3, dtype=torch.bool),
        volume_T=torch.arange(num_volumes).repeat_interleave(length),
        position_mm_T3=(grid_T3 + 0.5) * torch.tensor(patch_vox) - side_vox / 2,
        grid_T3=grid_T3,
        intensity_V4=torch.tensor([[1e-3, -2.0, -3.0, 3.0]]).repeat(num_volumes, 1),
        contrast_V=torch.tensor([contrast_id(name) for name in contrasts]).repeat(num_studies),
        descriptor_VK=torch.zeros(num_volumes, DESCRIPTOR_SIZE),
        study_V=torch.arange(num_studies).repeat_interleave(num_contrasts),
        cu_seqlens=torch.arange(num_studies + 1, dtype=torch.int32) * per_study,
        lengths=(per_study,) * num_studies,
        volume_lengths=(length,) * num_volumes,
        study_ids=tuple(f"noise-{n}" for n in range(num_studies)),
        epochs=(0,) * num_studies,
        contrasts=(contrasts,) * num_studies,
        patch_grids=((grid[0], grid[1], grid[2]),) * num_studies,
        patch_vox=patch_vox,
        spacing_mm=((1.0, 1.0, 1.0),) * num_studies,
    )  # fmt: skip


def step_flops(model: AMAEConfig, pack: MaskedPack) -> float:
    """Floating-point operations of a forward and backward pass, by formula.

    Matrix products of projections and of attention; the backward pass counts twice the forward
    pass, except that voxels get no gradient. Attention's scores, which a flash kernel computes
    again, count once.
    """
    encoder, decoder = model.encoder_config(), model.decoder_config()
    tokens, visible, targets = pack.batch.lengths, pack.visible_lengths, pack.target_lengths
    num_visible, num_targets = sum(visible), sum(targets)
    blocks = (8 + 4 * encoder.mlp_ratio) * encoder.width**2 * num_visible
    blocks += 4 * encoder.width * sum(n * n for n in visible)
    forward = encoder.depth * blocks
    if model.decoder == "joint":
        blocks = (8 + 4 * decoder.mlp_ratio) * decoder.width**2 * sum(tokens)
        blocks += 4 * decoder.width * sum(n * n for n in tokens)
    else:
        blocks = (4 + 4 * decoder.mlp_ratio) * decoder.width**2 * num_targets
        blocks += 4 * decoder.width**2 * num_visible
        blocks += 4 * decoder.width * sum(n * m for n, m in zip(visible, targets, strict=True))
    forward += decoder.depth * blocks
    forward += 2 * encoder.width * decoder.width * num_visible
    forward += 2 * decoder.width * decoder.num_voxels * num_targets
    return 3 * forward + 2 * 2 * decoder.num_voxels * encoder.width * num_visible


def measure(case: StepCase) -> dict[str, Any]:
    """Run the case in this process; times in s, memory in GB (1e9 bytes), rates per s."""
    device = torch.device(case.device)
    torch.set_num_threads(case.threads)
    torch.manual_seed(0)
    config = AMAEConfig(**case.model)
    model = AMAE(config).to(device)
    if case.compile:
        compile_blocks(model)
    batch = noise_pack(case.num_studies, case.num_contrasts, case.side_vox, config.patch_vox)
    masking = MaskingConfig(
        hidden_fraction=case.hidden_fraction, target_fraction=case.target_fraction
    )
    pack = mask_batch(batch, masking, 0).to(device)
    step = partial(_step, model, pack, case.precision)
    for _ in range(2):
        step()
    peak_gb = _peak_bytes(device) / 1e9
    products = _products(device, torch.bfloat16 if case.precision == "bf16" else torch.float32)
    ways: dict[str, Callable[[int], object]] = {
        "step": lambda number: step(),
        "products": lambda number: products(),
    }
    timings = alternate(ways, 1, case.rounds)
    adamw = build_adamw(model, OptimConfig())
    step()
    adamw_timing = alternate({"adamw": lambda number: _update(adamw, device)}, 1, case.rounds)
    flops, per_round = step_flops(config, pack), 2.0 * PRODUCT_SIDE[device.type] ** 3
    per_round *= PRODUCTS[device.type]
    rounds = list(zip(timings["step"].cpu_s, timings["products"].cpu_s, strict=True))
    if device.type == "cuda":
        rounds = list(zip(timings["step"].wall_s, timings["products"].wall_s, strict=True))
    return {
        "parameters_m": sum(p.numel() for p in model.parameters()) / 1e6,
        "gflop": flops / 1e9,
        "tokens": batch.num_tokens,
        "visible": sum(pack.visible_lengths),
        "targets": pack.num_targets,
        "cpu_s": timings["step"].cpu_ms / 1e3,
        "best_cpu_s": timings["step"].best_cpu_ms / 1e3,
        "wall_s": timings["step"].wall_ms / 1e3,
        "peak_gb": peak_gb,
        "adamw_cpu_s": adamw_timing["adamw"].cpu_ms / 1e3,
        "adamw_wall_s": adamw_timing["adamw"].wall_ms / 1e3,
        "products_gflop_per_s": per_round / median(spent for _, spent in rounds) / 1e9,
        # Round by round: of the same moment on the machine.
        "over_products": median(a / flops / (b / per_round) for a, b in rounds),
        "best_over_products": min(a for a, _ in rounds)
        / flops
        / (min(b for _, b in rounds) / per_round),
    }


def _step(model: AMAE, pack: MaskedPack, precision: str) -> None:
    device = pack.hidden_T.device
    model.zero_grad(set_to_none=True)
    with torch.autocast(device.type, dtype=torch.bfloat16, enabled=precision == "bf16"):
        loss = model(pack, loss_only=True).loss_M.mean()
    torch.autograd.backward(loss)
    _wait(device)


def _update(optimizer: torch.optim.Optimizer, device: torch.device) -> None:
    optimizer.step()
    _wait(device)


def _products(device: torch.device, dtype: torch.dtype) -> Callable[[], None]:
    """Large square matrix products as torch computes them."""
    side = PRODUCT_SIDE[device.type]
    a, b = (torch.randn(side, side, device=device, dtype=dtype) for _ in range(2))
    out = torch.empty_like(a)

    def run() -> None:
        for _ in range(PRODUCTS[device.type]):
            torch.mm(a, b, out=out)
        _wait(device)

    return run


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _peak_bytes(device: torch.device) -> int:
    """Most memory held so far: of the GPU, or of this process as the kernel counts it.

    Not `getrusage`: its peak is taken over from the process that started this one.
    """
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    lines = Path("/proc/self/status").read_text().splitlines()
    (peak,) = (line.split()[1] for line in lines if line.startswith("VmHWM:"))
    return int(peak) * 1024


def main(words: list[str]) -> int:
    """Measure the case given as JSON."""
    values = json.loads(words[0])
    values["model"]["patch_vox"] = tuple(values["model"]["patch_vox"])
    case = StepCase(**values)
    sys.stdout.write(json.dumps({**asdict(case), **measure(case)}) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
