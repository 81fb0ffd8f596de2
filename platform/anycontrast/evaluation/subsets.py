"""Contrast subsets: which are evaluated, in what order, and which studies count for each.

n contrasts have 2^n - 1 non-empty subsets. The order is fixed: fewer contrasts first, then by
vocabulary id, whatever order the contrasts are given in, so tables of two runs line up.
"""

from collections.abc import Collection, Iterable, Sequence
from itertools import combinations

from anycontrast_datasets.contrast import contrast_id

Subset = tuple[str, ...]


def canonical(contrasts: Iterable[str]) -> Subset:
    """Return the contrasts once each, in vocabulary order."""
    return tuple(sorted(set(contrasts), key=contrast_id))


def contrast_subsets(contrasts: Iterable[str], *, max_size: int = 0) -> list[Subset]:
    """Return the non-empty subsets in canonical order.

    Args:
        contrasts: vocabulary names, any order.
        max_size: largest subset kept, the full set always; 0 means no limit.

    Raises:
        ValueError: no contrast is given, or `max_size` is negative.
    """
    names = canonical(contrasts)
    if not names:
        raise ValueError("enumerating contrast subsets: at least one contrast is needed, got none")
    if max_size < 0:
        raise ValueError(f"enumerating contrast subsets: max_size must be >= 0, got {max_size}")
    largest = min(max_size or len(names), len(names))
    subsets = [s for size in range(1, largest + 1) for s in combinations(names, size)]
    return subsets if largest == len(names) else [*subsets, names]


def subset_name(subset: Sequence[str]) -> str:
    """Return the name tables and file formats use: contrasts joined by `+`."""
    return "+".join(subset)


def counts_for(available: Collection[str], subset: Iterable[str]) -> bool:
    """Whether a study with these contrasts is evaluated on this subset: it must have them all."""
    return set(subset) <= set(available)
