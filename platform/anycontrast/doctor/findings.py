"""What a check found: ok, warn or fail, and for the latter two what to do about it."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

State = Literal["ok", "warn", "fail"]


@dataclass(frozen=True)
class Finding:
    """One line of the doctor."""

    state: State
    check: str
    """What was looked at, one or two words."""
    found: str
    remedy: str = ""
    """What to do; empty where there is nothing to do."""

    def __post_init__(self) -> None:
        assert (self.state == "ok") == (not self.remedy), (
            f"{self}: say what to do, or that all is well"
        )


@dataclass(frozen=True)
class Diagnosis:
    """Everything the doctor found."""

    place: str
    """What was looked at: a cluster's address, or this machine."""
    findings: tuple[Finding, ...]

    @property
    def is_failed(self) -> bool:
        """Whether training would not work here."""
        return any(finding.state == "fail" for finding in self.findings)

    def to_json(self) -> dict[str, Any]:
        """Return plain JSON values."""
        return {
            "place": self.place,
            "failed": self.is_failed,
            "findings": [asdict(finding) for finding in self.findings],
        }

    def text(self) -> str:
        """Return one line per finding, and a last one that counts them."""
        width = max((len(finding.check) for finding in self.findings), default=0)
        lines = [
            f"{one.state:<4}  {one.check:<{width}}  {one.found}"
            + (f" -> {one.remedy}" if one.remedy else "")
            for one in self.findings
        ]
        counts = {state: _count(self.findings, state) for state in ("ok", "warn", "fail")}
        total = ", ".join(f"{number} {state}" for state, number in counts.items())
        return "\n".join([*lines, f"{self.place}: {total}"])


def _count(findings: Sequence[Finding], state: str) -> int:
    return sum(finding.state == state for finding in findings)
