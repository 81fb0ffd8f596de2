"""The page of a report: escaped, closed, without network, quiet in a browser."""

import base64
import json
import re
import shutil
import subprocess
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest

from anycontrast_datasets.ledger import Refusal, write_ledger
from anycontrast_datasets.manifest import write_manifest
from anycontrast_datasets.report import write_report
from anycontrast_datasets.report_pictures import encode_png
from anycontrast_datasets.report_text import embedded_json, visible
from anycontrast_datasets.study import ContrastVote, Study, Volume

EYE = ((1.0, 0, 0, 0), (0, 1.0, 0, 0), (0, 0, 1.0, 0), (0, 0, 0, 1.0))
HOSTILE = {
    "script": "<script>alert(1)</script>",
    "attribute": '" onmouseover="alert(1)',
    "ansi": "\x1b[31mred\x1b[0m",
    "formula": "=HYPERLINK(A1)",
    "plus": "+1+cmd|' /C calc'!A0",
    "long": "x" * 10_000,
    "end of script": "</script><img src=x onerror=alert(1)>",
    "direction": "abc\u202egnp.exe",
    "entity": "&lt;b&gt;",
    "null": "a\x00b\r\nc",
}


@pytest.fixture
def page_of(tmp_path: Path) -> Callable[..., Path]:
    """Write the report of a manifest of equal studies, with `text` wherever data hold text."""

    def make(num_studies: int, text: str = "") -> Path:
        vote = ContrastVote(source=text or "bids", contrast="T1w", confidence=1)
        volumes = tuple(
            Volume(
                contrast=contrast,
                location="private/name.nii.gz",
                shape=(160, 192, 160),
                spacing_mm=(1.0, 1.0, 1.0),
                affine=EYE,
                confidence=0.9,
                face="stripped",
                intensity=(10.0, 300.0, 900.0),
                flags=(text,) if text else (),
                votes=(vote,),
            )
            for contrast in ("T1w", "FLAIR")
        )
        studies = [
            Study(
                study_id=f"s{number:05d}",
                dataset=text or "one",
                subject_id=f"p{number}",
                session_id="1",
                split="train",
                volumes=volumes,
                site=text,
            )
            for number in range(num_studies)
        ]
        folder = tmp_path / "manifest"
        (folder / "private").mkdir(parents=True)
        write_manifest(studies, folder / "manifest.parquet")
        refusals = [Refusal(text, text, text, text)] * num_studies if text else []
        write_ledger(refusals, folder / "private" / "ledger.csv")
        page = tmp_path / "out" / "report.html"
        write_report(folder, page)
        return page

    return make


class Elements(HTMLParser):
    """Tags, attributes and text of a page, as a browser takes them."""

    VOID = ("meta", "link", "img", "br")

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in self.VOID and not (self.get_starttag_text() or "").endswith("/>"):
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open, tag
        assert self.open.pop() == tag


@pytest.mark.parametrize("kind", HOSTILE)
def test_text_from_data_cannot_act(kind: str, page_of: Callable[..., Path]) -> None:
    page = page_of(12, HOSTILE[kind]).read_text()
    elements = Elements(page)
    assert not elements.open, "every element is closed"
    assert [attributes for tag, attributes in elements.tags if tag == "script"] == [
        {"type": "application/json", "id": "numbers"}
    ]
    assert not [a for _, attributes in elements.tags for a in attributes if a.startswith("on")]
    assert not re.search(r"[\x00-\x08\x0b-\x1f\x7f\u202a-\u202e]", page)
    assert "x" * 100 not in page
    cells = re.findall(r">([^<>]*)</(?:span|td|th)>", page)
    assert not [cell for cell in cells if cell.startswith(("=", "+", "@", "-"))]


def test_a_page_asks_for_nothing(page_of: Callable[..., Path]) -> None:
    elements = Elements(page_of(20).read_text())
    for tag, attributes in elements.tags:
        for name in ("src", "href", "action", "poster", "data", "srcset", "xlink:href"):
            address = attributes.get(name)
            assert address is None or address.startswith(("data:", "#")), (tag, address)
        if tag == "img":
            assert attributes.get("alt")
        if tag == "svg" and attributes.get("role") == "img":
            assert attributes.get("aria-label")
    policies = [a for tag, a in elements.tags if a.get("http-equiv") == "Content-Security-Policy"]
    assert str(policies[0]["content"]).startswith("default-src 'none'")
    targets = {a["href"] for tag, a in elements.tags if tag == "a"} - {None}
    ids = {f"#{a['id']}" for _, a in elements.tags if a.get("id")}
    assert {t for t in targets if t and t.startswith("#")} <= ids


def test_the_numbers_can_be_downloaded(page_of: Callable[..., Path]) -> None:
    page = page_of(20).read_text()
    shown = re.search(r'<script type="application/json" id="numbers">(.*?)</script>', page)
    assert shown is not None
    found = re.search(r'download="report.json" href="data:application/json;base64,([^"]*)"', page)
    assert found is not None
    assert json.loads(base64.b64decode(found[1])) == json.loads(shown[1])


def test_names_stay_names() -> None:
    assert visible("brats-2024 (é)") == "brats-2024 (é)"
    assert visible("\x1b[0m") == "\\x1b[0m"
    assert visible("=1") == "'=1"
    assert len(visible("y" * 100)) == 60
    assert embedded_json({"a": "</script>&"}) == r'{"a":"\u003c/script\u003e\u0026"}'


def test_png_is_png(tmp_path: Path) -> None:
    from matplotlib.image import imread

    image = np.arange(12, dtype=np.uint8).reshape(3, 4) * 20
    (tmp_path / "a.png").write_bytes(encode_png(image))
    np.testing.assert_allclose(imread(tmp_path / "a.png") * 255, image, atol=1e-4)


CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
QUIET = (
    "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-dev-shm-usage "
    "--disable-background-networking --disable-component-update --disable-sync "
    "--enable-logging=stderr --v=0 --window-size=1280,2000"
)


@pytest.mark.skipif(CHROMIUM is None, reason="no chromium on PATH")
def test_a_browser_opens_the_page_without_error_or_request(
    page_of: Callable[..., Path], tmp_path: Path
) -> None:
    page_of(20, HOSTILE["script"])
    # Around the report, one request and one message that must be found: the watch is awake.
    frame = tmp_path / "frame.html"
    frame.write_text(
        '<iframe src="out/report.html" width="1280" height="1900"></iframe>'
        '<img src="http://127.0.0.1:9/watch"><script>console.error("watch")</script>'
    )
    log, picture = tmp_path / "net.json", tmp_path / "page.png"
    command = [
        str(CHROMIUM),
        *QUIET.split(),
        "--host-resolver-rules=MAP * ~NOTFOUND , EXCLUDE 127.0.0.1",
        f"--user-data-dir={tmp_path / 'profile'}",
        f"--log-net-log={log}",
        f"--screenshot={picture}",
        frame.as_uri(),
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert picture.is_file(), done.stderr
    messages = [line for line in done.stderr.splitlines() if "CONSOLE" in line]
    assert len(messages) == 1, messages
    assert '"watch"' in messages[0]
    # The browser's own requests have no origin; those of a page do.
    requests = {
        event["params"]["url"]
        for event in json.loads(log.read_text())["events"]
        if event.get("params", {}).get("initiator", "not an origin") != "not an origin"
    }
    assert requests == {"http://127.0.0.1:9/watch"}
