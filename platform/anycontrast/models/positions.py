"""Where a patch lies, as a fixed code of its centre in mm.

The same for all contrasts at one location, and comparable between grids and spacings, because it
is a function of millimetres and not of the patch index. No parameters; computed for each batch.

Letters: T tokens, D width, F frequencies.
"""

import torch
from torch import Tensor

MAX_PERIOD = 10000.0


def sincos_position(position_mm_T3: Tensor, width: int, *, patch_mm: float) -> Tensor:
    """Code positions by sines and cosines of each axis.

    With u = position / `patch_mm`, F = width // 6 and w_f = 10000^(-f / F), the code is
    [sin(u_x w), cos(u_x w), sin(u_y w), cos(u_y w), sin(u_z w), cos(u_z w)], then zeros up to
    `width`. Where patches are `patch_mm` wide this is the classical code of the patch index.

    Args:
        position_mm_T3: [T, 3] float32, patch centres in mm along (R+, A+, S+).
        width: of the tokens, >= 6.
        patch_mm: length that counts as one step of the classical index code, > 0.

    Returns:
        [T, width] float32.

    Raises:
        ValueError: `width` below 6, `patch_mm` not positive, or positions not [T, 3].

    Source: Vaswani et al., arXiv 1706.03762, section 3.5, one third of the width per axis.
    """
    if width < 6:
        raise ValueError(f"sincos_position: width must be >= 6 for three axes, got {width}")
    if not patch_mm > 0:
        raise ValueError(f"sincos_position: patch_mm must be > 0, got {patch_mm}")
    if position_mm_T3.ndim != 2 or position_mm_T3.shape[1] != 3:
        raise ValueError(
            f"sincos_position: position_mm_T3 must be [T, 3], got {tuple(position_mm_T3.shape)}"
        )
    num_frequencies = width // 6
    step_F = torch.arange(num_frequencies, device=position_mm_T3.device, dtype=torch.float32)
    frequency_F = MAX_PERIOD ** (-step_F / num_frequencies)
    angle_T3F = (position_mm_T3.float() / patch_mm).unsqueeze(-1) * frequency_F
    code_TD = torch.stack((angle_T3F.sin(), angle_T3F.cos()), dim=2).flatten(1)
    return torch.nn.functional.pad(code_TD, (0, width - 6 * num_frequencies))
