"""The cost of a study: by formula, and fitted to measured times."""

import numpy as np
import pytest

from anycontrast_datasets.cost import DEFAULT_COST, BlockStack, CostModel, fit_cost, flops_cost


def test_a_fit_finds_the_model_that_made_the_times() -> None:
    rng = np.random.default_rng(0)
    truth = CostModel(linear=2e-5, quadratic=3e-9)
    packs = [[int(n) for n in rng.integers(200, 6000, count)] for count in (1, 1, 2, 3, 5, 8, 8)]
    seconds = [0.01 + float(truth(pack).sum()) * rng.uniform(0.99, 1.01) for pack in packs]
    fitted = fit_cost(packs, seconds)
    assert fitted.linear == pytest.approx(truth.linear, rel=0.1)
    assert fitted.quadratic == pytest.approx(truth.quadratic, rel=0.2)


def test_a_fit_has_no_negative_part() -> None:
    fitted = fit_cost([[100], [200], [400], [800]], [1.0, 1.9, 3.5, 6.0])
    assert fitted.linear > 0
    assert fitted.quadratic == 0


def test_a_fit_refuses_what_it_cannot_use() -> None:
    with pytest.raises(ValueError, match="at least 3 packs, got 2"):
        fit_cost([[1], [2]], [1.0, 2.0])
    with pytest.raises(ValueError, match="must be > 0 s"):
        fit_cost([[1], [2], [3]], [1.0, 2.0, 0.0])
    with pytest.raises(ValueError, match="do not grow"):
        fit_cost([[1], [2], [3]], [3.0, 2.0, 1.0])


def test_block_operations_are_counted_by_formula() -> None:
    vit_b = flops_cost([BlockStack(width=768, depth=12)])
    assert vit_b.linear == 12 * 24 * 768**2
    assert vit_b.quadratic / vit_b.linear == pytest.approx(DEFAULT_COST.quadratic)
    masked = flops_cost([BlockStack(width=768, depth=12, token_share=0.3)], per_token=7.0)
    assert masked.linear == pytest.approx(0.3 * vit_b.linear + 7)
    assert masked.quadratic == pytest.approx(0.09 * vit_b.quadratic)


def test_a_model_of_no_cost_is_refused() -> None:
    for linear, quadratic in ((0.0, 0.0), (-1.0, 1.0), (float("nan"), 1.0)):
        with pytest.raises(ValueError, match="must be finite, >= 0"):
            CostModel(linear=linear, quadratic=quadratic)
