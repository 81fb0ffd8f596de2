"""Writes the chart's README: its template with a table of all values, taken from their comments.

    python infra/chart_tools/readme.py            write README.md
    python infra/chart_tools/readme.py --check    say whether it is current

In values.yaml a value is commented by `# -- text` directly above it, and the text may go on in
further comment lines. Every value has one; a mapping may have one instead of its members.
"""

import json
import re
import sys
from pathlib import Path
from typing import Any, NamedTuple

import yaml

CHART = Path(__file__).resolve().parents[1] / "helm" / "anycontrast"
MARK = "<!-- values -->"
KEY = re.compile(r"^( *)([A-Za-z][\w-]*):(?: |$)")


class Value(NamedTuple):
    """One row of the table."""

    path: str
    default: Any
    meaning: str


def documented(text: str) -> list[Value]:
    """Every commented value in a values file, in its order.

    Raises:
        ValueError: a value without a comment, named with its line.
    """
    defaults = yaml.safe_load(text)
    found: list[Value] = []
    parents: list[tuple[int, str]] = []
    comment: list[str] = []
    covered: int | None = None  # Indentation of a mapping or list whose comment speaks for all.
    for number, line in enumerate(text.splitlines(), 1):
        stripped = line.strip()
        if stripped.startswith("#"):
            words = stripped.removeprefix("#").strip()
            comment = [words[3:]] if words.startswith("-- ") else comment and [*comment, words]
            continue
        indent = len(line) - len(line.lstrip())
        if covered is not None and stripped and indent <= covered:
            covered = None
        match = KEY.match(line)
        if covered is not None or not match:
            comment = []
            continue
        parents = [*((i, k) for i, k in parents if i < indent), (indent, match[2])]
        path = ".".join(key for _, key in parents)
        default = _at(defaults, path)
        if comment:
            found.append(Value(path, default, " ".join(comment)))
            covered = indent
        elif not (isinstance(default, dict) and default):
            raise ValueError(f"values.yaml:{number}: {path} has no comment that begins with '# --'")
        comment = []
    return found


def _at(values: Any, path: str) -> Any:
    for key in path.split("."):
        values = values[key]
    return values


def table(values: list[Value]) -> str:
    """Markdown tables, one per first key."""
    out: list[str] = []
    section = ""
    for value in values:
        first = value.path.partition(".")[0] if "." in value.path else "release"
        if first != section:
            section = first
            out += ["", f"### {section}", "", "| value | default | meaning |", "|---|---|---|"]
        meaning = value.meaning.replace("|", "\\|")
        out.append(f"| `{value.path}` | `{json.dumps(value.default)}` | {meaning} |")
    return "\n".join(out).strip()


def rendered(chart: Path) -> str:
    """What README.md must be."""
    template = (chart / "README.template.md").read_text()
    return template.replace(MARK, table(documented((chart / "values.yaml").read_text())))


def main(words: list[str]) -> int:
    """Write README.md, or with --check compare it."""
    text, path = rendered(CHART), CHART / "README.md"
    if words == ["--check"]:
        is_current = path.is_file() and path.read_text() == text
        sys.stdout.write(f"{path} is {'' if is_current else 'not '}current\n")
        return int(not is_current)
    path.write_text(text)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
