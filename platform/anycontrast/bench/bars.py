"""What a benchmark measured, held against what is asked for: `bars` of its result."""

from typing import Any


def at_least(value: float, bar: float) -> dict[str, Any]:
    """Return a JSON-ready entry for a number that must reach `bar`."""
    return {"value": round(float(value), 4), "bar": f">= {bar:g}", "met": bool(value >= bar)}


def at_most(value: float, bar: float) -> dict[str, Any]:
    """Return a JSON-ready entry for a number that must not exceed `bar`."""
    return {"value": round(float(value), 4), "bar": f"<= {bar:g}", "met": bool(value <= bar)}
