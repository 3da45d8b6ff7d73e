"""Pages in Chromium without a display: pictures of them, and what a script finds in them."""

from __future__ import annotations

import html
import json
import re
import shutil
import subprocess
import tempfile
from pathlib import Path
from typing import Any

BROWSERS = ("chromium", "chromium-browser", "google-chrome")
SCHEMES = {"dark": 0, "light": 1}
"""{scheme: Blink's number of it}."""
_TIMEOUT_S = 120
_WAIT = "--virtual-time-budget=2000"  # in milliseconds, which pass at once when nothing happens
_OUTER = """<!DOCTYPE html><meta charset="utf-8"><meta name="color-scheme" content="light dark">
<pre id="evaluated"></pre>
<script>onmessage = event => document.getElementById("evaluated").textContent = event.data</script>
<iframe src="page.html" style="{frame}"></iframe>
"""


def find_browser() -> str | None:
    """The path of a Chromium, or None."""
    return next(filter(None, map(shutil.which, BROWSERS)), None)


def screenshot(page: Path, target: Path, scheme: str, size_px: tuple[int, int], browser: str = "chromium") -> None:
    """Takes a picture of the top of a page."""
    _run(browser, scheme, size_px, f"--screenshot={target}", page)


def evaluate(page: Path, function: str, scheme: str, size_px: tuple[int, int], browser: str = "chromium") -> Any:
    """What a JavaScript function without arguments returns when it is called in a page, as JSON values."""
    # In a frame, because a window has a least width of 500 pixels, and a screen need not.
    frame = f"width: {size_px[0]}px; height: {size_px[1]}px; border: 0"
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        script = f"<script>parent.postMessage(JSON.stringify(({function})()), '*')</script></body>"
        text = page.read_text(encoding="utf-8").replace("</body>", script)
        (folder / "page.html").write_text(text, encoding="utf-8")
        (folder / "outer.html").write_text(_OUTER.format(frame=frame), encoding="utf-8")
        dom = _run(browser, scheme, (size_px[0] + 100, size_px[1] + 100), "--dump-dom", folder / "outer.html")
    found = re.search(r'<pre id="evaluated">(.+?)</pre>', dom, re.DOTALL)
    if found is None:
        raise RuntimeError(f"{page}: the script failed in the page")
    return json.loads(html.unescape(found[1]))


def _run(browser: str, scheme: str, size_px: tuple[int, int], what: str, page: Path) -> str:
    settings = [f"--window-size={size_px[0]},{size_px[1]}", f"--blink-settings=preferredColorScheme={SCHEMES[scheme]}"]
    command = [browser, "--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", _WAIT, *settings, what]
    done = subprocess.run([*command, page.as_uri()], check=True, capture_output=True, timeout=_TIMEOUT_S)
    return done.stdout.decode("utf-8")
