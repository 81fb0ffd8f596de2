"""Read `key=value` words into a dataclass of options, without a configuration library."""

from dataclasses import MISSING, fields
from typing import Any, Literal, TypeVar, get_args, get_origin, get_type_hints

T = TypeVar("T")


def read_settings(options: type[T], words: list[str]) -> T:
    """Return the options with the defaults replaced by what the words say.

    A tuple is written `[64,128]` or `64,128`.

    Args:
        options: a dataclass whose fields are bool, int, float, str, a `Literal` of strings, which
            it checks itself, or a tuple of one of them.
        words: `key=value` each.

    Raises:
        ValueError: a word is no `key=value`, names no option, or its value has another type.
    """
    types = get_type_hints(options)
    names = [field.name for field in fields(options)]  # type: ignore[arg-type]
    found: dict[str, Any] = {}
    for word in words:
        name, separator, text = word.partition("=")
        if not separator or name not in names:
            raise ValueError(f"expected key=value with a key of {', '.join(names)}, got {word!r}")
        found[name] = _value(name, types[name], text)
    missing = [
        field.name
        for field in fields(options)  # type: ignore[arg-type]
        if field.default is MISSING and field.default_factory is MISSING and field.name not in found
    ]
    if missing:
        raise ValueError(f"{', '.join(missing)}: needed, as key=value")
    return options(**found)


def _value(name: str, kind: Any, text: str) -> Any:
    if get_origin(kind) is tuple:
        parts = [part.strip() for part in text.strip("[]").split(",")]
        return tuple(_value(name, get_args(kind)[0], part) for part in parts if part)
    if get_origin(kind) is Literal:
        return text
    if kind is bool:
        if text not in ("true", "false"):
            raise ValueError(f"{name}: must be true or false, got {text!r}")
        return text == "true"
    try:
        return kind(text)
    except ValueError as error:
        raise ValueError(f"{name}: must be {kind.__name__}, got {text!r}") from error
