"""Run a benchmark by name on a machine that has the kernels alone."""

import json
import sys

from anycontrast_kernels.bench import kernels
from anycontrast_kernels.bench.settings import read_settings

USAGE = "usage: python -m anycontrast_kernels.bench kernels [key=value ...] [json=true]\n"
USAGE_ERROR = 2


def main(words: list[str]) -> int:
    """Run the benchmark named first; the result goes to standard output."""
    if words[:1] != ["kernels"]:
        sys.stderr.write(USAGE)
        return USAGE_ERROR
    as_json = "json=true" in words
    settings = [word for word in words[1:] if not word.startswith("json=")]
    try:
        config = read_settings(kernels.KernelsBenchConfig, settings)
    except ValueError as error:
        sys.stderr.write(f"{error}\n{USAGE}")
        return USAGE_ERROR
    result = kernels.run(config)
    tables = result.pop("markdown")
    if not as_json:
        sys.stdout.write("\n\n".join(f"## {name}\n\n{table}" for name, table in tables.items()))
        sys.stdout.write("\n\n")
    sys.stdout.write(json.dumps(result, default=str) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
