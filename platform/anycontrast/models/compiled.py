"""`torch.compile` for transformer blocks, each by itself; nothing else is traced.

Blocks of one kind and width share their code, so a model compiles two of them, and two more where
packs differ in size (dynamic shapes from then on). Names of weights stay as they are.
"""

import logging
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from anycontrast.models.blocks import Block, CrossBlock
from anycontrast.models.decoder import Decoder
from anycontrast.models.encoder import Encoder

logger = logging.getLogger(__name__)

RECOMPILE_LIMIT = 64
"""torch's own limit of 8 counts encoder, decoder, training and evaluation together."""


def compile_blocks(model: nn.Module, *, backend: str | Callable[..., Any] = "inductor") -> int:
    """Compile every transformer block of a model in place, and give them static shapes.

    Args:
        model: holds `Encoder`s and `Decoder`s, whose rows are padded from now on.
        backend: of `torch.compile`.

    Returns:
        How many blocks there are.
    """
    config = torch._dynamo.config
    config.recompile_limit = max(config.recompile_limit, RECOMPILE_LIMIT)
    count = 0
    for part in model.modules():
        if isinstance(part, (Encoder, Decoder)):
            part.has_static_shapes = True
        elif isinstance(part, (Block, CrossBlock)):
            part.compile(backend=backend, fullgraph=True)
            count += 1
    logger.info("%d transformer blocks compile at their first run", count)
    return count
