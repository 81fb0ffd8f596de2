"""Learning rate and parameter groups."""

import math
from typing import Any

import pytest
import torch
from torch import nn

from anycontrast.models.amae import AMAE, AMAEConfig
from anycontrast.training.optim import OptimConfig, build_adamw, lr_at, parameter_groups


def test_lr_warms_up_linearly_then_follows_a_cosine_to_its_minimum() -> None:
    config = OptimConfig(lr=2.0, warmup_steps=4, min_lr_fraction=0.1)
    rates = [lr_at(step, 15, config) for step in range(15)]
    assert rates[:4] == [0.5, 1.0, 1.5, 2.0]
    assert rates[4] == pytest.approx(2.0)
    assert rates[9] == pytest.approx((2.0 + 0.2) / 2)
    assert rates[14] == pytest.approx(0.2)
    assert rates[4:] == sorted(rates[4:], reverse=True)
    assert lr_at(100, 15, config) == pytest.approx(0.2)


def test_lr_of_a_run_of_one_step_is_positive() -> None:
    assert lr_at(0, 1, OptimConfig(lr=1e-3)) == pytest.approx(1e-3)


def test_every_parameter_is_in_one_group_and_only_projections_decay() -> None:
    model = AMAE(AMAEConfig(preset="tiny", patch_vox=(4, 4, 4), encoder_contrast_embedding=True))
    model.frozen = nn.Linear(2, 2).requires_grad_(False)
    groups = parameter_groups(model, 0.05)
    assert [group["weight_decay"] for group in groups] == [0.05, 0.0]
    names = {id(p): name for name, p in model.named_parameters()}
    decayed = {names[id(p)] for p in groups[0]["params"]}
    kept = {names[id(p)] for p in groups[1]["params"]}
    assert not decayed & kept
    assert decayed | kept == {n for n, p in model.named_parameters() if p.requires_grad}
    assert not [n for n in decayed if n.endswith("bias") or "norm" in n or "embedding" in n]
    assert not [n for n in decayed if "mask_token" in n or "contrast_vector" in n]
    assert any("qkv.weight" in name for name in decayed)
    assert all(dict(model.named_parameters())[name].ndim >= 2 for name in decayed)


def test_embedding_tables_do_not_decay_whatever_they_are_called() -> None:
    model = nn.ModuleDict({"lookup": nn.Embedding(4, 8), "project": nn.Linear(8, 8)})
    (decayed, kept) = parameter_groups(model, 0.1)
    assert [tuple(p.shape) for p in decayed["params"]] == [(8, 8)]
    assert [tuple(p.shape) for p in kept["params"]] == [(4, 8), (8,)]


def test_adamw_uses_the_configured_values() -> None:
    adamw = build_adamw(nn.Linear(2, 2), OptimConfig(lr=0.5, betas=(0.8, 0.9)))
    assert adamw.param_groups[0]["lr"] == 0.5
    assert adamw.param_groups[0]["betas"] == (0.8, 0.9)
    assert isinstance(adamw, torch.optim.AdamW)


@pytest.mark.parametrize(
    "values",
    [
        {"lr": 0.0},
        {"lr": math.nan},
        {"betas": (0.9, 1.0)},
        {"clip_norm": -1.0},
        {"min_lr_fraction": 2.0},
        {"warmup_steps": -1},
    ],
    ids=str,
)
def test_a_bad_setting_is_refused_by_name(values: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=f"optim.{next(iter(values))}"):
        OptimConfig(**values)
