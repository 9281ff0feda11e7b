"""Chromium without a window: what it makes of a report page."""

import base64
import json
import re
import shutil
import subprocess
from pathlib import Path
from urllib.parse import unquote

import pytest

from tools.setup import BROWSERS

CHROMIUM_SWITCHES = [
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--hide-scrollbars",
    "--enable-logging=stderr",
]


def chromium(user_data: Path, page: Path, *options: str) -> subprocess.CompletedProcess:
    """Run real Chromium without a window on a page."""
    program = next(filter(None, map(shutil.which, BROWSERS)), None)
    if program is None:
        pytest.fail("no Chromium; install it with: sudo apt-get install -y --no-install-recommends chromium")
    command = [program, *CHROMIUM_SWITCHES, f"--user-data-dir={user_data}", *options, page.as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    return done


# Counts what did not load or show. The page itself has no script and forbids any.
CHECK = """<script>
const failures = [];
addEventListener('error', event => failures.push(String(event.message || event.target.outerHTML)), true);
addEventListener('load', async () => {
  const videos = [...document.querySelectorAll('video')];
  for (const video of videos)
    if (!video.readyState) await new Promise(done => { video.onloadedmetadata = done; setTimeout(done, 5000); });
  const plots = [...document.querySelectorAll('figure.plot svg')];
  parent.postMessage({
    failures,
    title: document.title,
    text: document.body.innerText,
    broken_images: [...document.images].filter(image => !image.naturalWidth).length,
    video_widths: videos.map(video => video.videoWidth),
    plots: plots.filter(plot => plot.getBBox().width > 100 && plot.querySelector('path, use')).length,
    dangling: [...document.querySelectorAll('use')].filter(
      use => !document.getElementById(use.getAttribute('xlink:href').slice(1))).length,
    text_colours: [...new Set([
      getComputedStyle(document.body).color,
      ...[...document.querySelectorAll('svg text')].map(text => getComputedStyle(text).fill),
    ])],
    window_width: innerWidth,
    content_width: document.documentElement.scrollWidth,
  }, '*');
});
</script>"""
# A frame, since Chromium's window cannot be as narrow as a phone.
FRAME = """<!DOCTYPE html><pre id="check"></pre>
<script>
addEventListener('message', event => {
  document.getElementById('check').textContent = btoa(encodeURIComponent(JSON.stringify(event.data)));
});
</script>
<iframe src="check.html" width="%d" height="2000" frameborder="0"></iframe>"""


def browser_check(run_dir: Path, tmp_path: Path, width: int) -> dict:
    """What Chromium made of a page in a window so wide."""
    source = (run_dir / "report.html").read_text()
    checked, replaced = re.subn(r'<meta http-equiv="Content-Security-Policy"[^>]*>', lambda _: CHECK, source)
    assert replaced == 1
    (tmp_path / "check.html").write_text(checked)
    frame = tmp_path / "frame.html"
    frame.write_text(FRAME % width)
    dom = chromium(tmp_path / "user", frame, "--dump-dom", "--virtual-time-budget=10000").stdout
    found = re.search(r'<pre id="check">([^<]+)</pre>', dom)
    assert found, dom[-500:]
    return json.loads(unquote(base64.b64decode(found[1]).decode()))
