"""The manifest benchmark: everything is measured once, and the bars say what it came to."""

import json
from pathlib import Path

import pytest

from anycontrast.bench import manifest
from anycontrast.bench.manifest import ManifestBenchConfig


def test_a_made_up_manifest_is_opened_filtered_and_planned(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(manifest, "_in_new_process", manifest._measure)
    config = ManifestBenchConfig(
        folder=str(tmp_path), num_studies=2000, world_size=4, pool_studies=512, rounds=1
    )
    found = json.loads(json.dumps(manifest.run(config)))
    assert (found["planned"], found["left_over"]) == (2000, 0)
    assert 0 < found["filtered"] < 2000
    names = {"open_s", "filter_s", "plan_s", "peak_gb", "imbalance_max", "fill"}
    assert set(found["bars"]) == names
    for name, bar in found["bars"].items():
        sign, number = bar["bar"].split()
        assert sign == (">=" if name == "fill" else "<=")
        value = found[name] if name != "fill" else -found[name]
        limit = float(number) if name != "fill" else -float(number)
        assert bar["met"] == (value <= limit)
    made = (tmp_path / "manifest-2000.parquet").stat().st_mtime_ns
    manifest.run(config)
    assert (tmp_path / "manifest-2000.parquet").stat().st_mtime_ns == made, "kept between runs"


@pytest.mark.parametrize("name", ["num_studies", "world_size", "pack_tokens", "rounds"])
def test_settings_that_make_no_sense_are_refused(name: str) -> None:
    with pytest.raises(ValueError, match=f"bench.manifest.{name} must be >= 1, got 0"):
        ManifestBenchConfig(**{name: 0})  # type: ignore[arg-type]
