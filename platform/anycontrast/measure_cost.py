"""Measure what packs cost on this machine, and fit the cost model to it.

In: the model's configuration. Out: a `CostModel` in seconds. Packs of noise, of few and of many
tokens, go forward and backward through the model as in training; the fastest of a few rounds
counts, since everything else on a machine only adds time.
"""

import logging
import math
import time
from collections.abc import Sequence
from itertools import accumulate

import torch

from anycontrast.models.amae import AMAE, AMAEConfig
from anycontrast.models.masking import MaskedPack, MaskingConfig, mask_batch
from anycontrast_datasets.batch import PackedBatch
from anycontrast_datasets.contrast import DESCRIPTOR_SIZE, contrast_id
from anycontrast_datasets.cost import CostModel, fit_cost

logger = logging.getLogger(__name__)

PACKS: tuple[tuple[int, ...], ...] = (
    (256,),
    (1024,),
    (2048,),
    (4096,),
    (256,) * 4,
    (512,) * 8,
    (1024, 2048, 512),
)
"""Tokens of the studies of each measured pack."""
ROUNDS = 3


def measure_cost(
    model: AMAEConfig,
    masking: MaskingConfig,
    *,
    packs: Sequence[Sequence[int]] = PACKS,
    device: torch.device | None = None,
) -> CostModel:
    """Time packs of noise and fit the cost of a study to them.

    Args:
        model: Architecture.
        masking: What is hidden.
        packs: Tokens of each study of each pack.
        device: Where to measure; None for the GPU if there is one.

    Returns:
        Cost in seconds of one step on one study.

    Raises:
        ValueError: the times cannot be explained by tokens, as on a machine busy with other work.
    """
    if device is None:
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.manual_seed(0)
    amae = AMAE(model).to(device)
    batches = [mask_batch(_noise(pack, model.patch_vox), masking, 0).to(device) for pack in packs]
    seconds = [math.inf] * len(packs)
    for number in range(ROUNDS + 1):
        for place, batch in enumerate(batches):
            spent = _step_s(amae, batch, device)
            if number > 0:  # the first round warms up
                seconds[place] = min(seconds[place], spent)
    for pack, spent in zip(packs, seconds, strict=True):
        logger.info("a pack of %d studies and %d tokens: %.4f s", len(pack), sum(pack), spent)
    return fit_cost(packs, seconds)


def _step_s(model: AMAE, pack: MaskedPack, device: torch.device) -> float:
    is_gpu = device.type == "cuda"
    if is_gpu:
        torch.cuda.synchronize(device)
    start = time.perf_counter()
    with torch.autocast(device.type, dtype=torch.bfloat16, enabled=is_gpu):
        loss = model(pack).loss_M.sum()
    loss.backward()
    model.zero_grad(set_to_none=True)
    if is_gpu:
        torch.cuda.synchronize(device)
    return time.perf_counter() - start


def _noise(lengths: Sequence[int], patch_vox: tuple[int, int, int]) -> PackedBatch:
    """Make a pack of studies of one volume each, in a row of patches."""
    num_tokens, num_studies = sum(lengths), len(lengths)
    generator = torch.Generator().manual_seed(0)
    num_voxels = num_tokens * math.prod(patch_vox)
    starts = [first * math.prod(patch_vox) for first in (0, *accumulate(lengths))]
    study_T = torch.repeat_interleave(torch.arange(num_studies), torch.tensor(lengths))
    grid = torch.zeros(num_tokens, 3, dtype=torch.int64)
    grid[:, 0] = torch.cat([torch.arange(n) for n in lengths])
    return PackedBatch(
        codes_B=torch.randint(1, 4096, (num_voxels,), dtype=torch.int16, generator=generator),
        volume_start_V=torch.tensor(starts[:-1]),
        volume_shape_V3=torch.tensor([(n * patch_vox[0], *patch_vox[1:]) for n in lengths]),
        flip_V3=torch.zeros(num_studies, 3, dtype=torch.bool),
        volume_T=study_T,
        position_mm_T3=grid.float() * patch_vox[0],
        grid_T3=grid,
        intensity_V4=torch.tensor([[1e-3, -2.0, -3.0, 3.0]]).repeat(num_studies, 1),
        contrast_V=torch.full((num_studies,), contrast_id("T1w")),
        descriptor_VK=torch.zeros(num_studies, DESCRIPTOR_SIZE),
        study_V=torch.arange(num_studies),
        cu_seqlens=torch.tensor([0, *torch.tensor(lengths).cumsum(0).tolist()], dtype=torch.int32),
        lengths=tuple(lengths),
        volume_lengths=tuple(lengths),
        study_ids=tuple(f"noise-{n}" for n in range(num_studies)),
        epochs=(0,) * num_studies,
        contrasts=(("T1w",),) * num_studies,
        patch_grids=tuple((n, 1, 1) for n in lengths),
        patch_vox=patch_vox,
        spacing_mm=((1.0, 1.0, 1.0),) * num_studies,
    )
