"""Log lines and progress, on a terminal and without one."""

import io
import logging
import re
from collections.abc import Iterator

import pytest

from anycontrast.log import progress, setup_logging


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture(autouse=True)
def _restore_root_logger() -> Iterator[None]:
    root = logging.getLogger()
    handlers, level = list(root.handlers), root.level
    yield
    root.handlers[:] = handlers
    root.setLevel(level)


def test_lines_name_time_level_and_rank_once(capsys: pytest.CaptureFixture[str]) -> None:
    setup_logging()
    setup_logging(rank=0)
    logging.getLogger("anycontrast.x").info("made %d", 3)
    lines = [line for line in capsys.readouterr().err.splitlines() if "made 3" in line]
    assert len(lines) == 1
    assert lines[0].endswith("INFO [rank 0] made 3")


def test_other_ranks_only_warn(capsys: pytest.CaptureFixture[str]) -> None:
    setup_logging(rank=1)
    logging.getLogger("anycontrast.x").info("quiet")
    logging.getLogger("anycontrast.x").warning("loud")
    err = capsys.readouterr().err
    assert "quiet" not in err
    assert "[rank 1] loud" in err


def test_without_a_terminal_only_some_steps_are_lines(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO), progress("sharding", "studies") as on_progress:
        for done in range(1, 101):
            on_progress(done, 100)
    assert len(caplog.messages) == 1
    assert caplog.messages[0].startswith("sharding: 100 of 100 studies")


def test_a_second_phase_has_its_own_rate(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = [0.0]
    monkeypatch.setattr("anycontrast.log.time.monotonic", lambda: now[0])
    with caplog.at_level(logging.INFO), progress("scanning", "files") as on_progress:
        now[0] = 100.0
        on_progress(10, 10)
        on_progress(0, 50)
        now[0] = 110.0
        on_progress(20, 50)
    assert caplog.messages[-1] == "scanning: 20 of 50 files, 2.0 a second, about 15 s left"


def test_the_rate_forgets_what_was_there_already(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = [0.0]
    monkeypatch.setattr("anycontrast.log.time.monotonic", lambda: now[0])
    with caplog.at_level(logging.INFO), progress("sharding", "studies") as on_progress:
        on_progress(1000, 2000)
        for done in range(1001, 1201):
            now[0] += 1.0
            on_progress(done, 2000)
    assert caplog.messages[-1] == ("sharding: 1200 of 2000 studies, 1.0 a second, about 800 s left")


def test_a_bar_shows_rate_and_time_left(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = Terminal()
    monkeypatch.setattr("sys.stderr", terminal)
    now = [0.0]
    monkeypatch.setattr("anycontrast.log.time.monotonic", lambda: now[0])
    with progress("sharding", "studies") as on_progress:
        now[0] = 2.0
        on_progress(3, 9)
    shown = re.sub(r"\x1b\[[0-9;?]*\w", "", terminal.getvalue())
    assert "3/9 studies 1.5 a second, about 4 s left" in shown


def test_on_a_terminal_log_lines_stand_above_the_bar(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = Terminal()
    monkeypatch.setattr("sys.stderr", terminal)
    setup_logging()
    with progress("sharding", "studies") as on_progress:
        on_progress(1, 4)
        logging.getLogger("anycontrast.x").info("in between")
        on_progress(4, 4)
        on_progress(1, 9)
    shown = terminal.getvalue()
    line = next(line for line in shown.splitlines() if "in between" in line)
    assert "INFO [rank 0] in between" in line
    assert "━" not in line.partition("in between")[2]
    assert "1/9" in shown
