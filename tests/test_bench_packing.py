import json
from pathlib import Path
from xml.etree import ElementTree

import pytest
import torch

from anycontrast.bench.packing import PackingBenchConfig, run
from anycontrast.bench.packing_batch import draw_plan, masked_pack, noise_study
from anycontrast.bench.padded_model import padded_loss
from anycontrast.models.amae import AMAE, AMAEConfig
from anycontrast.models.masking import MaskingConfig


def test_the_padded_model_is_the_packed_one() -> None:
    torch.manual_seed(0)
    model = AMAE(AMAEConfig(preset="tiny", patch_vox=(16, 16, 16)))
    studies = [noise_study(0, 1, 2), noise_study(1, 3, 2), noise_study(2, 2, 3)]
    pack = masked_pack(studies, MaskingConfig(hidden_fraction=0.75))
    found = []
    for loss_M in (model(pack).loss_M, padded_loss(model, pack, (60, 20, 45))):
        model.zero_grad()
        loss_M.sum().backward()
        gradients = {name: weight.grad for name, weight in model.named_parameters()}
        gradient = gradients["encoder.blocks.0.attention.qkv.weight"]
        assert gradient is not None
        found.append((loss_M.detach(), gradient.clone()))
    torch.testing.assert_close(found[0][0], found[1][0], atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(found[0][1], found[1][1], atol=1e-3, rtol=1e-3)


def test_it_measures_saves_and_holds_against_the_bars(tmp_path: Path) -> None:
    config = PackingBenchConfig(
        folder=str(tmp_path), preset="tiny", num_studies=4, studies_at_once=2, grid=2
    )
    result = run(config)
    assert [row["sizes"] for row in result["rows"]] == ["one", "mixed"]
    for row in result["rows"]:
        assert row["padded_tokens"] >= row["tokens"]
        assert row["packed_over_padded"] > 0
        assert row["packed_tokens_per_cpu_s"] > 0
    assert [bar["bar"] for bar in result["bars"].values()] == [">= 1.8", ">= 3"]
    assert json.loads((tmp_path / "packing.json").read_text())["rows"] == result["rows"]
    assert "| uniform, mixed |" in (tmp_path / "packing.md").read_text()
    picture = ElementTree.fromstring((tmp_path / "packing.svg").read_text())
    assert {"packed", "padded", "bucketed", "uniform, mixed"} <= set(picture.itertext())


def test_the_batch_drawn_is_neither_lucky_nor_unlucky() -> None:
    wastes = {
        (name, mixed): draw_plan(16, name, 6, mixed=mixed, seed=1).waste
        for name in ("uniform", "skewed", "clinical", "halves")
        for mixed in (False, True)
    }
    # Tokens of a batch padded to its longest over the real ones, from the shares themselves.
    assert wastes["uniform", False] == pytest.approx(1.7, abs=0.12)
    assert wastes["halves", False] == pytest.approx(1.75, abs=0.12)
    assert wastes["skewed", False] == pytest.approx(2.1, abs=0.25)
    for name in ("uniform", "skewed", "clinical", "halves"):
        assert wastes[name, True] > wastes[name, False]


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"distributions": ("odd",)}, "distributions: must be of uniform"),
        ({"sizes": ("two",)}, "sizes: must be of one, mixed"),
        ({"num_buckets": 3}, "num_buckets: must divide num_studies"),
        ({"grid": 1}, "and grid 2"),
    ],
)
def test_bad_settings_are_refused(change: dict[str, object], match: str) -> None:
    with pytest.raises(ValueError, match=match):
        PackingBenchConfig(**change)  # type: ignore[arg-type]
