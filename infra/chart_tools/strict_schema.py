"""Validates rendered objects as a strict API server would: custom and core kinds, no unknown field.

Custom kinds: the structural schema of the CRD, turned into a JSON schema that refuses fields it
does not name. Core kinds: the strict schemas in the package `kubernetes_validate`, read once per
version. Each pod template of a custom kind is validated as a Pod too.
"""

import json
import re
from functools import cache
from importlib import resources
from pathlib import Path
from typing import Any

import jsonschema  # type: ignore[import-untyped]
import yaml
from jsonschema.protocols import Validator  # type: ignore[import-untyped]
from referencing import Registry, Resource
from referencing.exceptions import Unresolvable

# Oldest and newest Kubernetes that the chart is checked against.
KUBERNETES = ("1.30", "1.37")

Object = dict[str, Any]

# A CRD says nothing about metadata; this is what the server itself holds it to.
_TEXTS = {"type": "object", "additionalProperties": {"type": "string"}}
METADATA = {
    "type": "object",
    "properties": {
        "name": {"type": "string"},
        "namespace": {"type": "string"},
        "labels": _TEXTS,
        "annotations": _TEXTS,
    },
    "required": ["name"],
}


def strict(schema: Object) -> Object:
    """JSON schema of a CRD's structural schema that accepts nothing the CRD does not name."""
    if schema.get("x-kubernetes-int-or-string"):
        return {"anyOf": [{"type": "integer"}, {"type": "string"}]}
    out = {k: v for k, v in schema.items() if not k.startswith("x-") and k != "nullable"}
    if "properties" in schema:
        out["properties"] = {name: strict(child) for name, child in schema["properties"].items()}
        if not schema.get("x-kubernetes-preserve-unknown-fields"):
            out["additionalProperties"] = False
    for key in ("additionalProperties", "items"):
        if isinstance(schema.get(key), dict):
            out[key] = strict(schema[key])
    if schema.get("nullable") and "type" in out:
        out["type"] = [out["type"], "null"]
    return out


@cache
def custom_kind(crds: Path, group: str, plural: str, version: str) -> Validator:
    """Strict validator of one custom kind; cached, because the files are large.

    Raises:
        LookupError: the file holds no such version.
    """
    text = (crds / f"{group}_{plural}.yaml").read_text()
    # Only the wanted entry of spec.versions is parsed: the others cost seconds.
    for entry in re.split(r"^  - ", text.partition("\n  versions:\n")[2], flags=re.MULTILINE):
        if re.search(rf"^(    )?name: {version}$", entry, flags=re.MULTILINE):
            parsed = yaml.load("    " + entry, Loader=yaml.CSafeLoader)
            schema = strict(parsed["schema"]["openAPIV3Schema"])
            schema["properties"]["metadata"] = METADATA
            return jsonschema.Draft202012Validator(schema)
    raise LookupError(f"{group}_{plural}.yaml has no version {version}")


@cache
def core_kind(kind: str, api_version: str, kubernetes: str) -> Validator:
    """Strict validator of one kind of Kubernetes itself.

    Raises:
        LookupError: this Kubernetes has no such kind in this version.
    """
    folder = resources.files("kubernetes_validate") / "kubernetes-json-schema"
    folder = folder / f"v{kubernetes}.0-local-strict"
    group, _, version = api_version.rpartition("/")
    name = "-".join([kind.lower(), *filter(None, [group.partition(".")[0], version])])
    file = folder / f"{name}.json"
    if not file.is_file():
        raise LookupError(f"Kubernetes {kubernetes} has no {kind} in {api_version}")
    return jsonschema.Draft202012Validator(
        json.loads(file.read_text()), registry=_definitions(str(folder))
    )


@cache
def _definitions(folder: str) -> Registry[Any]:
    contents = json.loads((Path(folder) / "_definitions.json").read_text())
    registry: Registry[Any] = Registry()
    return Resource.from_contents(contents) @ registry


def faults(document: Object, crds: Path, kubernetes: str = KUBERNETES[-1]) -> list[str]:
    """What an API server would refuse in one object: kind, name, path and reason of each fault."""
    group, _, version = document["apiVersion"].rpartition("/")
    plural = document["kind"].lower() + "s"
    name = f"{document['kind']} {document['metadata'].get('name')}"
    try:
        if (crds / f"{group}_{plural}.yaml").is_file():
            validator = custom_kind(crds, group, plural, version)
        else:
            validator = core_kind(document["kind"], document["apiVersion"], kubernetes)
        found = list(validator.iter_errors(document))
    except (LookupError, Unresolvable) as error:
        return [f"{name}: {error}"]
    return [f"{name}: {fault.json_path}: {fault.message}" for fault in found]
