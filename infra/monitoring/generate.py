"""Write the dashboards and alert rules of the chart: `python infra/monitoring/generate.py`.

Comes in: `panels.py` and `alerts.py` beside this file. Goes out, under
`infra/helm/anycontrast/files/`: `dashboards/*.json` for Grafana and `alerts.yaml` for Prometheus.
With `--check` nothing is written; exit code 1 where a file is not what it would be.
"""

import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml
from alerts import ALERTS, Alert
from panels import DASHBOARDS, Dashboard, Panel

OUT = Path(__file__).resolve().parents[1] / "helm" / "anycontrast" / "files"
_SOURCE = {"type": "prometheus", "uid": "${datasource}"}
_COLUMNS = 24
# Kind of a panel -> width and height on Grafana's grid of 24 columns.
_SIZES = {"timeseries": (8, 8), "stat": (4, 5), "gauge": (4, 5)}


def files() -> dict[Path, str]:
    """Return what every generated file holds."""
    made = {
        OUT / "dashboards" / f"{board.uid}.json": json.dumps(dashboard(board), indent=1) + "\n"
        for board in DASHBOARDS
    }
    rules = [rule(alert) for alert in ALERTS]
    text = yaml.safe_dump(
        {"groups": [{"name": "anycontrast", "rules": rules}]}, sort_keys=False, width=100
    )
    head = "# Written by infra/monitoring/generate.py from alerts.py; edit that.\n"
    return {**made, OUT / "alerts.yaml": head + text}


def rule(alert: Alert) -> dict[str, Any]:
    """Return a rule of Prometheus."""
    return {
        "alert": alert.name,
        "expr": alert.expr,
        "for": alert.wait,
        "labels": {"severity": alert.severity},
        "annotations": {"summary": alert.summary, "description": alert.remedy},
    }


def dashboard(board: Dashboard) -> dict[str, Any]:
    """Return a dashboard of Grafana; panels flow from left to right."""
    panels, x, y, height = [], 0, 0, 0
    for number, panel in enumerate(board.panels, start=1):
        width, tall = _SIZES[panel.kind]
        if x + width > _COLUMNS or (x and tall != height):
            x, y = 0, y + height
        panels.append(_panel(panel, number, {"x": x, "y": y, "w": width, "h": tall}))
        x, height = x + width, tall
    return {
        "uid": board.uid,
        "title": board.title,
        "tags": ["anycontrast"],
        "schemaVersion": 39,
        "version": 1,
        "editable": False,
        "refresh": "30s",
        "time": {"from": "now-6h", "to": "now"},
        "templating": {"list": _variables(has_run=board.has_run)},
        "panels": panels,
    }


def _variables(*, has_run: bool) -> list[dict[str, Any]]:
    source = {"name": "datasource", "label": "Prometheus", "type": "datasource"}
    found: list[dict[str, Any]] = [{**source, "query": "prometheus"}]
    if has_run:
        query = "label_values(ray_anycontrast_step, run)"
        found.append(
            {
                "name": "run",
                "label": "Run",
                "type": "query",
                "datasource": _SOURCE,
                "query": {"query": query, "refId": "run"},
                "definition": query,
                "refresh": 2,
                "includeAll": True,
                "allValue": ".*",
                "multi": True,
                "current": {"text": "All", "value": "$__all"},
            }
        )
    return found


def _panel(panel: Panel, number: int, place: Mapping[str, int]) -> dict[str, Any]:
    custom: dict[str, Any] = {}
    if panel.is_log:
        custom = {"scaleDistribution": {"type": "log", "log": 10}}
    if panel.kind == "timeseries":
        custom = {**custom, "showPoints": "never", "lineWidth": 1}
    limits = {"min": 0, "max": 1} if panel.kind == "gauge" else {}
    return {
        "id": number,
        "type": panel.kind,
        "title": panel.title,
        "description": panel.help,
        "datasource": _SOURCE,
        "gridPos": dict(place),
        "fieldConfig": {
            "defaults": {"unit": panel.unit, "custom": custom, **limits},
            "overrides": [],
        },
        "options": {},
        "targets": [
            {
                "refId": chr(ord("A") + index),
                "datasource": _SOURCE,
                "expr": expr,
                "legendFormat": legend,
            }
            for index, (expr, legend) in enumerate(panel.queries)
        ],
    }


def main(words: list[str]) -> int:
    """Write the files, or say which are not current."""
    wanted = files()
    stale = [path for path, text in wanted.items() if not _holds(path, text)]
    stale += sorted({*(OUT / "dashboards").glob("*.json")} - wanted.keys())
    if words == ["--check"]:
        for path in stale:
            sys.stderr.write(f"{path} is not current: run python infra/monitoring/generate.py\n")
        return 1 if stale else 0
    for path in stale:
        if path not in wanted:
            path.unlink()
            continue
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(wanted[path], encoding="utf-8")
        sys.stdout.write(f"wrote {path}\n")
    return 0


def _holds(path: Path, text: str) -> bool:
    return path.is_file() and path.read_text(encoding="utf-8") == text


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
