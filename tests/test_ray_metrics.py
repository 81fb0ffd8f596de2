"""A run's numbers in Ray's metrics: set by rank, and there in a scrape of a live run."""

import re
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from anycontrast.training import ray_metrics
from anycontrast.training.ray_metrics import EXPORTED_PREFIX, GAUGES, RayMetrics

ROOT = Path(__file__).parents[1]
OWN = {"step_s": 0.5, "data_wait_s": 0.1, "data_wait_share": 0.2, "memory_bytes": 7.0}
CONFIG = """\
name: live
scan: {source: phantom, dataset: phantom, split_fractions: [1.0, 0.0, 0.0],
       phantom: {num_studies: 6, spacing_mm: [8.0, 8.0, 8.0], num_sites: 2}}
prepare: {spacing_mm: [8.0, 8.0, 8.0], box_multiple_vox: 8}
model: {preset: tiny, patch_vox: [8, 8, 8]}
cluster: {num_workers: 2, max_failures: 2}
pretrain: {steps: 400, log_every: 5, checkpoint_every: 100, panel_every: -1,
           stream: {studies_per_step: 4, packs_per_step: 2}}
"""


class Recorded:
    """Stands for `ray.util.metrics.Gauge`: keeps what was set."""

    def __init__(self, name: str, description: str, tag_keys: tuple[str, ...]) -> None:
        self.tag_keys = tag_keys
        self.values: dict[tuple[str, ...], float] = {}

    def set(self, value: float, tags: dict[str, str]) -> None:
        assert set(tags) == set(self.tag_keys)
        self.values[tuple(tags[key] for key in self.tag_keys)] = value


@pytest.fixture
def recorded(monkeypatch: pytest.MonkeyPatch) -> dict[str, Recorded]:
    made = {
        info.name: Recorded(
            info.name, info.help, ("run", "task", *([info.label] if info.label else []))
        )
        for info in GAUGES
    }
    monkeypatch.setattr(ray_metrics, "_is_connected", lambda: True)
    monkeypatch.setattr(ray_metrics, "_gauges", lambda: made)
    return made


def log(metrics: RayMetrics, **values: float) -> None:
    metrics.logged(5, {"skipped_steps": 1.0, **values}, OWN, quarantined_studies=3)


def test_names_are_unique_and_each_says_what_it_is() -> None:
    names = [info.name for info in GAUGES]
    assert len(set(names)) == len(names)
    assert all(info.help and re.fullmatch(r"[a-z_]+", info.name) for info in GAUGES)


def test_rank_0_speaks_for_the_run_and_every_rank_for_itself(
    recorded: dict[str, Recorded],
) -> None:
    log(RayMetrics("r", "amae", rank=1), loss=9.0)
    assert {name for name, gauge in recorded.items() if gauge.values} == {
        "step_seconds",
        "data_wait_seconds",
        "data_wait_share",
        "memory_bytes",
    }
    log(RayMetrics("r", "amae", rank=0), loss=2.0, **{"loss/contrast/DWI": 1.5})
    assert recorded["step_seconds"].values == {("r", "amae", "0"): 0.5, ("r", "amae", "1"): 0.5}
    assert recorded["loss"].values == {("r", "amae"): 2.0}
    assert recorded["contrast_loss"].values == {("r", "amae", "DWI"): 1.5}
    assert recorded["quarantined_studies"].values == {("r", "amae"): 3.0}
    assert recorded["skipped_steps"].values == {("r", "amae"): 1.0}


def test_a_value_that_is_not_finite_leaves_the_last_one(recorded: dict[str, Recorded]) -> None:
    metrics = RayMetrics("r", "amae", rank=0)
    log(metrics, loss=2.0)
    log(metrics, loss=float("nan"))
    assert recorded["loss"].values == {("r", "amae"): 2.0}


def test_a_value_set_once_is_set_again_and_again_while_the_run_lives(
    recorded: dict[str, Recorded], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ray_metrics, "_REPEAT_S", 0.01)
    with RayMetrics("r", "amae", rank=0) as metrics:
        metrics.restarted(2)
        recorded["restarts"].values.clear()
        end_s = time.monotonic() + 10
        while not recorded["restarts"].values and time.monotonic() < end_s:
            time.sleep(0.01)
        assert recorded["restarts"].values == {("r", "amae"): 2.0}
    time.sleep(0.1)
    recorded["restarts"].values.clear()
    time.sleep(0.1)
    assert recorded["restarts"].values == {}


def test_the_age_of_a_checkpoint_counts_from_the_one_resumed_from(
    recorded: dict[str, Recorded],
) -> None:
    metrics = RayMetrics("r", "amae", rank=0)
    metrics.started(step=10, planned_steps=20, ranks=2, saved_s=100.0)
    assert recorded["checkpoint_timestamp_seconds"].values == {("r", "amae"): 100.0}
    metrics.saved()
    assert recorded["checkpoint_timestamp_seconds"].values[("r", "amae")] > time.time() - 60


def test_without_ray_nothing_is_set_and_ray_is_not_imported(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delitem(sys.modules, "ray", raising=False)
    monkeypatch.setattr(ray_metrics, "_gauges", lambda: pytest.fail("asked Ray"))
    log(RayMetrics("r", "amae", rank=0), loss=2.0)
    assert "ray" not in sys.modules


@pytest.mark.cluster
@pytest.mark.slow
def test_every_number_of_a_panel_or_alert_is_in_a_scrape_of_a_live_run(
    ray_nodes: Callable[..., Any], tmp_path: Path
) -> None:
    nodes = ray_nodes()
    nodes.start()
    config = tmp_path / "live.yaml"
    config.write_text(CONFIG)
    job = nodes.submit("python", "recipes/amae_pretrain.py", str(config), f"root={tmp_path}")
    monitoring = ROOT / "infra" / "helm" / "anycontrast" / "files"
    sources = [*(monitoring / "dashboards").glob("*.json"), monitoring / "alerts.yaml"]
    asked = {name for path in sources for name in names_asked(path.read_text())}
    wanted = {EXPORTED_PREFIX + info.name for info in GAUGES} | asked
    seen, end_s = "", time.monotonic() + 150
    while not wanted <= names_in(seen) and job.poll() is None and time.monotonic() < end_s:
        time.sleep(1)
        seen += nodes.scrape()
    assert wanted - names_in(seen) == set()
    ranks = set(re.findall(r'ray_anycontrast_step_seconds\{.*?rank="(\d)"', seen))
    assert ranks == {"0", "1"}
    assert 'run="live"' in seen


def names_in(scrape: str) -> set[str]:
    return set(re.findall(r"^([a-zA-Z_:][\w:]*)(?:\{| )", scrape, flags=re.MULTILINE))


def names_asked(text: str) -> set[str]:
    """Names before a selector, a window or the end of an expression; labels are none of these."""
    bare = re.sub(r"\{[^}]*\}|by \([^)]*\)|\{\{.*?\}\}", " ", text)
    return set(re.findall(r"\bray_\w+", bare))
