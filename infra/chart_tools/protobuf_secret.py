"""Reads a Secret in Kubernetes' protobuf encoding, in which helm stores its releases.

Source: k8s.io/apimachinery runtime/generated.proto (Unknown), meta/v1 (ObjectMeta) and
k8s.io/api core/v1 (Secret) for the field numbers.
"""

import base64
from collections.abc import Iterator
from typing import Any

MAGIC = b"k8s\x00"


def read_secret(content: bytes) -> dict[str, Any]:
    """The Secret as the JSON object that an API server would answer.

    Raises:
        ValueError: not Kubernetes' protobuf envelope.
    """
    if not content.startswith(MAGIC):
        raise ValueError("not a protobuf object of Kubernetes: the first bytes are not 'k8s\\0'")
    envelope = dict(_fields(content[len(MAGIC) :]))
    metadata: dict[str, Any] = {}
    secret: dict[str, Any] = {"apiVersion": "v1", "kind": "Secret", "metadata": metadata}
    for number, value in _fields(_bytes(envelope[2])):
        if number == 1:
            metadata.update(_metadata(_bytes(value)))
        elif number == 2:
            key, data = _pair(_bytes(value))
            secret.setdefault("data", {})[key] = base64.b64encode(data).decode()
        elif number == 3:
            secret["type"] = _bytes(value).decode()
    return secret


def _metadata(content: bytes) -> dict[str, Any]:
    names = {1: "name", 3: "namespace", 5: "uid", 6: "resourceVersion"}
    found: dict[str, Any] = {}
    for number, value in _fields(content):
        if number in names and value:
            found[names[number]] = _bytes(value).decode()
        elif number in (11, 12):
            key, data = _pair(_bytes(value))
            found.setdefault({11: "labels", 12: "annotations"}[number], {})[key] = data.decode()
    return found


def _pair(content: bytes) -> tuple[str, bytes]:
    """Key and value of one entry of a map."""
    entry = dict(_fields(content))
    return _bytes(entry[1]).decode(), _bytes(entry.get(2, b""))


def _bytes(value: int | bytes) -> bytes:
    assert isinstance(value, bytes), "a field of another wire type than the format says"
    return value


def _varint(content: bytes, at: int) -> tuple[int, int]:
    """A variable-length integer and where it ends."""
    value = shift = 0
    while True:
        byte = content[at]
        value |= (byte & 0x7F) << shift
        at, shift = at + 1, shift + 7
        if byte < 0x80:
            return value, at


def _fields(content: bytes) -> Iterator[tuple[int, int | bytes]]:
    """Number and value of each field; fixed-width fields do not occur in these messages."""
    at = 0
    while at < len(content):
        tag, at = _varint(content, at)
        value, at = _varint(content, at)
        if tag & 7 == 0:
            yield tag >> 3, value
        elif tag & 7 == 2:
            yield tag >> 3, content[at : at + value]
            at += value
        else:
            raise ValueError(f"wire type {tag & 7} in a Secret")
