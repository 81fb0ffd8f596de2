"""Text from data on its way into a page: nothing of it can act, and none of it is endless."""

import html
import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

MAX_NAME = 60
_FORMULA = ("=", "+", "-", "@", "'")
_CODE = re.compile(r"[a-z][a-z0-9_]{0,39}")


def visible(text: str, limit: int = MAX_NAME) -> str:
    """Return a name that is safe to show: one line, printable, short, no spreadsheet formula.

    What cannot be printed (control characters, escape sequences of terminals, marks that turn the
    reading direction) becomes a visible escape; a leading `=`, `+`, `-`, `@` gets an apostrophe, as
    in the ledger, since tables are copied into spreadsheets. HTML is escaped later, by `escape`.
    """
    cut = text[: limit + 1]
    shown = "".join(
        c if c.isprintable() else c.encode("unicode_escape", "surrogatepass").decode("ascii")
        for c in cut
    )
    if shown.startswith(_FORMULA):
        shown = f"'{shown}"
    return shown if len(shown) <= limit else f"{shown[: limit - 1]}\u2026"


def short_names(names: Sequence[str], least: int = 8) -> list[str]:
    """Return names made visible and cut to the same length, the shortest that keeps them apart."""
    length = least
    while len({name[:length] for name in names}) < len(set(names)) and length < MAX_NAME:
        length += 1
    return [visible(name[:length]) for name in names]


def escape(text: object) -> str:
    """Return text for an element or a quoted attribute of HTML or SVG."""
    return html.escape(str(text), quote=True)


def reason_code(text: str) -> str:
    """Return a reason code as it is, and `other` for anything that does not look like one."""
    return text if _CODE.fullmatch(text) else "other"


def embedded_json(values: Mapping[str, Any]) -> str:
    """Return JSON that may stand inside a `script` element: it holds no `<`, `>` or `&`."""
    text = json.dumps(values, ensure_ascii=True, separators=(",", ":"), allow_nan=False)
    for character in "<>&":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return text


def number(value: float) -> str:
    """Return a whole number with commas, any other with three significant digits."""
    if value == int(value) and abs(value) < 1e15:
        return f"{int(value):,}"
    digits = f"{value:.3g}"
    if "e" in digits:
        return f"{value:,.0f}" if abs(value) >= 1 else digits
    return digits
