"""Static shapes for compiled blocks: rows padded to one of few numbers, sequences to a capacity.

Ragged packs would have every block compiled anew for every number of tokens. Packs made to one
token budget get one shape here; over packs of any size there are eight shapes per doubling.

Letters: N tokens, R rows, D width, S studies.
"""

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor

from anycontrast_kernels.sequences import Sequences, sequences

ROW_STEP = 128
SEQUENCE_STEP = 16


def pad_tokens(tokens_ND: Tensor, lengths: Sequence[int]) -> tuple[Tensor, Sequences]:
    """Append rows of zeros that belong to no sequence.

    Args:
        tokens_ND: [N, D].
        lengths: tokens per study, N in all.

    Returns:
        [R, D] with R = `padded_rows(N)`, and sequences with a capacity of `padded_count(S)`.
        Attention gives 0 in the rows beyond the last offset, and they get no gradient.
    """
    num_rows = padded_rows(tokens_ND.shape[0])
    padded_RD = F.pad(tokens_ND, (0, 0, 0, num_rows - tokens_ND.shape[0]))
    capacity = padded_count(len(lengths))
    return padded_RD, sequences(lengths, tokens_ND.device, capacity=capacity, num_tokens=num_rows)


def padded_rows(num_tokens: int) -> int:
    """Round up to a multiple of 128 and, from 2048 on, to three binary digits after the first.

    That adds 127 rows at most, or an eighth of the tokens.
    """
    step = max(ROW_STEP, 1 << max(num_tokens - 1, 0).bit_length() >> 4)
    return max(-(-num_tokens // step), 1) * step


def padded_count(num_sequences: int) -> int:
    """Round up to a multiple of 16."""
    return max(-(-num_sequences // SEQUENCE_STEP), 1) * SEQUENCE_STEP
