"""The sharding benchmark: every step it names exists and is met, and the parts make the whole."""

from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest

from anycontrast.bench import sharding
from anycontrast.bench.sharding import NEEDED, STEPS, ShardingBenchConfig


def tiny_volumes(number: int) -> dict[str, npt.NDArray[np.float32]]:
    rng = np.random.default_rng(number)
    axes = [np.linspace(-1, 1, n) for n in (32, 36, 33)]
    x, y, z = np.meshgrid(*axes, indexing="ij")
    ball = x**2 + y**2 + z**2 < 0.7
    return {
        name: (ball * rng.normal(900, 90, size=ball.shape)).astype(np.float32)
        for name in ("T1w", "GRE")
    }


def test_every_step_is_met_and_the_parts_make_the_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sharding, "make_volumes", tiny_volumes)
    config = ShardingBenchConfig(folder=str(tmp_path), num_studies=3, num_workers=0)
    result = sharding.run(config)
    steps = result["cpu_ms_per_study"]
    assert set(steps) == {*STEPS, "other"} and all(ms > 0 for ms in steps.values())
    assert sum(steps.values()) == pytest.approx(result["cpu_ms_total"], abs=1.0)
    share = 1 - sum(steps[name] for name in NEEDED) / result["cpu_ms_total"]
    bar = result["bars"]["share_outside_decode_resample_compress"]
    assert bar["value"] == pytest.approx(share, abs=0.02)
    assert bar["met"] == (bar["value"] <= 0.25)
    assert not (tmp_path / "sharding-shards").exists()


def test_every_named_function_exists() -> None:
    root = Path(sharding.__file__).parents[3] / "datasets" / "anycontrast_datasets"
    for functions in STEPS.values():
        for file, name in functions:
            sources = [path.read_text() for path in root.rglob(file)]
            assert any(f"def {name}(" in source for source in sources), (file, name)
