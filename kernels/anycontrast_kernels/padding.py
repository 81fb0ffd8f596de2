"""Zeros where a pack has no sequence: after its last offset."""

import torch
from torch import Tensor

from anycontrast_kernels.sequences import Sequences


def clear_padding(x_THD: Tensor, sequences: Sequences) -> Tensor:
    """Set the tokens after the last offset to 0, in place and without reading the offset.

    Foreign kernels leave there what the memory held, which may be NaN.

    Args:
        x_THD: [T, H, D] contiguous.
        sequences: the sequences of `x_THD`.

    Returns:
        `x_THD`.
    """
    row_T11 = torch.arange(x_THD.shape[0], device=x_THD.device).view(-1, 1, 1)
    return x_THD.masked_fill_(row_T11 >= sequences.cu_seqlens[-1], 0)
