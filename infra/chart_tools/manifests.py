"""What a rendered chart holds: objects by kind, and every pod template with where it stands."""

from collections.abc import Iterator
from typing import Any, NamedTuple

import yaml

Object = dict[str, Any]


class PodTemplate(NamedTuple):
    """A pod that the release makes, or has KubeRay make."""

    where: str
    metadata: Object
    spec: Object

    def as_pod(self) -> Object:
        """The Pod that the template makes."""
        metadata = {"name": "pod", **self.metadata}
        return {"apiVersion": "v1", "kind": "Pod", "metadata": metadata, "spec": self.spec}

    @property
    def labels(self) -> dict[str, str]:
        """The pod's labels."""
        labels: dict[str, str] = self.metadata.get("labels", {})
        return labels

    @property
    def containers(self) -> list[Object]:
        """All containers, those that run first included."""
        return [*self.spec.get("initContainers", []), *self.spec["containers"]]

    @property
    def num_gpus(self) -> int:
        """GPUs of the pod."""
        limits = [container.get("resources", {}).get("limits", {}) for container in self.containers]
        return sum(int(limit[key]) for limit in limits for key in limit if key.endswith("gpu"))


def parse(text: str) -> list[Object]:
    """All objects of a rendered chart."""
    return [document for document in yaml.load_all(text, Loader=yaml.CSafeLoader) if document]


def cluster_specs(document: Object) -> list[Object]:
    """The Ray cluster of a RayCluster or RayJob, if it has one."""
    if document["kind"] == "RayCluster":
        return [document["spec"]]
    if document["kind"] == "RayJob" and "rayClusterSpec" in document["spec"]:
        return [document["spec"]["rayClusterSpec"]]
    return []


def pod_templates(documents: list[Object]) -> Iterator[PodTemplate]:
    """Every pod template, also those inside RayCluster and RayJob."""
    for document in documents:
        where = f"{document['kind']} {document['metadata']['name']}"
        if document["kind"] == "Pod":
            yield PodTemplate(where, document["metadata"], document["spec"])
        for cluster in cluster_specs(document):
            yield _template(f"{where} head", cluster["headGroupSpec"]["template"])
            for group in cluster["workerGroupSpecs"]:
                yield _template(f"{where} {group['groupName']}", group["template"])
        if document["kind"] == "RayJob":
            yield _template(f"{where} submitter", document["spec"]["submitterPodTemplate"])


def _template(where: str, template: Object) -> PodTemplate:
    return PodTemplate(where, template.get("metadata", {}), template["spec"])
