"""Hypothesis strategies made from values.schema.json: changes that it accepts.

Drawn are changes to a set of values that is known to work, a few at a time: wholly random values
would nearly all be refused for contradicting each other, and nothing would be rendered.
"""

import re
from typing import Any

from hypothesis import strategies as st

Object = dict[str, Any]

# Text that YAML reads as something else where a template forgets the quotes.
TRICKY = (
    "true",
    "no",
    "null",
    "1e3",
    "0x1f",
    "1_000",
    "~",
    "a: b",
    "- x",
    "#",
    "'",
    '"',
    "{{ x }}",
)


def leaves(schema: Object, root: Object | None = None, path: str = "") -> dict[str, Object]:
    """Every value that can be set, by dotted path: scalars, lists and free mappings."""
    root = root or schema
    schema = resolved(schema, root)
    if "properties" not in schema:
        return {path: schema}
    found: dict[str, Object] = {}
    for key, child in schema["properties"].items():
        found |= leaves(child, root, f"{path}.{key}".lstrip("."))
    return found


def resolved(schema: Object, root: Object) -> Object:
    """The schema behind a local reference."""
    reference = schema.get("$ref", "")
    found: Object = root["$defs"][reference.rpartition("/")[2]] if reference else schema
    return found


def value_of(schema: Object, root: Object) -> st.SearchStrategy[Any]:
    """Values that a schema of ours accepts. Knows the words that values.schema.json uses."""
    schema = resolved(schema, root)
    if "enum" in schema:
        return st.sampled_from(schema["enum"])
    if "anyOf" in schema:
        return st.one_of([value_of(option, root) for option in schema["anyOf"]])
    kind = schema.get("type")
    if kind == "boolean":
        return st.booleans()
    if kind == "integer":
        return st.integers(schema.get("minimum", 0), min(schema.get("maximum", 10**6), 10**6))
    if kind == "string":
        return _text(schema)
    if kind == "array":
        item = value_of(schema["items"], root)
        return st.lists(item, min_size=schema.get("minItems", 0), max_size=2)
    assert kind == "object", schema
    return _mapping(schema, root)


def _text(schema: Object) -> st.SearchStrategy[str]:
    if "pattern" in schema:
        alphabet = st.characters(codec="ascii")
        drawn = st.from_regex(schema["pattern"], fullmatch=True, alphabet=alphabet)
        return drawn.filter(lambda text: not text.endswith("\n") and text != "latest")
    plain = st.text(st.characters(min_codepoint=32, max_codepoint=126), max_size=20)
    drawn = st.one_of(st.sampled_from(TRICKY), plain)
    shortest, longest = schema.get("minLength", 0), schema.get("maxLength", 99)
    return drawn.filter(lambda text: shortest <= len(text) <= longest)


def _mapping(schema: Object, root: Object) -> st.SearchStrategy[Object]:
    if "properties" in schema:
        required = set(schema.get("required", ()))
        members = {key: value_of(child, root) for key, child in schema["properties"].items()}
        drawn = st.fixed_dictionaries(
            {key: members[key] for key in members if key in required},
            optional={key: members[key] for key in members if key not in required},
        )
        fewest, most = schema.get("minProperties", 0), schema.get("maxProperties", 99)
        return drawn.map(lambda m: dict(list(m.items())[:most])).filter(lambda m: len(m) >= fewest)
    if isinstance(schema.get("additionalProperties"), dict):
        keys = st.sampled_from(["a", "team", "example.org/key", "x-1"])
        return st.dictionaries(keys, value_of(schema["additionalProperties"], root), max_size=2)
    return st.just({})  # Free mappings (affinity, volumes, rules): their shape is Kubernetes' own.


def put(values: Object, path: str, value: Any) -> None:
    """Set a value by its dotted path."""
    *parents, last = path.split(".")
    for key in parents:
        values = values.setdefault(key, {})
    values[last] = value


@st.composite
def changes(draw: st.DrawFn, schema: Object, most: int = 5) -> Object:
    """A few accepted changes; what is left out keeps its default."""
    paths = leaves(schema)
    chosen = draw(st.lists(st.sampled_from(sorted(paths)), min_size=1, max_size=most, unique=True))
    values: Object = {}
    for path in chosen:
        if path not in ("workerGroups", "global"):
            put(values, path, draw(value_of(paths[path], schema)))
    if draw(st.booleans()):
        group = draw(value_of(schema["$defs"]["workerGroup"], schema))
        if draw(st.integers(0, 3)):  # Else nearly all groups would be refused.
            group = {k: v for k, v in group.items() if not k.endswith(("Replicas", "Memory"))}
            group |= {"replicas": draw(st.integers(1, 9)), "gpus": {"count": 1}}
        values["workerGroups"] = {draw(st.sampled_from(["gpu", "no", "b2"])): group}
    return values


def mistakable(schema: Object) -> dict[str, str | list[str]]:
    """For every value that takes text, or a list of it: text that YAML needs quotes for."""
    found: dict[str, str | list[str]] = {}
    for path, leaf in leaves(schema).items():
        is_list = leaf.get("type") == "array"
        text = resolved(leaf["items"], schema) if is_list else leaf
        fits = [t for t in ("true", "1e3", "123", "null") if _accepts(text, t)]
        if fits:
            found[path] = [fits[0]] if is_list else fits[0]
    return found


def _accepts(schema: Object, text: str) -> bool:
    if schema.get("type") != "string" or "enum" in schema:
        return False
    return re.search(schema.get("pattern", ""), text) is not None
