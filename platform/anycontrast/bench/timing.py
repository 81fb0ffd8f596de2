"""Time several ways of doing the same thing in one process, in alternating rounds.

Every round runs every way once on the same item, so load on the machine meets all alike. CPU time
is that of the whole process, threads included; the median over rounds is what is reported, and the
least where a second core may be taken by others. What a call returns lives until the next call of
the same way returns, as in a loop over a data set: whoever allocates anew pays for fresh pages as
its users do, and how many is counted. `at_least` and `at_most` hold what came out against a bar.
"""

import resource
import statistics
import time
from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeVar

Name = TypeVar("Name", bound=Hashable)


@dataclass
class Timing:
    """Seconds per call, one entry a round."""

    cpu_s: list[float] = field(default_factory=list)
    wall_s: list[float] = field(default_factory=list)
    page_faults: list[int] = field(default_factory=list)
    """Pages of memory that were touched for the first time."""

    @property
    def cpu_ms(self) -> float:
        """Median CPU time of a call in ms."""
        return 1e3 * statistics.median(self.cpu_s)

    @property
    def wall_ms(self) -> float:
        """Median wall time of a call in ms."""
        return 1e3 * statistics.median(self.wall_s)

    @property
    def best_cpu_ms(self) -> float:
        """Least CPU time of a call in ms."""
        return 1e3 * min(self.cpu_s)

    @property
    def best_wall_ms(self) -> float:
        """Least wall time of a call in ms."""
        return 1e3 * min(self.wall_s)


def alternate(
    ways: Mapping[Name, Callable[[int], object]],
    num_items: int,
    rounds: int,
    *,
    before: Callable[[], object] | None = None,
) -> dict[Name, Timing]:
    """Call every way on every item, in `rounds` rounds after one that is not counted.

    Args:
        ways: Name -> function of the item's number.
        num_items: Items 0 .. num_items - 1; a call on each in every round.
        rounds: Rounds that count.
        before: Called before every call, outside the clock.
    """
    timings = {name: Timing() for name in ways}
    kept: dict[Name, object] = {}
    for number in range(rounds + 1):
        for item in range(num_items):
            for name, way in ways.items():
                if before is not None:
                    before()
                faults = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
                wall, cpu = time.perf_counter(), time.process_time()
                kept[name] = way(item)
                cpu, wall = time.process_time() - cpu, time.perf_counter() - wall
                faults = resource.getrusage(resource.RUSAGE_SELF).ru_minflt - faults
                if number:
                    timings[name].page_faults.append(faults)
                    timings[name].cpu_s.append(cpu)
                    timings[name].wall_s.append(wall)
    return timings


def markdown_table(header: list[str], rows: list[list[str]]) -> str:
    """Return a Markdown table, first column to the left, numbers to the right."""
    rule = ["---"] + ["---:"] * (len(header) - 1)
    return "\n".join("| " + " | ".join(row) + " |" for row in [header, rule, *rows])


def at_least(value: float, bar: float) -> dict[str, Any]:
    """Return an entry of a result's `bars`, for a number that must reach `bar`."""
    return {"value": round(float(value), 4), "bar": f">= {bar:g}", "met": bool(value >= bar)}


def at_most(value: float, bar: float) -> dict[str, Any]:
    """Return an entry of a result's `bars`, for a number that must not exceed `bar`."""
    return {"value": round(float(value), 4), "bar": f"<= {bar:g}", "met": bool(value <= bar)}
