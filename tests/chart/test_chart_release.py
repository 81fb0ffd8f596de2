"""Install, upgrade, rollback, test and uninstall with the real helm, against a stub API server.

The stub stores what it is sent and checks it as strictly as a server would; nothing ever runs.
"""

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from infra.chart_tools import stub_api

CHART = Path(__file__).parents[2] / "infra" / "helm" / "anycontrast"
ALL_KINDS = {**stub_api.CORE, **stub_api.RAY, **stub_api.MONITORING}


class Release:
    """One release in one stub; every call is a real helm or kubectl."""

    def __init__(self, api: stub_api.StubApi, tools: dict[str, Path], run: Any, config: Path):
        self.api, self._tools, self._run, self._config = api, tools, run, config

    def helm(self, *words: object) -> Any:
        return self._run(
            self._tools["helm"], *words, "--kubeconfig", self._config, "--namespace", "team"
        )

    def kubectl(self, *words: object) -> Any:
        return self._run(
            self._tools["kubectl"], *words, "--kubeconfig", self._config, "--namespace", "team"
        )

    def put(self, verb: str, values: dict[str, Any], chart: Path = CHART) -> Any:
        """Install or upgrade with these values."""
        path = self._config.parent / "values.json"
        path.write_text(json.dumps(values))
        return self.helm(verb, "r", chart, "--values", path, "--timeout", "20s")

    @property
    def cluster(self) -> dict[str, Any]:
        return self.api.of_kind("RayCluster")["r-anycontrast"]

    @property
    def replicas(self) -> int:
        number: int = self.cluster["spec"]["workerGroupSpecs"][0]["replicas"]
        return number


@pytest.fixture
def release(
    tools: dict[str, Path], run: Callable[..., Any], faults: Any, crds: Path, tmp_path: Path
) -> Iterator[Release]:
    api = stub_api.StubApi(ALL_KINDS)
    api.check = lambda document: (
        [] if document["kind"] == "Secret" else faults([document], versions=("1.37",))
    )
    with api.running(tmp_path) as config:
        yield Release(api, tools, run, config)


def test_the_whole_life_of_a_release(release: Release, minimal: Any) -> None:
    installed = release.put("install", {**minimal, "monitoring": {"enabled": True}})
    assert installed.code == 0, installed.error
    notes = installed.out.partition("NOTES:")[2]
    for command in (
        "kubectl -n team wait raycluster/r-anycontrast",
        "kubectl -n team port-forward service/r-anycontrast-head-svc 8265",
        "get secret r-anycontrast -o jsonpath='{.data.auth_token}'",
        "helm test r -n team",
        "ray job submit -- python recipes/amae_pretrain.py recipes/configs/amae_base.yaml ",
        "root=/runs ",
        "cluster.num_workers=16 pretrain.stream.packs_per_step=16",
    ):
        assert command in notes
    owner = release.cluster["metadata"]["annotations"]
    assert owner["meta.helm.sh/release-name"] == "r"
    assert set(release.api.of_kind("PodMonitor")) == {"r-anycontrast-head", "r-anycontrast-worker"}
    shown = release.helm("get", "manifest", "r")
    assert "kind: RayCluster" in shown.out

    assert release.put("upgrade", {**minimal, "workerGroups": {"gpu": {"replicas": 5}}}).code == 0
    assert release.replicas == 5
    assert release.api.of_kind("PodMonitor") == {}, "what the new values leave out must go"

    rolled = release.helm("rollback", "r", "1", "--timeout", "20s")
    assert rolled.code == 0, rolled.error
    assert release.replicas == 2 and len(release.api.of_kind("PodMonitor")) == 2
    history = json.loads(release.helm("history", "r", "--output", "json").out)
    assert [entry["status"] for entry in history] == ["superseded", "superseded", "deployed"]

    tested = release.helm("test", "r", "--timeout", "20s")
    assert tested.code == 0, tested.error
    assert "Succeeded" in tested.out
    doctor = release.api.of_kind("Pod")["r-anycontrast-doctor"]
    assert doctor["spec"]["containers"][0]["args"][-6:] == [
        "anycontrast", "doctor", "root=/runs", "cluster.num_workers=16",
        "pretrain.stream.packs_per_step=16", "pretrain.stream.studies_per_step=16",
    ]  # fmt: skip
    assert "r-anycontrast" in release.kubectl("get", "rayclusters").out

    gone = release.helm("uninstall", "r", "--timeout", "20s")
    assert gone.code == 0, gone.error
    left = {o["kind"] for o in release.api.objects.values()}
    assert left == {"PersistentVolumeClaim", "Pod"}, "the run folder and the test's log stay"


def test_the_notes_warn_of_what_is_open(release: Release, minimal: Any) -> None:
    values = {
        **minimal,
        "mode": "job",
        "auth": {"mode": "disabled"},
        "networkPolicy": {"enabled": False},
    }
    done = release.put("install", values)
    assert done.code == 0, done.error
    for said in (
        "kubectl -n team get rayjob r-anycontrast-pretrain -w",
        "WARNING: auth.mode=disabled: whoever reaches a port",
        "WARNING: networkPolicy.enabled=false",
    ):
        assert said in done.out


def test_the_notes_print_commands_that_work_as_they_stand(release: Release, minimal: Any) -> None:
    values = {
        **minimal,
        "podSecurity": {"level": "privileged"},
        "autoscaling": {"enabled": True},
        "workerGroups": {"gpu": {"minReplicas": 0, "maxReplicas": 2}},
        "networkPolicy": {"apiServer": {"cidrs": ["10.0.0.1/32"]}},
        "job": {"numWorkers": 12},
    }
    done = release.put("install", values)
    assert done.code == 0, done.error
    for said in (
        "pod-security.kubernetes.io/enforce=privileged --overwrite",
        "cluster.num_workers=12 pretrain.stream.packs_per_step=12",
        "# helm test r -n team",  # Without a worker the doctor has nothing to examine.
    ):
        assert said in done.out


def test_helm_4_has_the_server_refuse_unknown_fields(release: Release, minimal: Any) -> None:
    """Helm 3 does not: there an operator too old for tokens loses them, and Ray must refuse."""
    assert release.put("install", minimal).code == 0
    writes = [line for line in release.api.requests if "rayclusters" in line and "GET" not in line]
    is_strict = ["fieldValidation=Strict" in line for line in writes]
    assert is_strict == ([True] if "PATCH" in writes[0] else [False])
    for group in ("headGroupSpec", "workerGroupSpecs"):
        spec = release.cluster["spec"][group]
        container = (spec if group == "headGroupSpec" else spec[0])["template"]["spec"][
            "containers"
        ][0]
        assert {"name": "RAY_AUTH_MODE", "value": "token"} in container["env"]


def test_an_object_that_the_server_refuses_ends_the_install(release: Release, minimal: Any) -> None:
    release.api.check = lambda d: ["spec.x: unknown"] if d["kind"] == "RayCluster" else []
    done = release.put("install", minimal)
    assert done.code != 0 and "spec.x: unknown" in done.error
    assert "failed" in release.helm("status", "r").out


@pytest.mark.parametrize(("status", "said"), [(403, "refused by the stub"), (500, "refused")])
def test_a_refusing_server_is_reported(
    status: int, said: str, release: Release, minimal: Any
) -> None:
    release.api.refusals[("POST", "networkpolicies")] = status
    release.api.refusals[("PATCH", "networkpolicies")] = status
    done = release.put("install", minimal)
    assert done.code != 0 and said in done.error


def test_an_object_of_somebody_else_is_not_taken_over(release: Release, minimal: Any) -> None:
    path = "/apis/ray.io/v1/namespaces/team/rayclusters/r-anycontrast"
    body = {"apiVersion": "ray.io/v1", "kind": "RayCluster", "spec": {"theirs": True}}
    release.api.store(path, {**body, "metadata": {"name": "r-anycontrast"}})
    done = release.put("install", minimal)
    assert done.code != 0 and "invalid ownership metadata" in done.error
    assert release.cluster["spec"] == {"theirs": True}


def test_a_cluster_without_kuberay_is_refused(
    tools: dict[str, Path], run: Callable[..., Any], minimal: Any, tmp_path: Path
) -> None:
    api = stub_api.StubApi(stub_api.CORE)
    with api.running(tmp_path) as config:
        done = Release(api, tools, run, config).put("install", minimal)
    assert done.code != 0
    assert "this cluster does not know ray.io/v1/RayCluster; install the KubeRay" in done.error
    assert api.objects == {}, "something was written before the refusal"


def test_the_autoscaled_number_survives_an_upgrade(release: Release, minimal: Any) -> None:
    values = {
        "image": minimal["image"],
        "autoscaling": {"enabled": True},
        "workerGroups": {"gpu": {"minReplicas": 0, "maxReplicas": 4}},
        "networkPolicy": {"apiServer": {"cidrs": ["10.0.0.1/32"]}},
    }
    assert release.put("install", values).code == 0
    sent = [line for line in release.api.requests if "rayclusters" in line]
    values["head"] = {"cpu": "6"}
    assert release.put("upgrade", values).code == 0
    assert len(sent) < len([line for line in release.api.requests if "rayclusters" in line])
    assert "replicas" not in release.cluster["spec"]["workerGroupSpecs"][0]


def test_a_release_of_helm_3_goes_on_with_helm_4(
    fetched: dict[int, dict[str, Path]], run: Any, minimal: Any, tmp_path: Path
) -> None:
    api = stub_api.StubApi(ALL_KINDS)
    with api.running(tmp_path) as config:
        assert Release(api, fetched[3], run, config).put("install", minimal).code == 0
        release = Release(api, fetched[4], run, config)
        values = {**minimal, "workerGroups": {"gpu": {"replicas": 3}}}
        upgraded = release.put("upgrade", values)
        assert upgraded.code == 0, upgraded.error
        assert release.replicas == 3
        assert release.helm("uninstall", "r", "--timeout", "20s").code == 0


def test_a_packaged_older_chart_upgrades(
    release: Release, minimal: Any, tools: dict[str, Path], run: Any, tmp_path: Path
) -> None:
    older = tmp_path / "older"
    shutil.copytree(CHART, older)
    text = (older / "Chart.yaml").read_text()
    (older / "Chart.yaml").write_text(text.replace("\nversion: 0.1.0", "\nversion: 0.0.9"))
    packed = run(tools["helm"], "package", older, "--destination", tmp_path)
    assert packed.code == 0, packed.error
    assert release.put("install", minimal, tmp_path / "anycontrast-0.0.9.tgz").code == 0
    template = release.cluster["spec"]["workerGroupSpecs"][0]["template"]
    upgraded = release.put("upgrade", minimal)
    assert upgraded.code == 0, upgraded.error
    assert release.cluster["metadata"]["labels"]["helm.sh/chart"] == "anycontrast-0.1.0"
    assert release.cluster["spec"]["workerGroupSpecs"][0]["template"] == template, (
        "an upgrade of the chart alone must not restart pods"
    )
