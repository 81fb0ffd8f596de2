"""The checks of the chart bite: each is shown something wrong and must say so."""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from infra.chart_tools import (
    helm_binaries,
    manifests,
    operator_rules,
    pod_policy,
    protobuf_secret,
    strict_schema,
    stub_api,
)

Change = Callable[[Any], None]


@pytest.fixture(scope="module")
def documents(render: Any, minimal: Any) -> list[dict[str, Any]]:
    rendered: list[dict[str, Any]] = render(minimal, {"mode": "clusterAndJob"}).documents
    return rendered


def cluster(documents: list[dict[str, Any]]) -> dict[str, Any]:
    return next(d for d in documents if d["kind"] == "RayCluster")


def changed(document: dict[str, Any], path: str, value: Any) -> dict[str, Any]:
    """A copy with one value set, by a dotted path with numbers for list items."""
    out = copy.deepcopy(document)
    at: Any = out
    *parents, last = path.split("/")
    for key in parents:
        at = at[int(key) if isinstance(at, list) else key]
    at[last] = value
    return out


WORKER = "spec/workerGroupSpecs/0"


@pytest.mark.parametrize(
    ("path", "value", "said"),
    [
        ("spec/headGroupSpec/templte", {}, "templte"),
        (f"{WORKER}/replicas", "two", "'two' is not of type 'integer'"),
        (f"{WORKER}/template/spec/containers/0/imagePullPolcy", "Always", "imagePullPolcy"),
    ],
)
def test_an_unknown_or_mistyped_field_of_a_custom_kind_is_found(
    path: str, value: Any, said: str, documents: Any, crds: Path
) -> None:
    assert strict_schema.faults(cluster(documents), crds) == []
    found = strict_schema.faults(changed(cluster(documents), path, value), crds)
    assert len(found) == 1 and said in found[0] and "RayCluster r-anycontrast" in found[0]


def test_an_unknown_field_of_a_core_kind_is_found(documents: Any, tmp_path: Path) -> None:
    policy = next(d for d in documents if d["kind"] == "NetworkPolicy")
    for version in strict_schema.KUBERNETES:
        assert strict_schema.faults(policy, tmp_path, version) == []
        assert strict_schema.faults(changed(policy, "spec/podSelektor", {}), tmp_path, version)
    gone = {"apiVersion": "policy/v1beta1", "kind": "PodDisruptionBudget", "metadata": {}}
    assert "no PodDisruptionBudget in policy/v1beta1" in strict_schema.faults(gone, tmp_path)[0]


@pytest.mark.parametrize(
    ("path", "value", "said"),
    [
        ("metadata/name", "a" * 54, "more than 53 characters"),
        ("metadata/name", "1st", "DNS-1035"),
        ("spec/rayVersion", "2.51.0", "2.52.0 or newer"),
        ("spec/networkPolicy", {"mode": "DenyAll"}, "networkPolicy needs a feature gate"),
        (f"{WORKER}/minReplicas", 9, "minReplicas is above maxReplicas"),
        (f"{WORKER}/replicas", 9, "replicas is outside"),
        (f"{WORKER}/rayStartParams", {"labels": "a=b"}, "labels do not go"),
        (f"{WORKER}/template/spec/containers", [{"volumeMounts": []}], ""),
        (
            f"{WORKER}/template/spec/containers/0/volumeMounts",
            [{"mountPath": "/dev/shm", "name": "mine"}],
            "KubeRay expects shared-mem",
        ),
    ],
)
def test_a_rule_of_the_operator_is_held(path: str, value: Any, said: str, documents: Any) -> None:
    assert operator_rules.violations(cluster(documents)) == []
    found = operator_rules.violations(changed(cluster(documents), path, value))
    assert (not said and found == []) or any(said in rule for rule in found)


def test_rules_for_jobs_and_the_autoscaler_are_held(documents: Any) -> None:
    job = next(d for d in documents if d["kind"] == "RayJob")
    assert operator_rules.violations(job) == []
    assert operator_rules.violations(changed(job, "spec/ttlSecondsAfterFinished", 5))
    assert operator_rules.violations(
        changed(job, "spec/rayClusterSpec", cluster(documents)["spec"])
    )
    scaled = changed(cluster(documents), "spec/enableInTreeAutoscaling", True)
    scaled["spec"]["autoscalerOptions"] = {"version": "v2"}
    assert operator_rules.violations(scaled) == []
    scaled["spec"]["headGroupSpec"]["template"]["spec"]["restartPolicy"] = "Always"
    assert any("restartPolicy" in rule for rule in operator_rules.violations(scaled))


def _container(change: Change) -> Change:
    return lambda template: change(template["spec"]["containers"][0])


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda t: t["spec"].update(hostNetwork=True), "hostNetwork"),
        (lambda t: t["spec"]["securityContext"].update(runAsUser=0), "root"),
        (lambda t: t["spec"]["securityContext"].pop("seccompProfile"), "seccomp"),
        (lambda t: t["spec"]["volumes"].append({"name": "h", "hostPath": {}}), "hostPath"),
        (lambda t: t["spec"]["volumes"].append({"name": "e", "emptyDir": {}}), "no size limit"),
        (lambda t: t["spec"].pop("automountServiceAccountToken"), "Kubernetes API"),
        (lambda t: t["spec"].pop("tolerations"), "no toleration for nvidia.com/gpu"),
        (_container(lambda c: c["securityContext"].pop("capabilities")), "drop all"),
        (_container(lambda c: c["securityContext"]["capabilities"].update(add=["IPC_LOCK"])),
         "adds capabilities"),
        (_container(lambda c: c["securityContext"].update(allowPrivilegeEscalation=True)),
         "gain privileges"),
        (_container(lambda c: c.update(image="a:latest")), "not pinned"),
        (_container(lambda c: c["resources"]["limits"].pop("memory")), "no limit of memory"),
        (_container(lambda c: c["env"].append({"name": "API_TOKEN", "value": "x"})), "clear text"),
        (_container(lambda c: c["ports"].append({"containerPort": 1, "hostPort": 1})), "port of"),
        (_container(lambda c: c["volumeMounts"].pop(0)), "no shared memory"),
    ],
)  # fmt: skip
def test_an_unsafe_pod_is_found(change: Change, said: str, documents: Any) -> None:
    document = copy.deepcopy(cluster(documents))
    change(document["spec"]["workerGroupSpecs"][0]["template"])
    pods = [pod for pod in manifests.pod_templates([document]) if pod.num_gpus]
    found = pod_policy.violations(pods[0])
    assert any(said in rule for rule in found), found


def test_a_port_without_a_policy_is_found(documents: Any) -> None:
    pods = list(manifests.pod_templates(documents))
    assert pod_policy.uncovered_ports(pods, documents) == []
    without = [d for d in documents if d["metadata"]["name"] != "r-anycontrast-cluster"]
    assert any("6379" in rule for rule in pod_policy.uncovered_ports(pods, without))
    none = [d for d in documents if d["kind"] != "NetworkPolicy"]
    assert any("all egress is allowed" in rule for rule in pod_policy.uncovered_ports(pods, none))
    policy = next(d for d in documents if d["metadata"]["name"] == "r-anycontrast-dashboard")
    opened = [
        *(d for d in documents if d is not policy),
        changed(policy, "spec/ingress/0/from", []),
    ]
    assert any("8265 is open" in rule for rule in pod_policy.uncovered_ports(pods, opened))


def test_a_binary_that_is_not_the_pinned_one_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def unpack(release: helm_binaries.Release, work: Path) -> None:
        (work / "binaries").mkdir()
        for name in release.sha256:
            (work / "binaries" / name).write_bytes(b"another")

    monkeypatch.setattr(helm_binaries, "_unpack", unpack)
    with pytest.raises(helm_binaries.HelmError, match=r"helm of .* has SHA-256"):
        helm_binaries.fetch(4, tmp_path)
    assert not (tmp_path / "v4.1.4" / "helm").exists()


def test_a_protobuf_secret_is_read() -> None:
    def field(number: int, content: bytes) -> bytes:
        return bytes([number << 3 | 2, len(content)]) + content

    metadata = field(1, b"s") + field(11, field(1, b"owner") + field(2, b"helm"))
    secret = field(1, metadata) + field(2, field(1, b"k") + field(2, b"v")) + field(3, b"Opaque")
    envelope = b"k8s\x00" + field(1, field(1, b"v1")) + field(2, secret)
    assert protobuf_secret.read_secret(envelope) == {
        "apiVersion": "v1", "kind": "Secret", "type": "Opaque", "data": {"k": "dg=="},
        "metadata": {"name": "s", "labels": {"owner": "helm"}},
    }  # fmt: skip
    with pytest.raises(ValueError, match="k8s"):
        protobuf_secret.read_secret(b"{}")


def test_a_merge_patch_removes_what_is_null() -> None:
    patched = stub_api.merge_patch({"a": {"b": 1, "c": 2}}, {"a": {"b": None}, "$patch": "x"})
    assert patched == {"a": {"c": 2}}
