"""A realistic mixed pack: studies with few or many contrasts, of small or large boxes."""

import numpy as np

CONTRAST_COUNTS = (1, 2, 3, 4, 5, 6, 7)
CLINICAL = (0.05, 0.12, 0.22, 0.33, 0.16, 0.08, 0.04)
"""Share of studies with 1 to 7 contrasts: 4 is the mode, 3.8 the mean."""
SIZES = ((0.6, 0.2), (1.0, 0.4), (1.6, 0.25), (2.34, 0.15))
"""Volume over 128 x 128 x 128 voxels, and its share of the studies."""
MEAN_STUDY = 3.84 * 1.27
"""Contrasts x size of the mean study."""
STUDIES = 16
"""About how many studies a pack holds."""


def mixed_lengths(num_tokens: int, *, seed: int = 0) -> tuple[int, ...]:
    """Return lengths of studies that fill `num_tokens` exactly; the last one is cut off.

    The tokens of a contrast follow from the budget: about `STUDIES` studies fit.
    """
    rng = np.random.Generator(np.random.Philox(seed))
    per_contrast = num_tokens / STUDIES / MEAN_STUDY
    sizes, shares = zip(*SIZES, strict=True)
    lengths: list[int] = []
    while sum(lengths) < num_tokens:
        count = rng.choice(CONTRAST_COUNTS, p=CLINICAL)
        size = rng.choice(sizes, p=shares)
        length = max(1, round(count * size * per_contrast))
        lengths.append(min(length, num_tokens - sum(lengths)))
    return tuple(lengths)
