"""What KubeRay's operator refuses or silently changes after the API server has accepted it.

The rules are those of the operator's own validation of RayCluster and RayJob; the API server does
not know them, so a chart that breaks one installs and then never starts.

Source: ray-project/kuberay v1.7, ray-operator/controllers/ray/utils/validation.go, and pod.go of
the same folder for names of volumes.
"""

import re

from infra.chart_tools.manifests import Object, cluster_specs

MAX_CLUSTER_NAME = 53
MAX_JOB_NAME = 47
GATED = ("networkPolicy", "tlsOptions", "historyServerOptions", "managedBy")
DNS_1035 = re.compile(r"[a-z]([-a-z0-9]*[a-z0-9])?")


def violations(document: Object) -> list[str]:
    """Rules that a RayCluster or RayJob breaks; nothing for other kinds."""
    found: list[str] = []
    if document["kind"] in ("RayCluster", "RayJob"):
        found += _name(document)
    for spec in cluster_specs(document):
        found += _cluster(spec) + _groups(spec)
    if document["kind"] == "RayJob":
        found += _job(document["spec"])
    name = f"{document['kind']} {document['metadata']['name']}"
    return [f"{name}: {rule}" for rule in found]


def _name(document: Object) -> list[str]:
    name = document["metadata"]["name"]
    limit = MAX_CLUSTER_NAME if document["kind"] == "RayCluster" else MAX_JOB_NAME
    found = [f"the name has more than {limit} characters"] if len(name) > limit else []
    return found + ([] if DNS_1035.fullmatch(name) else ["the name is no DNS-1035 label"])


def _version(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in text.split("."))


def _cluster(spec: Object) -> list[str]:
    found = [f"{field} needs a feature gate of the operator" for field in GATED if field in spec]
    head = spec["headGroupSpec"]["template"]["spec"]
    env = {variable["name"] for variable in head["containers"][0].get("env", [])}
    if spec.get("authOptions", {}).get("mode") == "token" and (
        _version(spec.get("rayVersion", "0")) < (2, 52, 0)
    ):
        found.append("token authentication needs rayVersion 2.52.0 or newer")
    if env & {"RAY_REDIS_ADDRESS", "REDIS_PASSWORD", "REDIS_USERNAME"}:
        found.append("Redis is set by gcsFaultToleranceOptions, not by environment variables")
    if "RAY_enable_autoscaler_v2" in env:
        found.append("the autoscaler's version is set by autoscalerOptions.version")
    return found


def _groups(spec: Object) -> list[str]:
    found = []
    is_scaled = spec.get("enableInTreeAutoscaling", False)
    is_v2 = is_scaled and spec.get("autoscalerOptions", {}).get("version") == "v2"
    groups = [("head", spec["headGroupSpec"])]
    groups += [(group["groupName"], group) for group in spec["workerGroupSpecs"]]
    for name, group in groups:
        template = group["template"]["spec"]
        params = group.get("rayStartParams", {})
        if not template.get("containers"):
            found.append(f"{name} has no container")
        if is_v2 and template.get("restartPolicy", "Never") != "Never":
            found.append(f"{name}: restartPolicy must be Never with the autoscaler v2")
        if group.get("resources") and params.keys() & {"num-cpus", "num-gpus", "memory"}:
            found.append(f"{name}: resources are set twice")
        if "labels" in params:
            found.append(f"{name}: labels do not go into rayStartParams")
        if any(not isinstance(value, str) for value in params.values()):
            found.append(f"{name}: rayStartParams are strings")
        found += _volumes(name, template)
    for name, group in groups[1:]:
        if group["minReplicas"] > group["maxReplicas"]:
            found.append(f"{name}: minReplicas is above maxReplicas")
        replicas = group.get("replicas", group["minReplicas"])
        if not group["minReplicas"] <= replicas <= group["maxReplicas"]:
            found.append(f"{name}: replicas is outside minReplicas and maxReplicas")
        if group.get("suspend"):
            found.append(f"{name}: suspending a group needs a feature gate")
    return found


def _volumes(name: str, template: Object) -> list[str]:
    """The operator adds /dev/shm and, for the autoscaler, /tmp/ray under these very names."""
    mounts = {m["mountPath"]: m["name"] for m in template["containers"][0].get("volumeMounts", [])}
    wanted = {"/dev/shm": "shared-mem", "/tmp/ray": "ray-logs"}
    return [
        f"{name}: {path} is mounted from {mounts[path]}, KubeRay expects {volume}"
        for path, volume in wanted.items()
        if mounts.get(path, volume) != volume
    ]


def _job(spec: Object) -> list[str]:
    found = []
    is_selecting, stops = bool(spec.get("clusterSelector")), spec.get("shutdownAfterJobFinishes")
    if is_selecting == ("rayClusterSpec" in spec):
        found.append("exactly one of rayClusterSpec and clusterSelector")
    if spec.get("suspend") and (not stops or is_selecting):
        found.append("suspend needs shutdownAfterJobFinishes and a cluster of its own")
    if spec.get("ttlSecondsAfterFinished", 0) > 0 and not stops:
        found.append("ttlSecondsAfterFinished needs shutdownAfterJobFinishes")
    if spec.get("activeDeadlineSeconds", 1) <= 0 or spec.get("backoffLimit", 0) < 0:
        found.append("activeDeadlineSeconds is positive, backoffLimit not negative")
    if "deletionStrategy" in spec:
        found.append("deletionStrategy needs a feature gate of the operator")
    if "upgradeStrategy" in spec.get("rayClusterSpec", {}):
        found.append("upgradeStrategy does not go under a RayJob")
    if spec["submitterPodTemplate"]["spec"].get("restartPolicy") not in ("Never", "OnFailure"):
        found.append("the submitter's restartPolicy is Never or OnFailure")
    return found
