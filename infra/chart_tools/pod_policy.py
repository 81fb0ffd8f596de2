"""What every pod of the release must satisfy: Pod Security, limits, images, secrets, the network.

"Restricted" is Kubernetes' Pod Security standard of that name. A pod of a release that was told
`podSecurity.level=privileged` may add IPC_LOCK, use the node's network and mount NFS, nothing else.
"""

import re

from infra.chart_tools.manifests import Object, PodTemplate

RESTRICTED_VOLUMES = {
    "configMap", "csi", "downwardAPI", "emptyDir", "ephemeral", "persistentVolumeClaim",
    "projected", "secret",
}  # fmt: skip
DIGEST = re.compile(r"@sha256:[0-9a-f]{64}$")
SECRET_NAME = re.compile(r"(?i)(token|secret|passw|access_key|credential)")
NOT_SECRET = {"GOOGLE_APPLICATION_CREDENTIALS"}  # A path.


def violations(pod: PodTemplate, *, level: str = "restricted") -> list[str]:
    """What one pod lacks or has too much of."""
    found = _pod_security(pod, level)
    for container in pod.containers:
        name = container["name"]
        found += [f"{name}: {fault}" for fault in _container_security(container, level)]
        found += [f"{name}: {fault}" for fault in _container_needs(container)]
    found += _gpu(pod)
    return [f"{pod.where}: {fault}" for fault in found]


def _pod_security(pod: PodTemplate, level: str) -> list[str]:
    spec, context = pod.spec, pod.spec.get("securityContext", {})
    allowed = RESTRICTED_VOLUMES | ({"nfs"} if level == "privileged" else set())
    found = [f"{key} is set" for key in ("hostPID", "hostIPC") if spec.get(key)]
    if spec.get("hostNetwork") and level == "restricted":
        found.append("hostNetwork is set")
    if not context.get("runAsNonRoot") or context.get("runAsUser", 0) == 0:
        found.append("may run as root")
    if context.get("seccompProfile", {}).get("type") not in ("RuntimeDefault", "Localhost"):
        found.append("has no seccomp profile")
    if context.get("sysctls") or context.get("seLinuxOptions"):
        found.append("sets sysctls or SELinux options")
    for volume in spec.get("volumes", []):
        kinds = volume.keys() - {"name"}
        if not kinds <= allowed:
            found.append(f"volume {volume['name']} is a {', '.join(kinds)}")
        if "emptyDir" in volume and "sizeLimit" not in volume["emptyDir"]:
            found.append(f"volume {volume['name']} has no size limit")
    if spec.get("automountServiceAccountToken") is not False and "head" not in pod.where:
        found.append("gets a token of the Kubernetes API")
    return found


def _container_security(container: Object, level: str) -> list[str]:
    context = container.get("securityContext", {})
    capabilities = context.get("capabilities", {})
    allowed = {"IPC_LOCK"} if level == "privileged" else set()
    found = []
    if context.get("allowPrivilegeEscalation") is not False or context.get("privileged"):
        found.append("may gain privileges")
    if capabilities.get("drop") != ["ALL"]:
        found.append("does not drop all capabilities")
    if not set(capabilities.get("add", [])) <= allowed:
        found.append(f"adds capabilities {capabilities['add']}")
    if context.get("runAsUser") == 0 or context.get("runAsNonRoot") is False:
        found.append("may run as root")
    if any("hostPort" in port for port in container.get("ports", [])):
        found.append("opens a port of the node")
    return found


def _container_needs(container: Object) -> list[str]:
    limits = container.get("resources", {}).get("limits", {})
    found = [f"has no limit of {key}" for key in ("cpu", "memory") if key not in limits]
    if container.get("resources", {}).get("requests") != limits:
        found.append("requests differ from limits")
    image = container["image"]
    if ":latest" in image or not DIGEST.search(image):
        found.append(f"image {image} is not pinned by digest")
    for variable in container.get("env", []):
        name = variable["name"]
        is_plain = bool(variable.get("value")) and name not in NOT_SECRET
        if is_plain and SECRET_NAME.search(name):
            found.append(f"{name} holds a secret in clear text")
    return found


def _gpu(pod: PodTemplate) -> list[str]:
    if not pod.num_gpus:
        return []
    found = []
    resource = next(
        key for c in pod.containers for key in c["resources"]["limits"] if key.endswith("gpu")
    )
    if not any(t.get("key") == resource for t in pod.spec.get("tolerations", [])):
        found.append(f"has GPUs and no toleration for {resource}")
    shared = [m["name"] for m in pod.containers[0]["volumeMounts"] if m["mountPath"] == "/dev/shm"]
    volumes = {volume["name"]: volume for volume in pod.spec["volumes"]}
    if not shared or volumes[shared[0]].get("emptyDir", {}).get("medium") != "Memory":
        found.append("has GPUs and no shared memory at /dev/shm")
    return found


def uncovered_ports(pods: list[PodTemplate], documents: list[Object]) -> list[str]:
    """Declared ports that no NetworkPolicy governs, and pods that are open by default."""
    policies = [d["spec"] for d in documents if d["kind"] == "NetworkPolicy"]
    found = []
    for pod in pods:
        mine = [policy for policy in policies if selects(policy["podSelector"], pod.labels)]
        found += [
            f"{pod.where}: all {direction.lower()} is allowed"
            for direction in ("Ingress", "Egress")
            if not any(direction in policy["policyTypes"] for policy in mine)
        ]
        for container in pod.containers:
            for port in container.get("ports", []):
                rules = [rule for policy in mine for rule in policy.get("ingress", [])]
                if not any(_governs(rule, port["containerPort"]) for rule in rules):
                    found.append(f"{pod.where}: no rule for port {port['containerPort']}")
                if any(_governs(rule, port["containerPort"]) and not rule.get("from")
                       for rule in rules):  # fmt: skip
                    found.append(f"{pod.where}: port {port['containerPort']} is open to all")
    return found


def selects(selector: Object, labels: dict[str, str]) -> bool:
    """Whether a label selector (matchLabels, and matchExpressions with In) selects these labels."""
    for key, value in selector.get("matchLabels", {}).items():
        if labels.get(key) != value:
            return False
    for expression in selector.get("matchExpressions", []):
        if labels.get(expression["key"]) not in expression["values"]:
            return False
    return True


def _governs(rule: Object, port: int) -> bool:
    return "ports" not in rule or any(entry.get("port") == port for entry in rule["ports"])
