"""Bad values are refused when the chart is rendered: the value's name and the fix are said."""

import json
from pathlib import Path
from typing import Any

import jsonschema  # type: ignore[import-untyped]
import pytest
import yaml
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from infra.chart_tools import random_values

CHART = Path(__file__).parents[2] / "infra" / "helm" / "anycontrast"
SCHEMA = json.loads((CHART / "values.schema.json").read_text())
DEFAULTS = yaml.safe_load((CHART / "values.yaml").read_text())
GPU = {"image": {"digest": "sha256:" + "0123456789abcdef" * 4}}

# Values, the name that must be said, and a part of the fix.
CONTRADICTIONS: dict[str, tuple[dict[str, Any], str, str]] = {
    "no image digest": ({"image": {"digest": ""}}, "image.digest", "image.requireDigest=false"),
    "tag latest": ({"image": {"tag": "latest"}}, "image.tag", "set the tag of a release"),
    "old Ray": ({"ray": {"version": "2.52.0"}}, "ray.version", "label anycontrast.ray"),
    "new Ray": ({"ray": {"version": "3.0.0"}}, "ray.version", "below 3"),
    "no GPU": (
        {"workerGroups": {"gpu": {"gpus": {"count": 0}}}},
        "workerGroups.gpu.gpus.count: 0",
        "set it to the GPUs of one node",
    ),
    "no replicas": ({"workerGroups": {"b": {}}}, "workerGroups.b.replicas", "number of pods"),
    "zero replicas": (
        {"workerGroups": {"gpu": {"replicas": 0}}}, "workerGroups.gpu.replicas", "at least 1",
    ),
    "autoscaler with fixed replicas": (
        {"autoscaling": {"enabled": True}},
        "workerGroups.gpu.replicas",
        "set minReplicas and maxReplicas",
    ),
    "autoscaler that cannot reach the API": (
        {"autoscaling": {"enabled": True}}, "networkPolicy.apiServer.cidrs", "address of the API",
    ),
    "limits without autoscaler": (
        {"workerGroups": {"gpu": {"maxReplicas": 4}}},
        "workerGroups.gpu.maxReplicas",
        "autoscaling.enabled=true",
    ),
    "too much shared memory": (
        {"workerGroups": {"gpu": {"sharedMemory": "200Gi"}}},
        "workerGroups.gpu.sharedMemory",
        "make it smaller",
    ),
    "public without token": (
        {"auth": {"mode": "disabled"}, "exposure": {"kind": "ingress"}},
        "auth.mode",
        "set auth.mode=token",
    ),
    "ingress without TLS": (
        {"exposure": {"kind": "ingress", "ingress": {"host": "ray.example.org"}}},
        "exposure.ingress.tlsSecret",
        "name the Secret with the certificate",
    ),
    "load balancer without TLS": (
        {"exposure": {"kind": "loadBalancer"}},
        "exposure.loadBalancer.terminatesTls",
        "terminatesTls=true",
    ),
    "load balancer for the whole world": (
        {"exposure": {"kind": "loadBalancer"}},
        "exposure.loadBalancer.sourceRanges",
        "address ranges of your people",
    ),
    "RDMA in a restricted namespace": (
        {"network": {"fabric": "rdmaShared", "rdma": {"resourceName": "rdma/a"}}},
        "podSecurity.level",
        "pod-security.kubernetes.io/enforce=privileged",
    ),
    "RDMA without a resource": (
        {"network": {"fabric": "sriov"}, "podSecurity": {"level": "privileged"}},
        "network.rdma.resourceName",
        "kubectl describe node",
    ),
    "SR-IOV without networks": (
        {"network": {"fabric": "sriov"}}, "network.sriov.networks", "NAMESPACE/NAME",
    ),
    "the node's network without its addresses": (
        {"network": {"fabric": "hostNetwork"}}, "network.hostNetwork.nodeCidrs", "nodes",
    ),
    "a gang without a queue": (
        {"scheduling": {"gang": "volcano"}}, "scheduling.queue", "name of the queue",
    ),
    "a queue without a gang": (
        {"scheduling": {"queue": "q"}}, "scheduling.queue", "choose a gang scheduler",
    ),
    "Kueue with the autoscaler": (
        {"scheduling": {"gang": "kueue", "queue": "q"}, "autoscaling": {"enabled": True}},
        "autoscaling.enabled",
        "autoscaling.enabled=false",
    ),
    "keys without a Secret": (
        {"storage": {"objectStore": {"enabled": True, "credentials": "existingSecret"}}},
        "storage.objectStore.existingSecret.name",
        "credentials=serviceAccount",
    ),
    "a store that no rule lets through": (
        {"storage": {"objectStore": {"enabled": True}},
         "networkPolicy": {"objectStore": {"cidrs": []}}},
        "networkPolicy.objectStore.cidrs",
        "the namespaces it runs in",
    ),
    "an endpoint that is not used": (
        {"storage": {"objectStore": {"provider": "gcs", "endpoint": "https://a.example"}}},
        "storage.objectStore.endpoint",
        "set provider=s3",
    ),
    "a dataset from nowhere": (
        {"storage": {"datasets": [{"name": "a", "mountPath": "/data"}]}},
        "storage.datasets[0]",
        "set exactly one",
    ),
    "NFS in a restricted namespace": (
        {"storage": {"datasets": [
            {"name": "a", "mountPath": "/data", "nfs": {"server": "s", "path": "/e"}}]}},
        "storage.datasets[0].nfs",
        "set claimName",
    ),
    "two things at one path": (
        {"storage": {"datasets": [{"name": "a", "mountPath": "/runs", "claimName": "c"}]}},
        "storage.datasets[0].mountPath",
        "choose another path",
    ),
    "a long name": ({"fullnameOverride": "a" * 36}, "fullnameOverride", "use a shorter"),
    "a name that is no label": ({"fullnameOverride": "1st"}, "fullnameOverride", "begins with a"),
    "a job without a shared folder": (
        {"mode": "job", "storage": {"runs": {"enabled": False}}},
        "storage.runs.enabled",
        "set it to true",
    ),
    "packs that cannot be dealt out": (
        {"mode": "job", "job": {"arguments": ["pretrain.stream.packs_per_step=24"]}},
        "job.arguments: pretrain.stream.packs_per_step=24 is no multiple of the 16",
        "set it to 16",
    ),
    "packs of an inline configuration": (
        {"mode": "job",
         "job": {"inlineConfig": {"pretrain": {"stream": {"packs_per_step": 24}}}}},
        "job.arguments: pretrain.stream.packs_per_step=24 is no multiple of the 16",
        "set it to 16",
    ),
    "a log shipper without a digest": (
        {"logs": {"sidecar": True}}, "logs.image.digest", "logs.sidecar=false",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", CONTRADICTIONS)
def test_a_contradiction_is_refused_with_value_and_fix(
    case: str, render: Any, minimal: Any
) -> None:
    values, name, fix = CONTRADICTIONS[case]
    done = render(minimal, values)
    assert done.code != 0 and "cannot be installed like this" in done.error
    lines = [line for line in done.error.splitlines() if line.startswith("  - ")]
    said = [line for line in lines if line.startswith(f"  - {name}")]
    assert len(said) == 1, done.error
    assert fix in said[0]


def test_all_contradictions_are_said_at_once(render: Any) -> None:
    done = render({"scheduling": {"gang": "kai"}})
    lines = [line.split(":")[0] for line in done.error.splitlines() if line.startswith("  - ")]
    assert lines == ["  - image.digest", "  - workerGroups", "  - scheduling.queue"]


@pytest.mark.parametrize(
    ("values", "missing", "name"),
    [
        ({}, "ray.io/v1/RayCluster", "mode=cluster"),
        ({"mode": "job"}, "ray.io/v1/RayJob", "mode=job"),
        ({"monitoring": {"enabled": True}}, "monitoring.coreos.com/v1/PodMonitor",
         "monitoring.enabled=true"),
        ({"monitoring": {"enabled": True}}, "monitoring.coreos.com/v1/PrometheusRule",
         "monitoring.alerts.enabled=true"),
        ({"scheduling": {"gang": "kueue", "queue": "q"}}, "kueue.x-k8s.io/v1beta2/LocalQueue",
         "scheduling.gang=kueue"),
        ({"scheduling": {"gang": "volcano", "queue": "q"}},
         "scheduling.volcano.sh/v1beta1/PodGroup", "scheduling.gang=volcano"),
        ({"scheduling": {"gang": "kai", "queue": "q"}}, "scheduling.run.ai/v2/Queue",
         "scheduling.gang=kai"),
    ],
)  # fmt: skip
def test_a_missing_kind_is_refused(
    values: Any, missing: str, name: str, render: Any, minimal: Any, all_apis: tuple[str, ...]
) -> None:
    done = render(minimal, values, apis=tuple(api for api in all_apis if api != missing))
    assert done.code != 0
    assert f"{name}: this cluster does not know {missing}; install the" in done.error
    assert render(minimal, values, {"checkPrerequisites": False}, apis=()).code == 0


def test_an_old_kubernetes_is_refused(render: Any, minimal: Any) -> None:
    done = render(minimal, kubernetes="1.29.9")
    assert (
        "Kubernetes v1.29.9 is too old: 1.30 or newer is needed; upgrade the cluster" in done.error
    )
    assert render(minimal, kubernetes="1.30.0-gke.100").code == 0


@pytest.mark.parametrize("helm", [4, 3])
def test_a_misspelt_value_is_named_by_helm(helm: int, render: Any, minimal: Any) -> None:
    done = render(minimal, {"head": {"memroy": "8Gi"}}, helm=helm)
    assert done.code != 0
    assert "head" in done.error and "memroy" in done.error and "not allowed" in done.error


def valid(values: Any) -> bool:
    return bool(jsonschema.Draft202012Validator(SCHEMA).is_valid(values))


@pytest.mark.parametrize(
    ("name", "is_known"),
    [
        ("nvidia.com/gpu", True),
        ("amd.com/gpu", True),
        ("nvidia.com/mig-3g.40gb", True),
        # Pods would get one, and Ray would not be told.
        ("nvidia.com/gpu.shared", False),
        ("aws.amazon.com/neuron", False),
    ],
)
def test_only_gpus_that_ray_is_told_of_are_accepted(name: str, is_known: bool) -> None:
    group = {"gpu": {"replicas": 1, "gpus": {"resourceName": name}}}
    assert valid({**DEFAULTS, "workerGroups": group}) is is_known


def mappings(values: Any, path: tuple[str, ...] = ()) -> list[tuple[str, ...]]:
    """Paths of all mappings that name their members."""
    if not isinstance(values, dict) or not values:
        return []
    return [path, *(p for key in values for p in mappings(values[key], (*path, key)))]


def test_the_schema_accepts_the_defaults_and_knows_no_other_value() -> None:
    jsonschema.Draft202012Validator.check_schema(SCHEMA)
    assert valid(DEFAULTS)
    known = {path for path in random_values.leaves(SCHEMA) if path != "global"}

    def paths(values: Any, prefix: str = "") -> set[str]:
        if prefix in known or not isinstance(values, dict) or not values:
            return {prefix}
        return {p for key in values for p in paths(values[key], f"{prefix}.{key}".lstrip("."))}

    listed = paths(DEFAULTS)
    free = tuple(f"{path}." for path in listed - known)  # Empty mappings whose members are named.
    assert {path for path in known - listed if not path.startswith(free)} == set()
    assert free == tuple(p for p in free if any(path.startswith(p) for path in known))


def test_every_misspelt_key_is_refused() -> None:
    free = {("networkPolicy", "dns", "podLabels"), ("monitoring", "dashboards", "labels")}
    for path in mappings(DEFAULTS):
        values = json.loads(json.dumps(DEFAULTS))
        at = values
        for key in path:
            at = at[key]
        if path in free:
            continue
        at["mispelt"] = 1
        assert not valid(values), f"{'.'.join(path)}.mispelt is accepted"


def test_a_value_taken_away_is_refused() -> None:
    """`head: null` in a values file removes the key; templates must not meet a hole."""
    free = {("networkPolicy", "dns", "podLabels"), ("monitoring", "dashboards", "labels")}
    for path in mappings(DEFAULTS):
        values = json.loads(json.dumps(DEFAULTS))
        at = values
        for key in path:
            at = at[key]
        for key in list(at) if path not in free else ():
            value = at.pop(key)
            assert not valid(values), f"{'.'.join(path)}.{key} may be missing"
            at[key] = value


BASES = [
    {"image": GPU["image"], "workerGroups": {"gpu": {"replicas": 2}}},
    *(yaml.safe_load(p.read_text()) for p in sorted((CHART / "examples").glob("*.yaml"))),
]


@pytest.mark.parametrize("gang", ["none", "kueue", "volcano", "yunikorn", "kai"])
def test_text_that_looks_like_something_else_stays_text(
    gang: str, render: Any, faults: Any, crds: Path
) -> None:
    """Every text at once is `true`, or a number where that fits the value."""
    values: Any = {}
    for path, text in random_values.mistakable(SCHEMA).items():
        random_values.put(values, path, text)
    for path, value in {
        "mode": "clusterAndJob" if gang == "none" else "job",
        "scheduling.gang": gang,
        "image.requireDigest": False,
        "workerGroups": {"true": {"replicas": 1, "labels": {"a": "1e3"}}},
        "network": {"fabric": "sriov", "interface": "123", "rdma": {"resourceName": "a/b"},
                    "sriov": {"networks": "123"}},
        "podSecurity.level": "privileged",
        "storage.objectStore.enabled": True,
        "storage.objectStore.credentials": "existingSecret",
        "storage.datasets": [{"name": "true", "mountPath": "/d", "claimName": "123"}],
        "exposure.kind": "ingress",
        "exposure.annotations": {"a": "true"},
        "monitoring.enabled": True,
        "pods.env": [{"name": "A", "value": "1e3"}],
        "rbac.submitters": [{"kind": "User", "name": "true"}],
        "fullnameOverride": "true",
    }.items():  # fmt: skip
        random_values.put(values, path, value)
    if gang == "none":
        values["scheduling"] = {}
    if gang in ("none", "yunikorn", "kai"):
        values["scheduling"].pop("priorityClass", None)
    done = render(values)
    assert done.code == 0, done.error
    found = faults(done.documents, "privileged", versions=("1.37",))
    assert [fault for fault in found if "not pinned" not in fault] == []


# No shrinking: each try is a run of helm, and what was drawn is small.
FUZZ = settings(
    deadline=None,
    phases=[Phase.generate],
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
)


def accepted_values_render_or_are_refused(base: Any, drawn: Any, render: Any, faults: Any) -> None:
    done = render(base, drawn)
    if done.code:
        assert "cannot be installed like this" in done.error, (drawn, done.error)
        return
    level = drawn.get("podSecurity", {}).get("level") or base.get("podSecurity", {}).get("level")
    assert faults(done.documents, level or "restricted", versions=("1.37",)) == [], drawn


@settings(FUZZ, max_examples=12, derandomize=True)
@given(base=st.sampled_from(BASES), drawn=random_values.changes(SCHEMA))
def test_values_that_the_schema_accepts_render_valid_objects_or_are_refused(
    base: Any, drawn: Any, render: Any, faults: Any, crds: Path
) -> None:
    accepted_values_render_or_are_refused(base, drawn, render, faults)


@pytest.mark.slow
@settings(FUZZ, max_examples=50)
@given(base=st.sampled_from(BASES), drawn=random_values.changes(SCHEMA, most=10))
def test_many_values_that_the_schema_accepts(
    base: Any, drawn: Any, render: Any, faults: Any, crds: Path
) -> None:
    accepted_values_render_or_are_refused(base, drawn, render, faults)
