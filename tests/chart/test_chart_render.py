"""The chart renders, and what it renders is valid, safe and what KubeRay accepts."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from infra.chart_tools import manifests, pod_policy, readme

import anycontrast
from anycontrast.training.config import load_config

CHART = Path(__file__).parents[2] / "infra" / "helm" / "anycontrast"
EXAMPLES = sorted((CHART / "examples").glob("*.yaml"))
FABRICS: dict[str, dict[str, Any]] = {
    "rdmaShared": {"rdma": {"resourceName": "rdma/hca"}},
    "sriov": {"rdma": {"resourceName": "nvidia.com/vf"}, "sriov": {"networks": "net/a,net/b"}},
    "hostNetwork": {
        "hostNetwork": {"nodeCidrs": ["10.1.0.0/16"]},
        "interface": "bond0",
        "rdma": {"resourceName": "rdma/hca", "hca": "mlx5", "gidIndex": 3},
    },
}


def level_of(path: Path) -> str:
    level: str = yaml.safe_load(path.read_text()).get("podSecurity", {}).get("level", "restricted")
    return level


def only(documents: list[dict[str, Any]], kind: str) -> dict[str, Any]:
    found = [d for d in documents if d["kind"] == kind]
    assert len(found) == 1, [d["metadata"]["name"] for d in found]
    return found[0]


def worker(documents: list[dict[str, Any]]) -> manifests.PodTemplate:
    return next(p for p in manifests.pod_templates(documents) if p.num_gpus)


def test_lint_finds_nothing(tools: dict[str, Path], run: Any) -> None:
    for values in (None, *EXAMPLES):
        extra = [] if values is None else ["--values", values]
        linted = run(tools["helm"], "lint", "--strict", CHART, *extra)
        assert linted.code == 0, linted.out + linted.error
        assert "[WARNING]" not in linted.out


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda path: str(path.stem))
def test_every_example_is_valid_safe_and_accepted(
    example: Path, render: Any, faults: Any, crds: Path
) -> None:
    documents = render(example).documents
    assert faults(documents, level_of(example)) == []
    pods = list(manifests.pod_templates(documents))
    assert any(pod.num_gpus for pod in pods)
    assert pod_policy.uncovered_ports(pods, documents) == []
    other = render(example, helm=3).documents
    assert sorted(map(str, other)) == sorted(map(str, documents)), "Helm 3 and 4 differ"


@pytest.mark.parametrize("mode", ["cluster", "job", "clusterAndJob"])
def test_each_mode_makes_what_it_says(mode: str, render: Any, faults: Any, minimal: Any) -> None:
    documents = render(minimal, {"mode": mode}).documents
    kinds = {d["kind"] for d in documents} & {"RayCluster", "RayJob"}
    assert kinds == {
        "cluster": {"RayCluster"}, "job": {"RayJob"}, "clusterAndJob": {"RayCluster", "RayJob"},
    }[mode]  # fmt: skip
    assert faults(documents, versions=("1.37",)) == []


def test_the_job_runs_the_recipe_on_all_gpus(render: Any, minimal: Any) -> None:
    arguments = ["root=/runs/a", "pretrain.epochs=3"]
    job: dict[str, Any] = {"mode": "job", "job": {"arguments": arguments}}
    spec = only(render(minimal, job).documents, "RayJob")["spec"]
    assert spec["entrypoint"] == (
        "python recipes/amae_pretrain.py recipes/configs/amae_base.yaml cluster.num_workers=16 "
        "pretrain.stream.packs_per_step=16 root=/runs/a pretrain.epochs=3"
    )
    root = CHART.parents[2]
    words = spec["entrypoint"].split()
    assert all((root / word).is_file() for word in words[1:3])
    assert load_config(root / words[2], words[3:]).pretrain.stream.packs_per_step == 16
    job["job"]["inlineConfig"] = {"pretrain": {"stream": {"packs_per_step": 32}}}
    inline = only(render({**minimal, **job}).documents, "RayJob")["spec"]["entrypoint"]
    assert "packs_per_step" not in inline


def test_the_recipe_is_told_where_the_cache_is(render: Any, minimal: Any) -> None:
    store = {"objectStore": {"enabled": True}, "cache": {"size": "100Gi"}}
    documents = render(minimal, {"mode": "job", "storage": store}).documents
    words = only(documents, "RayJob")["spec"]["entrypoint"].split()
    assert "store.cache.folder=/cache/shards" in words
    assert f"store.cache.max_bytes={100 * 2**30 * 9 // 10}" in words
    pod = worker(documents)
    assert {"name": "cache", "emptyDir": {"sizeLimit": "100Gi"}} in pod.spec["volumes"]
    limits = pod.containers[0]["resources"]["limits"]
    assert limits["ephemeral-storage"] == f"{200 * 1024}Mi", "an emptyDir counts as local disk"


def test_an_inline_config_reaches_the_head(render: Any, minimal: Any) -> None:
    config = {"name": "ours", "model": {"preset": "tiny"}}
    documents = render(minimal, {"mode": "job", "job": {"inlineConfig": config}}).documents
    job = only(documents, "RayJob")
    assert "recipes/amae_pretrain.py /etc/anycontrast/config.yaml" in job["spec"]["entrypoint"]
    maps = [d for d in documents if d["kind"] == "ConfigMap"]
    assert yaml.safe_load(maps[0]["data"]["config.yaml"]) == config
    head = next(p for p in manifests.pod_templates(documents) if p.where.endswith("head"))
    assert {"name": "job-config", "configMap": {"name": maps[0]["metadata"]["name"]}} in (
        head.spec["volumes"]
    )


@pytest.mark.parametrize("fabric", FABRICS)
def test_a_fabric_sets_everything_together(
    fabric: str, render: Any, faults: Any, minimal: Any
) -> None:
    network = {"fabric": fabric, **FABRICS[fabric]}
    values = {"network": network, "podSecurity": {"level": "privileged"}}
    documents = render(minimal, values).documents
    assert faults(documents, "privileged", versions=("1.37",)) == []
    pod = worker(documents)
    container = pod.containers[0]
    env = {variable["name"]: variable.get("value") for variable in container["env"]}
    assert (env["NCCL_NET"], env["NCCL_IB_DISABLE"]) == ("IB", "0")
    assert env.get("NCCL_IB_HCA") == network["rdma"].get("hca")
    assert env.get("NCCL_IB_GID_INDEX") == ("3" if fabric == "hostNetwork" else None)
    interface = network.get("interface", "eth0")
    assert env["NCCL_SOCKET_IFNAME"] == env["GLOO_SOCKET_IFNAME"] == interface
    assert container["securityContext"]["capabilities"] == {"add": ["IPC_LOCK"], "drop": ["ALL"]}
    assert container["resources"]["limits"][network["rdma"]["resourceName"]] == "1"
    assert pod.spec.get("hostNetwork", False) is (fabric == "hostNetwork")
    networks = pod.metadata.get("annotations", {}).get("k8s.v1.cni.cncf.io/networks")
    assert networks == network.get("sriov", {}).get("networks")
    if fabric == "hostNetwork":
        policies = {d["metadata"]["name"]: d["spec"] for d in documents if "spec" in d}
        callers = policies["r-anycontrast-cluster"]["ingress"][0]["from"]
        assert {"ipBlock": {"cidr": "10.1.0.0/16"}} in callers


@pytest.mark.parametrize("network", [{}, {**FABRICS["hostNetwork"], "rdma": {}}])
def test_tcp_is_named_too_and_needs_no_capability(
    network: dict[str, Any], render: Any, minimal: Any
) -> None:
    values: dict[str, Any] = {}
    if network:
        fabric = {**network, "fabric": "hostNetwork"}
        values = {"network": fabric, "podSecurity": {"level": "privileged"}}
    container = worker(render(minimal, values).documents).containers[0]
    env = {variable["name"]: variable.get("value") for variable in container["env"]}
    assert (env["NCCL_NET"], env["NCCL_IB_DISABLE"]) == ("Socket", "1")
    assert container["securityContext"]["capabilities"] == {"drop": ["ALL"]}


@pytest.mark.parametrize(
    ("gang", "labels", "scheduler"),
    [
        ("kueue", {"kueue.x-k8s.io/queue-name": "q"}, None),
        ("volcano", {"volcano.sh/queue-name": "q"}, "volcano"),
        ("yunikorn", {"yunikorn.apache.org/queue": "q", "ray.io/gang-scheduling-enabled": "true"},
         "yunikorn"),
        ("kai", {"kai.scheduler/queue": "q"}, "kai-scheduler"),
    ],
)  # fmt: skip
def test_a_gang_scheduler_gets_its_labels(
    gang: str, labels: dict[str, str], scheduler: str | None, render: Any, minimal: Any
) -> None:
    for mode, kind in (("cluster", "RayCluster"), ("job", "RayJob")):
        values = {"mode": mode, "scheduling": {"gang": gang, "queue": "q"}}
        documents = render(minimal, values).documents
        assert labels.items() <= only(documents, kind)["metadata"]["labels"].items()
        for pod in manifests.pod_templates(documents):
            if not pod.where.endswith(("submitter", "doctor")):
                assert pod.spec.get("schedulerName") == scheduler


def test_the_autoscaler_owns_the_number_of_workers(render: Any, faults: Any, minimal: Any) -> None:
    values = {
        "image": minimal["image"],
        "autoscaling": {"enabled": True},
        "workerGroups": {"gpu": {"minReplicas": 0, "maxReplicas": 3}},
        "networkPolicy": {"apiServer": {"cidrs": ["10.0.0.1/32"]}},
    }
    documents = render(values).documents
    assert faults(documents, versions=("1.37",)) == []
    spec = only(documents, "RayCluster")["spec"]
    group = spec["workerGroupSpecs"][0]
    assert "replicas" not in group and (group["minReplicas"], group["maxReplicas"]) == (0, 3)
    assert spec["autoscalerOptions"]["version"] == "v2"
    head = spec["headGroupSpec"]["template"]["spec"]
    volumes = {volume["name"] for volume in head["volumes"]}
    mounts = spec["autoscalerOptions"]["volumeMounts"]
    assert [m["mountPath"] for m in mounts] == ["/tmp"]
    assert {m["name"] for m in mounts} <= volumes, "its root is read-only too"
    security = spec["autoscalerOptions"]["securityContext"]
    assert (
        security
        == spec["workerGroupSpecs"][0]["template"]["spec"]["containers"][0]["securityContext"]
    )
    open_one = only(render(values, {"auth": {"mode": "disabled"}}).documents, "RayCluster")["spec"]
    env = open_one["autoscalerOptions"]["env"]
    assert env == [{"name": "RAY_AUTH_MODE", "value": "disabled"}], "the image says token"
    assert spec["headGroupSpec"]["template"]["spec"]["automountServiceAccountToken"] is True


def test_rays_objects_stay_in_shared_memory(render: Any, minimal: Any) -> None:
    spec = only(render(minimal).documents, "RayCluster")["spec"]
    assert spec["headGroupSpec"]["rayStartParams"]["object-store-memory"] == str(3 * 2**30)
    params = spec["workerGroupSpecs"][0]["rayStartParams"]
    assert params == {"object-store-memory": str(48 * 2**30)}


def test_a_worker_drains_before_it_ends(render: Any, minimal: Any) -> None:
    pod = worker(render(minimal, {"drain": {"deadlineSeconds": 25, "marginSeconds": 5}}).documents)
    script = pod.containers[0]["lifecycle"]["preStop"]["exec"]["command"][-1]
    assert "ray drain-node" in script and "--deadline-remaining-seconds 25" in script
    assert pod.spec["terminationGracePeriodSeconds"] == 30
    without = worker(render(minimal, {"drain": {"enabled": False}}).documents)
    assert "lifecycle" not in without.containers[0]


def test_running_pods_are_replaced_only_on_demand(render: Any, faults: Any, minimal: Any) -> None:
    spec = only(render(minimal).documents, "RayCluster")["spec"]
    assert "upgradeStrategy" not in spec
    documents = render(minimal, {"upgrade": {"strategy": "Recreate"}}).documents
    assert only(documents, "RayCluster")["spec"]["upgradeStrategy"] == {"type": "Recreate"}
    job = render(minimal, {"mode": "job", "upgrade": {"strategy": "Recreate"}}).documents
    assert faults(documents + job, versions=("1.37",)) == []


def test_only_named_callers_reach_the_dashboard(render: Any, minimal: Any) -> None:
    values = {"networkPolicy": {"dashboardNamespaces": ["jupyter"], "operatorNamespace": "ops"}}
    documents = render(minimal, values).documents
    head = next(p for p in manifests.pod_templates(documents) if p.where.endswith("head"))
    callers = []
    for policy in (d["spec"] for d in documents if d["kind"] == "NetworkPolicy"):
        if pod_policy.selects(policy["podSelector"], head.labels):
            for rule in policy.get("ingress", []):
                if any(port["port"] == 8265 for port in rule.get("ports", [])):
                    callers += rule["from"]
    names = [
        caller.get("namespaceSelector", {})
        .get("matchLabels", {})
        .get("kubernetes.io/metadata.name")
        for caller in callers
    ]
    assert names == [None, "ops", "jupyter"]  # None: the release's own submitter.


def test_without_an_object_store_pods_reach_nothing_outside(render: Any, minimal: Any) -> None:
    def blocks(*values: Any) -> list[str]:
        text = yaml.safe_dump(
            [d for d in render(*values).documents if d["kind"] == "NetworkPolicy"]
        )
        return [line.split()[-1] for line in text.splitlines() if "cidr:" in line]

    assert blocks(minimal) == []
    store = {"storage": {"objectStore": {"enabled": True}}}
    assert blocks(minimal, store) == ["0.0.0.0/0"]


def test_credentials_come_from_the_secret_and_are_never_written(render: Any, minimal: Any) -> None:
    for provider, variable in (("s3", "AWS_SECRET_ACCESS_KEY"), ("gcs", None)):
        store = {"enabled": True, "provider": provider, "credentials": "existingSecret"}
        values = {"storage": {"objectStore": {**store, "existingSecret": {"name": "keys"}}}}
        pod = worker(render(minimal, values).documents)
        env = {entry["name"]: entry for entry in pod.containers[0]["env"]}
        if variable:
            assert env[variable]["valueFrom"]["secretKeyRef"]["name"] == "keys"
        else:
            path = env["GOOGLE_APPLICATION_CREDENTIALS"]["value"]
            mounts = [m["mountPath"] for m in pod.containers[0]["volumeMounts"]]
            assert path.rpartition("/")[0] in mounts


def test_alerts_and_dashboards_are_the_generated_files(render: Any, minimal: Any) -> None:
    values = {"monitoring": {"enabled": True, "alerts": {"labels": {"release": "prom"}}}}
    documents = render(minimal, values).documents
    rule = only(documents, "PrometheusRule")
    assert rule["spec"] == yaml.safe_load((CHART / "files" / "alerts.yaml").read_text())
    assert rule["metadata"]["labels"]["release"] == "prom"
    files = sorted((CHART / "files" / "dashboards").glob("*.json"))
    maps = {name: d for d in documents if d["kind"] == "ConfigMap" for name in d["data"]}
    assert set(maps) == {file.name for file in files} and files
    for file in files:
        found = maps[file.name]
        assert json.loads(found["data"][file.name]) == json.loads(file.read_text())
        assert found["metadata"]["labels"]["grafana_dashboard"] == "1"
    assert not any(d["kind"] in ("PrometheusRule", "PodMonitor") for d in render(minimal).documents)


def test_monitors_name_ports_that_the_pods_have(render: Any, minimal: Any) -> None:
    documents = render(minimal, {"monitoring": {"enabled": True}}).documents
    pods = list(manifests.pod_templates(documents))
    for monitor in (d["spec"] for d in documents if d["kind"] == "PodMonitor"):
        chosen = [pod for pod in pods if pod_policy.selects(monitor["selector"], pod.labels)]
        assert len(chosen) == 1
        names = {port["name"] for port in chosen[0].containers[0]["ports"]}
        assert {endpoint["port"] for endpoint in monitor["podMetricsEndpoints"]} <= names


def test_the_budget_and_the_services_choose_the_head_alone(render: Any, minimal: Any) -> None:
    values = {"exposure": {"kind": "ingress", "ingress": {"host": "a.example", "tlsSecret": "t"}}}
    documents = render(minimal, values).documents
    pods = list(manifests.pod_templates(documents))
    budget = only(documents, "PodDisruptionBudget")["spec"]
    service = only(documents, "Service")["spec"]
    for selector in (budget["selector"], {"matchLabels": service["selector"]}):
        chosen = [pod.where for pod in pods if pod_policy.selects(selector, pod.labels)]
        assert chosen == ["RayCluster r-anycontrast head"]
    assert budget["minAvailable"] == 1
    assert [port["port"] for port in service["ports"]] == [8265]


def test_groups_keep_their_own_settings(render: Any, minimal: Any) -> None:
    groups = {
        "a": {"replicas": 1, "gpus": {"product": "H100"}, "runtimeClassName": "nvidia"},
        "b": {"replicas": 2, "gpus": {"count": 4, "resourceName": "amd.com/gpu"},
              "topologySpreadConstraints": [
                  {"maxSkew": 1, "topologyKey": "zone", "whenUnsatisfiable": "DoNotSchedule"}]},
    }  # fmt: skip
    documents = render({**minimal, "workerGroups": groups}).documents
    found = {g["groupName"]: g for g in only(documents, "RayCluster")["spec"]["workerGroupSpecs"]}
    first, second = (found[name]["template"]["spec"] for name in ("a", "b"))
    assert first["nodeSelector"] == {"nvidia.com/gpu.product": "H100"}
    assert first["runtimeClassName"] == "nvidia" and "nodeSelector" not in second
    assert second["containers"][0]["resources"]["limits"]["amd.com/gpu"] == "4"
    assert second["tolerations"][0]["key"] == "amd.com/gpu"
    selector = second["topologySpreadConstraints"][0]["labelSelector"]
    assert selector["matchLabels"]["anycontrast/group"] == "b"


def test_logs_are_shipped_from_the_folder_that_ray_writes(
    render: Any, faults: Any, minimal: Any
) -> None:
    digest = minimal["image"]["digest"]
    values = {"logs": {"sidecar": True, "image": {"digest": digest}}}
    documents = render(minimal, values).documents
    assert faults(documents, versions=("1.37",)) == []
    for pod in manifests.pod_templates(documents):
        if pod.where.startswith("RayCluster"):
            mounts = [
                {m["name"] for m in c["volumeMounts"] if m["mountPath"] == "/tmp/ray"}
                for c in pod.containers
            ]
            assert mounts == [{"ray-logs"}, {"ray-logs"}]
    (config,) = [d for d in documents if d["kind"] == "ConfigMap"]
    pipeline = yaml.safe_load(config["data"]["fluent-bit.yaml"])["pipeline"]
    assert pipeline["inputs"][0]["path"].startswith("/tmp/ray/session_latest/logs/")
    assert pipeline["outputs"][0]["name"] == "stdout"


def test_people_get_the_roles_they_are_given(render: Any, minimal: Any) -> None:
    people = {"submitters": [{"kind": "Group", "name": "team"}],
              "viewers": [{"kind": "ServiceAccount", "name": "bot"}]}  # fmt: skip
    documents = render(minimal, {"rbac": people}).documents
    roles = {d["metadata"]["name"]: d["rules"] for d in documents if d["kind"] == "Role"}
    secrets = [r for rules in roles.values() for r in rules if "secrets" in r["resources"]]
    assert [rule["resourceNames"] for rule in secrets] == [["r-anycontrast"]]
    assert all("*" not in r["verbs"] + r["resources"] for rules in roles.values() for r in rules)
    bound = {
        d["roleRef"]["name"]: d["subjects"][0] for d in documents if d["kind"] == "RoleBinding"
    }
    assert bound["r-anycontrast-viewer"]["namespace"] == "team"
    assert bound["r-anycontrast-submitter"]["name"] == "team"


def test_the_readme_is_current() -> None:
    assert (CHART / "README.md").read_text() == readme.rendered(CHART)


def test_a_value_without_a_comment_is_found() -> None:
    with pytest.raises(ValueError, match=r"yaml:4: c\.d has no comment"):
        readme.documented("# -- one\na: 1\nc: {d: 2}\n".replace("{d: 2}", "\n  d: 2"))


def test_the_chart_agrees_with_the_package_and_the_image(render: Any, minimal: Any) -> None:
    root = CHART.parents[2]
    chart = yaml.safe_load((CHART / "Chart.yaml").read_text())
    assert chart["appVersion"] == anycontrast.__version__
    image = (root / "infra" / "docker" / "Dockerfile").read_text()
    (ray_version,) = set(re.findall(r"^ARG RAY_VERSION=(\S+)$", image, flags=re.MULTILINE))
    assert yaml.safe_load((CHART / "values.yaml").read_text())["ray"]["version"] == ray_version
    assert f"ray=={ray_version}" in (root / "constraints.txt").read_text().splitlines()
    (writable,) = re.findall(r'anycontrast.writable="([^"]+)"', image)
    for pod in manifests.pod_templates(render(minimal).documents):
        if pod.where.startswith("RayCluster"):
            mounts = {mount["mountPath"] for mount in pod.containers[0]["volumeMounts"]}
            assert set(writable.split()) <= mounts, "a read-only image needs these"
        for container in pod.containers:
            assert container["securityContext"]["readOnlyRootFilesystem"] is True


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda path: str(path.stem))
def test_the_recipe_accepts_what_the_chart_tells_it(
    example: Path, render: Any, tmp_path: Path
) -> None:
    documents = render(example, {"checkPrerequisites": False}).documents
    assert any(d["kind"] in ("Pod", "RayJob") for d in documents)
    for doctor in (d["spec"]["containers"][0]["args"] for d in documents if d["kind"] == "Pod"):
        loaded = load_config(None, doctor[doctor.index("doctor") + 1 :])
        assert loaded.cluster.num_workers >= 1
    for job in (d["spec"] for d in documents if d["kind"] == "RayJob"):
        config, *settings = job["entrypoint"].split()[2:]
        path = CHART.parents[2] / config
        if config == "/etc/anycontrast/config.yaml":
            path = tmp_path / "config.yaml"
            maps = [d["data"] for d in documents if d["kind"] == "ConfigMap"]
            (inline,) = [data["config.yaml"] for data in maps if "config.yaml" in data]
            path.write_text(inline)
        assert load_config(path, settings).cluster.num_workers > 1
