"""Dashboards and alerts: made by the generator, told apart, and each alert rings when it should."""

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml

from anycontrast.training.ray_metrics import EXPORTED_PREFIX, GAUGES

ROOT = Path(__file__).parents[1]
MONITORING = ROOT / "infra" / "monitoring"
FILES = ROOT / "infra" / "helm" / "anycontrast" / "files"
RULES = FILES / "alerts.yaml"
RUN = {"run": "r", "task": "amae"}


def dashboards() -> list[dict[str, Any]]:
    return [json.loads(path.read_text()) for path in sorted((FILES / "dashboards").glob("*.json"))]


def rules() -> list[dict[str, Any]]:
    (group,) = yaml.safe_load(RULES.read_text())["groups"]
    found: list[dict[str, Any]] = group["rules"]
    return found


def names_asked() -> set[str]:
    """Every metric named in a panel or alert; labels and what follows `by` are not metrics."""
    queries = [t["expr"] for board in dashboards() for p in board["panels"] for t in p["targets"]]
    bare = [
        re.sub(r"\{[^}]*\}|by\s*\([^)]*\)", " ", query)
        for query in [*queries, *(rule["expr"] for rule in rules())]
    ]
    return {name for query in bare for name in re.findall(r"\bray_\w+", query)}


def generate(folder: Path, *words: str) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(
        [sys.executable, str(folder / "monitoring" / "generate.py"), *words],
        capture_output=True,
        text=True,
        check=False,
    )


def test_the_generated_files_are_current_and_a_changed_one_is_named(tmp_path: Path) -> None:
    assert generate(ROOT / "infra", "--check").stderr == ""
    shutil.copytree(MONITORING, tmp_path / "monitoring")
    out = tmp_path / "helm" / "anycontrast" / "files"
    assert generate(tmp_path).returncode == 0
    (out / "alerts.yaml").write_text((out / "alerts.yaml").read_text() + "\n")
    (out / "dashboards" / "of-old.json").write_text("{}")
    checked = generate(tmp_path, "--check")
    assert checked.returncode == 1
    assert "alerts.yaml is not current" in checked.stderr
    assert "of-old.json is not current" in checked.stderr
    assert generate(tmp_path).returncode == 0
    assert generate(tmp_path, "--check").returncode == 0


def test_dashboards_and_panels_are_told_apart_and_do_not_overlap() -> None:
    boards = dashboards()
    assert len({board["uid"] for board in boards}) == len(boards) == 3
    assert len({board["title"] for board in boards}) == len(boards)
    for board in boards:
        assert len(board["uid"]) <= 40
        panels = board["panels"]
        assert len({panel["id"] for panel in panels}) == len(panels)
        assert len({panel["title"] for panel in panels}) == len(panels)
        taken: set[tuple[int, int]] = set()
        for place in (panel["gridPos"] for panel in panels):
            assert place["x"] + place["w"] <= 24
            cells = {
                (x, y)
                for x in range(place["x"], place["x"] + place["w"])
                for y in range(place["y"], place["y"] + place["h"])
            }
            assert not cells & taken
            taken |= cells


def test_what_is_asked_for_is_exported_and_what_is_exported_is_shown() -> None:
    ours = {EXPORTED_PREFIX + info.name for info in GAUGES}
    asked = {name for name in names_asked() if name.startswith(EXPORTED_PREFIX)}
    assert asked == ours


def test_every_query_has_a_legend_of_labels_it_keeps() -> None:
    for board in dashboards():
        for panel in board["panels"]:
            for target in panel["targets"]:
                kept = re.findall(r"by \(([^)]*)\)", target["expr"])
                assert kept, target["expr"]
                labels = {label.strip() for label in kept[0].split(",")}
                used = set(re.findall(r"\{\{(\w+)\}\}", target["legendFormat"]))
                assert used <= labels, (panel["title"], target)


@dataclass(frozen=True)
class Case:
    """Series as promtool writes them, and whether the alert rings at a minute."""

    alert: str
    series: dict[str, str]
    minute: int
    summary: str | None
    """What it says; None where it must be silent."""
    labels: dict[str, str]


def run_series(metric: str, values: str, **labels: str) -> dict[str, str]:
    named = ",".join(f'{k}="{v}"' for k, v in {**RUN, **labels}.items())
    return {f"ray_anycontrast_{metric}{{{named}}}": values}


def node(**metrics: str) -> dict[str, str]:
    where = '{SessionName="s",ip="10.0.0.7"}'
    return {f"ray_node_{metric}{where}": values for metric, values in metrics.items()}


NODE = {"SessionName": "s", "ip": "10.0.0.7"}
NO_STEP = "Run r (amae) has logged no step for 15 minutes"
OLD = "Run r (amae) has no checkpoint of the last 2 hours"
STORM = "Run r was started again 3 times or more within 30 minutes"
WAITS = "Run r (amae) has waited 15 minutes for its workers"
STALL = "Run r waits for data 40% of its time"
SKIPPED = "Run r skipped 11 steps within 30 minutes"
LEFT_OUT = "Run r left out 2 studies that could not be read"
SLOW = "Run r trains at less than half of its best rate of 6 hours"
CASES = (
    Case("NoStep", run_series("step_timestamp_seconds", "0+60x10 600x60"), 28, NO_STEP, RUN),
    Case("NoStep", run_series("step_timestamp_seconds", "0+60x80"), 28, None, RUN),
    # The rank that died is gone from the scrape, the one that took over goes on.
    Case(
        "NoStep",
        {
            **run_series("step_timestamp_seconds", "0+60x10 600x60", WorkerId="dead"),
            **run_series("step_timestamp_seconds", "_x12 720+60x60", WorkerId="new"),
        },
        40,
        None,
        RUN,
    ),
    # Another team's run of the same name goes on.
    Case(
        "NoStep",
        {
            **run_series("step_timestamp_seconds", "0+60x10 600x60", namespace="team"),
            **run_series("step_timestamp_seconds", "0+60x80", namespace="others"),
        },
        28,
        NO_STEP,
        {**RUN, "namespace": "team"},
    ),
    Case("CheckpointOld", run_series("checkpoint_timestamp_seconds", "60x200"), 130, OLD, RUN),
    Case("CheckpointOld", run_series("checkpoint_timestamp_seconds", "0+60x200"), 130, None, RUN),
    Case("RestartStorm", run_series("restarts", "0x5 1x5 2x5 3x40"), 20, STORM, RUN),
    Case("RestartStorm", run_series("restarts", "0x5 1x40 2x40 3x40"), 90, None, RUN),
    Case("NotRunning", run_series("job", "1x40"), 20, WAITS, RUN),
    Case(
        "NotRunning",
        {**run_series("job", "1x40", WorkerId="a"), **run_series("step", "5x40", WorkerId="b")},
        20,
        None,
        RUN,
    ),
    Case("DataStall", run_series("data_wait_share", "0.4x40", rank="1"), 20, STALL, RUN),
    Case("DataStall", run_series("data_wait_share", "0.4x3 0.05x40", rank="1"), 20, None, RUN),
    Case("SkippedSteps", run_series("skipped_steps", "0x5 11x20"), 10, SKIPPED, RUN),
    Case("SkippedSteps", run_series("skipped_steps", "40x60"), 40, None, RUN),
    Case("Quarantine", run_series("quarantined_studies", "0x5 2x20"), 10, LEFT_OUT, RUN),
    Case("Quarantine", run_series("quarantined_studies", "0x60"), 10, None, RUN),
    Case("Slow", run_series("tokens_per_second", "1000x60 400x60"), 95, SLOW, RUN),
    Case("Slow", run_series("tokens_per_second", "1000x60 600x60"), 95, None, RUN),
    Case(
        "NodeMemory",
        node(mem_used="95x20", mem_total="100x20"),
        10,
        "Node 10.0.0.7 uses 95% of its memory",
        NODE,
    ),
    Case("NodeMemory", node(mem_used="80x20", mem_total="100x20"), 10, None, NODE),
    Case(
        "NodeDisk",
        node(disk_utilization_percentage="93x20"),
        10,
        "A disk of node 10.0.0.7 is 93 % full",
        NODE,
    ),
    Case("NodeDisk", node(disk_utilization_percentage="50x20"), 10, None, NODE),
)


@pytest.fixture(scope="module")
def promtool() -> Path:
    script = ROOT / "infra" / "tools" / "get_promtool.sh"
    done = subprocess.run([str(script)], capture_output=True, text=True, check=False)
    if done.returncode != 0:
        reason = f"no promtool: {done.stderr.strip()}"
        pytest.fail(reason) if os.environ.get("CI") == "true" else pytest.skip(reason)
    return Path(done.stdout.strip())


@pytest.fixture(scope="module")
def check(promtool: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., str]:
    """Run promtool's unit tests of some cases; returns what it complains of."""
    by_name = {rule["alert"]: rule for rule in rules()}
    folder = tmp_path_factory.mktemp("promtool")

    def run(*cases: Case) -> str:
        tests = []
        for case in cases:
            rule = by_name[f"Anycontrast{case.alert}"]
            expected = {
                "exp_labels": {**case.labels, **rule["labels"]},
                "exp_annotations": {**rule["annotations"], "summary": case.summary},
            }
            tests.append(
                {
                    "interval": "1m",
                    "input_series": [{"series": k, "values": v} for k, v in case.series.items()],
                    "alert_rule_test": [
                        {
                            "eval_time": f"{case.minute}m",
                            "alertname": rule["alert"],
                            "exp_alerts": [expected] if case.summary else [],
                        }
                    ],
                }
            )
        path = folder / "alerts_test.yaml"
        path.write_text(yaml.safe_dump({"rule_files": [str(RULES)], "tests": tests}))
        done = subprocess.run(
            [str(promtool), "test", "rules", str(path)], capture_output=True, text=True, check=False
        )
        return "" if done.returncode == 0 else done.stdout + done.stderr

    return run


def test_every_alert_has_a_case_that_rings_and_one_that_does_not() -> None:
    names = {rule["alert"].removeprefix("Anycontrast") for rule in rules()}
    assert {case.alert for case in CASES if case.summary} == names
    assert {case.alert for case in CASES if case.summary is None} == names


def test_promtool_reads_the_rules(promtool: Path) -> None:
    done = subprocess.run(
        [str(promtool), "check", "rules", "--lint=all", "--lint-fatal", str(RULES)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_each_alert_rings_when_it_should(check: Callable[..., str]) -> None:
    assert check(*CASES) == ""


def test_a_wrong_expectation_fails(check: Callable[..., str]) -> None:
    silent = next(case for case in CASES if case.summary is None)
    assert "FAILED" in check(Case(silent.alert, silent.series, silent.minute, "x", silent.labels))
