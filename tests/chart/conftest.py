"""The real helm and kubectl, and what one rendered chart is checked with."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))  # infra/chart_tools is no part of the installed packages.

from infra.chart_tools import manifests, operator_rules, pod_policy, strict_schema  # noqa: E402
from infra.chart_tools.helm_binaries import HelmError, fetch  # noqa: E402

CHART = ROOT / "infra" / "helm" / "anycontrast"
CRDS = ROOT.parent / "shared" / "k8s" / "crds"
DIGEST = "sha256:" + "0123456789abcdef" * 4
MINIMAL: dict[str, Any] = {
    "image": {"digest": DIGEST},
    "workerGroups": {"gpu": {"replicas": 2}},
}
# Kinds that a cluster with all prerequisites knows.
APIS = (
    "ray.io/v1/RayCluster",
    "ray.io/v1/RayJob",
    "monitoring.coreos.com/v1/PodMonitor",
    "monitoring.coreos.com/v1/PrometheusRule",
    "scheduling.volcano.sh/v1beta1/PodGroup",
    "scheduling.run.ai/v2/Queue",
    "kueue.x-k8s.io/v1beta2/LocalQueue",
)


@dataclass(frozen=True)
class Run:
    """What one call of a binary gave."""

    code: int
    out: str
    error: str

    @property
    def documents(self) -> list[dict[str, Any]]:
        assert self.code == 0, self.error
        return manifests.parse(self.out)


def binaries(major: int) -> dict[str, Path]:
    try:
        return fetch(major)
    except HelmError as error:
        if os.environ.get("CI"):
            raise
        pytest.skip(f"NO CHART TESTS: {error}")


@pytest.fixture(scope="session", params=[4, 3], ids=["helm4", "helm3"])
def tools(request: pytest.FixtureRequest) -> dict[str, Path]:
    """`helm` and `kubectl`, of Helm 4 and of Helm 3."""
    return binaries(request.param)


@pytest.fixture(scope="session")
def fetched() -> dict[int, dict[str, Path]]:
    """Binaries by major version of Helm."""
    return {major: binaries(major) for major in (3, 4)}


@pytest.fixture(scope="session")
def crds() -> Path:
    """Folder of the custom resource definitions."""
    if not CRDS.is_dir():
        pytest.skip(f"NO CHECK OF CUSTOM KINDS: the definitions are not at {CRDS}")
    return CRDS


@pytest.fixture(scope="session")
def run(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Run]:
    """`run(binary, *words)` in a home folder of its own."""
    home = tmp_path_factory.mktemp("helm-home")

    def call(binary: Path, *words: object) -> Run:
        done = subprocess.run(
            [str(binary), *map(str, words)],
            capture_output=True, text=True, check=False, timeout=60,
            env={"HOME": str(home), "PATH": "/usr/bin:/bin", "LC_ALL": "C"},
        )  # fmt: skip
        return Run(done.returncode, done.stdout, done.stderr)

    return call


@pytest.fixture(scope="session")
def render(run: Callable[..., Run], tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Run]:
    """`render(*values, helm=4, release="r", apis=APIS, kubernetes="1.35.0")`: helm template.

    Values are mappings or files; a mapping is what a user would write into a file.
    """
    folder = tmp_path_factory.mktemp("values")
    done: dict[str, Run] = {}

    def call(
        *values: Any,
        helm: int = 4,
        release: str = "r",
        apis: tuple[str, ...] = APIS,
        kubernetes: str = "1.35.0",
    ) -> Run:
        words: list[object] = ["template", release, CHART, "--namespace", "team"]
        words += ["--kube-version", kubernetes]
        for api in apis:
            words += ["--api-versions", api]
        for number, value in enumerate(values):
            path = value
            if isinstance(value, dict):
                # JSON, because Python's YAML writes some strings so that Go's YAML reads numbers.
                path = folder / f"{number}.json"
                path.write_text(json.dumps(value))
            words += ["--values", path]
        key = f"{helm} {words} {json.dumps(values, default=str)}"
        if key not in done:  # Many tests look at the same chart.
            done[key] = run(binaries(helm)["helm"], *words)
        return done[key]

    return call


@pytest.fixture(scope="session")
def minimal() -> dict[str, Any]:
    """The least that must be set."""
    return MINIMAL


@pytest.fixture(scope="session")
def all_apis() -> tuple[str, ...]:
    """Kinds that a cluster with all prerequisites knows."""
    return APIS


@pytest.fixture(scope="session")
def faults() -> Callable[..., list[str]]:
    """`faults(documents, level)`: everything that is wrong with a rendered chart."""

    @cache
    def has_crds() -> bool:
        return CRDS.is_dir()

    def find(
        documents: list[dict[str, Any]],
        level: str = "restricted",
        versions: tuple[str, ...] = strict_schema.KUBERNETES,
    ) -> list[str]:
        pods = list(manifests.pod_templates(documents))
        found = [rule for d in documents for rule in operator_rules.violations(d)]
        found += [rule for pod in pods for rule in pod_policy.violations(pod, level=level)]
        checked = [*documents, *(pod.as_pod() for pod in pods)]
        for document in checked:
            is_custom = "." in document["apiVersion"] and "k8s.io" not in document["apiVersion"]
            if is_custom and not document["apiVersion"].startswith("policy/") and not has_crds():
                continue
            for version in versions:
                found += strict_schema.faults(document, CRDS, version)
        return found

    return find
