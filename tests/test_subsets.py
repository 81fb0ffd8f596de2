"""Contrast subsets: all of them, once, in one order."""

from itertools import permutations

import pytest

from anycontrast.evaluation.subsets import contrast_subsets, counts_for, subset_name


@pytest.mark.parametrize("size", [1, 2, 3, 4, 7])
def test_n_contrasts_have_two_to_the_n_less_one_subsets(size: int) -> None:
    names = ["T1w", "T1wCE", "T2w", "FLAIR", "DWI", "ADC", "SWI"][:size]
    subsets = contrast_subsets(names)
    assert len(subsets) == 2**size - 1
    assert len({frozenset(s) for s in subsets}) == len(subsets)


def test_the_order_does_not_depend_on_how_contrasts_are_given() -> None:
    orders = {tuple(contrast_subsets(p)) for p in permutations(["FLAIR", "T1w", "T2w"])}
    assert len(orders) == 1
    assert [subset_name(s) for s in orders.pop()] == [
        "T1w",
        "T2w",
        "FLAIR",
        "T1w+T2w",
        "T1w+FLAIR",
        "T2w+FLAIR",
        "T1w+T2w+FLAIR",
    ]


def test_a_limit_keeps_small_subsets_and_the_full_set() -> None:
    names = ["T1w", "T2w", "FLAIR", "DWI"]
    subsets = contrast_subsets(names, max_size=1)
    assert [len(s) for s in subsets] == [1, 1, 1, 1, 4]
    assert contrast_subsets(names, max_size=9) == contrast_subsets(names)


def test_a_study_counts_only_for_subsets_it_has_whole() -> None:
    assert counts_for(("T1w", "FLAIR"), ("FLAIR",))
    assert counts_for(("T1w", "FLAIR"), ("T1w", "FLAIR"))
    assert not counts_for(("T1w", "FLAIR"), ("T1w", "T2w"))


def test_no_contrast_and_unknown_contrasts_are_refused() -> None:
    with pytest.raises(ValueError, match="at least one contrast"):
        contrast_subsets([])
    with pytest.raises(ValueError, match="FLAIR"):
        contrast_subsets(["FLAIRR"])
