"""The pictures of docs/serve.md: `python -m tests.serve.pictures docs`, with Chromium installed.

The shipped models in four stages whose forwards take at least 30 ms, and the page in the middle of a
text."""

import sys
import tempfile
from base64 import b64decode
from pathlib import Path

from flowspec import Engine
from flowspec.config import load_config
from flowspec.files import ROOT
from flowspec.models.split import split
from flowspec.preflight import check_run
from tests.serve.browser import Browser
from tests.serve.serving import serving

PROMPT = "import os\n\n\ndef read_lines(path):"
SIZES = {"page_desktop": (1280, 860, False), "page_phone": (390, 1500, True)}
"""This maps a picture to width, height and whether it is in the dark."""


def engine(folder: Path) -> Engine:
    split(str(ROOT / "demo" / "target"), 4, folder / "split")
    path = folder / "demo.yaml"
    path.write_text(f"stages: split\ndrafter: {{kind: lm, path: {ROOT / 'demo' / 'draft'}}}\n")
    config = load_config(
        path, ["emulate.stage_ms=30", "emulate.link_ms=1", "sampling.max_new_tokens=120"]
    )
    return Engine.over_threads(config, check_run(config))


def picture(browser: Browser, url: str, width: int, height: int, dark: bool) -> bytes:
    page = browser.page(url, width, height, dark)
    page.wait("document.getElementById('status').textContent === 'ready'")
    page.type(PROMPT)
    page.press("Enter")
    page.wait(
        "document.querySelectorAll('.turn.answer span').length > 30"
        " && document.querySelectorAll('#tree .node').length > 4"
        " && !!document.querySelector('#tree .node.text, #tree .node.dead')"
    )
    page.value("window.scrollTo(0, 0)")
    found = b64decode(page.ask("Page.captureScreenshot", format="png")["data"])
    page.press("Escape")
    page.wait("document.getElementById('stop').disabled")
    return found


def main(to: Path) -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        with engine(folder) as made, serving(made) as served:
            browser = Browser(folder / "profile")
            for name, size in SIZES.items():
                (to / f"{name}.png").write_bytes(picture(browser, served.url, *size))
            browser.close()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
