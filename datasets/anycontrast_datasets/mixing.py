"""How often each study is served: weights by dataset, contrast and contrast set, and temperature.

In: what the studies of a stream are, and a `MixingConfig`. Out: one weight per study, and the group
it belongs to. The weights of a study multiply; whatever is not named has weight 1.
"""

import difflib
import logging
import math
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import reduce
from operator import or_

import numpy as np
import numpy.typing as npt

from anycontrast_datasets.contrast import UnknownContrastError, contrast_id, contrast_name
from anycontrast_datasets.study import ManifestError

logger = logging.getLogger(__name__)

MAX_SETS = 20
"""Contrast sets whose share is reported: there may be thousands."""


@dataclass(frozen=True, kw_only=True)
class MixingConfig:
    """How often studies are served, relative to each other; by default all alike."""

    by_dataset: dict[str, float] = field(default_factory=dict)
    """Dataset -> weight of each of its studies; 0 leaves the dataset out."""
    by_contrast: dict[str, float] = field(default_factory=dict)
    """Contrast -> weight of a study that has it. The largest weight among the contrasts served of
    a study counts: a wanted contrast is not outvoted by common ones beside it."""
    by_contrast_set: dict[str, float] = field(default_factory=dict)
    """`T1w+FLAIR` -> weight of a study of which exactly these contrasts may be served, in any
    order; before `drop_contrasts` takes its draw."""
    temperature: float = 1.0
    """> 0. A dataset of n studies gets a share in proportion to n^(1 / temperature) before the
    weights: 1 leaves datasets as large as they are, large values make them equal."""

    def __post_init__(self) -> None:
        if not (math.isfinite(self.temperature) and self.temperature > 0):
            raise ValueError(
                f"stream.mixing.temperature must be finite and > 0, got {self.temperature}; "
                "1 leaves the datasets as large as they are"
            )
        for name in ("by_dataset", "by_contrast", "by_contrast_set"):
            for key, weight in getattr(self, name).items():
                if not (math.isfinite(weight) and weight >= 0):
                    raise ValueError(
                        f"stream.mixing.{name}.{key} must be finite and >= 0, got {weight}"
                    )
        for contrast in self.by_contrast:
            _set_bits("by_contrast", contrast)
        sets = [_set_bits("by_contrast_set", key) for key in self.by_contrast_set]
        for key, bits in zip(self.by_contrast_set, sets, strict=True):
            if sets.count(bits) > 1:
                raise ValueError(
                    f"stream.mixing.by_contrast_set names the set of {key!r} twice; keep one"
                )

    @property
    def is_even(self) -> bool:
        """Whether nothing is asked for, so that every study is served once an epoch."""
        named = self.by_dataset or self.by_contrast or self.by_contrast_set
        return not named and self.temperature == 1.0


def study_weights(
    config: MixingConfig,
    dataset_names: Sequence[str],
    dataset_N: npt.NDArray[np.int64],
    contrast_set_N: npt.NDArray[np.uint64],
) -> npt.NDArray[np.float64]:
    """Return the weight of each study, rounded to 12 digits so that every machine finds the same.

    Args:
        config: The weights.
        dataset_names: Names of the datasets.
        dataset_N: Row of each study in `dataset_names`.
        contrast_set_N: The contrasts served of each study, as bits, see `contrast_set_name`.

    Raises:
        ManifestError: If a dataset is not among `dataset_names`, or every weight is 0.

    Source: temperature: Xue et al., mT5, arXiv 2010.11934, section 3.1 (alpha = 1 / temperature).
    """
    _check_named("dataset", config.by_dataset, dataset_names)
    set_U, set_N = np.unique(contrast_set_N, return_inverse=True)
    members = [_members(int(bits)) for bits in set_U]
    by_set = config.by_contrast_set
    wanted = {_set_bits("by_contrast_set", key): weight for key, weight in by_set.items()}
    _warn_absent(config, {int(bits) for bits in set_U})
    size_D = np.bincount(dataset_N, minlength=len(dataset_names)).astype(np.float64)
    of_dataset = np.maximum(size_D, 1.0) ** (1.0 / config.temperature - 1.0)
    of_dataset *= [config.by_dataset.get(name, 1.0) for name in dataset_names]
    of_set = np.array([wanted.get(int(bits), 1.0) for bits in set_U])
    of_set *= [max(config.by_contrast.get(name, 1.0) for name in names) for names in members]
    weights = of_dataset[dataset_N] * of_set[set_N]
    if not weights.any():
        raise ManifestError(
            "stream.mixing: every study has weight 0, so there is nothing to serve; give a "
            "dataset, contrast or contrast set that is served a weight > 0"
        )
    return _round(weights)


def strata(
    dataset_N: npt.NDArray[np.int64], contrast_set_N: npt.NDArray[np.uint64]
) -> npt.NDArray[np.int64]:
    """Number each study's group: dataset by dataset, and within it contrast set by contrast set."""
    set_U, set_N = np.unique(contrast_set_N, return_inverse=True)
    return dataset_N * len(set_U) + set_N


def mix_shares(
    dataset_names: Sequence[str],
    dataset_P: npt.NDArray[np.int64],
    contrast_set_P: npt.NDArray[np.uint64],
) -> dict[str, float]:
    """Return the share of places by `dataset/<name>`, `contrast/<name>` and `set/<names>`.

    Of the sets only the 20 most frequent. Without places it is empty.
    """
    if len(dataset_P) == 0:
        return {}
    counts: Counter[str] = Counter()
    sets: Counter[str] = Counter()
    for number, count in enumerate(np.bincount(dataset_P, minlength=len(dataset_names))):
        counts[f"dataset/{dataset_names[number]}"] = int(count)
    set_U, count_U = np.unique(contrast_set_P, return_counts=True)
    for bits, count in zip(set_U.tolist(), count_U.tolist(), strict=True):
        sets[f"set/{contrast_set_name(bits)}"] = count
        for name in _members(bits):
            counts[f"contrast/{name}"] += count
    counts.update(dict(sets.most_common(MAX_SETS)))
    return {name: count / len(dataset_P) for name, count in counts.items()}


def contrast_set_name(bits: int) -> str:
    """Return `T1w+FLAIR` for a set of contrasts given as bits, in order of their vocabulary ids."""
    return "+".join(_members(bits))


def _members(bits: int) -> list[str]:
    return [contrast_name(n) for n in range(bits.bit_length()) if bits >> n & 1]


def _set_bits(field: str, key: str) -> int:
    names = [key] if field == "by_contrast" else [name.strip() for name in key.split("+")]
    try:
        return reduce(or_, (1 << contrast_id(name) for name in names))
    except UnknownContrastError as error:
        raise ValueError(f"stream.mixing.{field}: {key!r}: {error}") from error


def _check_named(what: str, named: Iterable[str], known: Sequence[str]) -> None:
    for name in named:
        if name not in known:
            nearest = difflib.get_close_matches(name, known, n=1, cutoff=0.0)
            raise ManifestError(
                f"stream.mixing.by_{what}: no study served is of {what} {name!r}; "
                f"did you mean {nearest[0]!r}? There are {', '.join(sorted(known)[:20])}"
            )


def _warn_absent(config: MixingConfig, present: set[int]) -> None:
    anywhere = reduce(or_, present)
    absent = [k for k in config.by_contrast if not _set_bits("by_contrast", k) & anywhere]
    absent += [k for k in config.by_contrast_set if _set_bits("by_contrast_set", k) not in present]
    if absent:
        logger.warning(
            "stream.mixing: no study has the contrasts %s; their weights have no effect",
            ", ".join(absent),
        )


def _round(weights: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    distinct, place = np.unique(weights, return_inverse=True)
    return np.array([float(f"{weight:.12g}") for weight in distinct])[place]
