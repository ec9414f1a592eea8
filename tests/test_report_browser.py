"""The page of `fastdisco report` in headless Chromium: no error, no request, every figure visible, at
the width of a screen and of a telephone."""

import json
import os
import re
import shutil
import subprocess

import pytest
import reports
from conftest import HANGS
from test_report import page

NAMES = ("chromium", "chromium-browser", "google-chrome")
CHROMIUM = next(filter(None, map(shutil.which, NAMES)), None)
pytestmark = pytest.mark.skipif(not CHROMIUM, reason="browser: no Chromium here")

# Put into a copy of the page, in a frame of the width that is asked for: a window has a least width.
# After a second it tells what it finds.
PROBE = """<script>
addEventListener("load", () => setTimeout(() => {
  const inked = (c) => c.getContext("2d").getImageData(0, 0, c.width, c.height).data.some((v) => v > 0);
  const figures = [...document.querySelectorAll(".figure")].map((f) => {
    const { width, height, right } = f.getBoundingClientRect();
    const canvas = f.querySelector("canvas");
    const drawn = canvas ? inked(canvas) : f.tagName === "IMG" ? f.naturalWidth > 0 : true;
    const scrolls = f.closest(".scroll") !== null;
    return { name: f.className.baseVal ?? f.className, width, height, right, drawn, scrolls };
  });
  const circle = document.querySelector(".map circle");
  circle.dispatchEvent(new PointerEvent("pointerover", { bubbles: true, clientX: 50, clientY: 50 }));
  const tip = document.getElementById("tip");
  const linked = document.querySelectorAll(".map circle.on").length;
  const told = { text: tip.textContent, hidden: tip.hidden, width: tip.offsetWidth };
  document.querySelector("h1").dispatchEvent(new PointerEvent("pointerover", { bubbles: true }));
  const copied = [];
  document.execCommand = () => copied.push(document.activeElement.value);
  document.querySelector("[data-copy]").click();
  setTimeout(() => parent.postMessage(JSON.stringify({
    figures, linked, told, copied,
    button: document.querySelector("[data-copy]").textContent,
    after: document.querySelectorAll(".map circle.on").length,
    background: getComputedStyle(document.body).backgroundColor,
    width: innerWidth,
    scroll: document.documentElement.scrollWidth,
    requests: performance.getEntriesByType("resource").map((e) => e.name).filter((n) => !n.startsWith("data:")),
  }), "*"), 300);
}, 700));
</script></body>"""
FRAME = """<!doctype html><meta charset="utf-8"><body style="margin:0">
<iframe src="page.html" style="border:0;width:{width}px;height:900px"></iframe>
<script>addEventListener("message", (e) => {{
  const found = document.createElement("pre");
  found.id = "found";
  found.textContent = e.data;
  document.body.append(found);
}});</script></body>"""


def chromium(tmp, *arguments):
    """(stdout, lines that the page's console wrote)"""
    offline = ["--host-resolver-rules=MAP * ~NOTFOUND", "--proxy-server=127.0.0.1:9"]
    quiet = ["--headless=new", "--no-sandbox", "--disable-gpu", "--hide-scrollbars"]
    profile = f"--user-data-dir={tmp / 'profile'}"
    logging = "--enable-logging=stderr"
    done = subprocess.run(
        [CHROMIUM, *quiet, *offline, profile, logging, *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=HANGS,
        env=os.environ | {"HOME": str(tmp)},
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout, [x for x in done.stderr.splitlines() if "CONSOLE" in x]


def opened(text, tmp, width, dark=False):
    """What the probe finds in a page of that width."""
    assert text.count("</body>") == 1
    (tmp / "page.html").write_text(text.replace("</body>", PROBE))
    (tmp / "frame.html").write_text(FRAME.format(width=width))
    theme = f"--blink-settings=preferredColorScheme={0 if dark else 1}"
    dump = ["--virtual-time-budget=20000", "--dump-dom", f"file://{tmp}/frame.html"]
    out, console = chromium(tmp, theme, f"--window-size={max(width, 600)},1000", *dump)
    assert not console, console
    found = re.search(r'<pre id="found">(.*?)</pre>', out, re.S)
    assert found, out[-2000:]
    return json.loads(found[1].replace("&amp;", "&").replace("&lt;", "<").replace("&gt;", ">"))


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    root = tmp_path_factory.mktemp("whole")
    return page(root / "report.html", *reports.whole(root))


@pytest.mark.parametrize("width, dark", [(1280, False), (360, True)])
def test_every_figure_is_visible_without_an_error_or_a_request(whole, tmp_path, width, dark):
    found = opened(whole, tmp_path, width, dark)
    assert found["width"] == width and found["scroll"] <= width
    assert found["requests"] == []
    kinds = [f["name"].split()[-1] for f in found["figures"]]
    assert kinds.count("chart") == 10 and kinds.count("plot") == 9 and kinds.count("map") == 3
    assert kinds.count("strip") == 7 and kinds.count("numbers") == 2
    for figure in found["figures"]:
        assert figure["width"] > 60 and figure["height"] > 40 and figure["drawn"], figure
        # What is wider than the page scrolls within its own box.
        assert figure["scrolls"] or figure["right"] <= width, figure
    dark_paper, light_paper = "rgb(20, 24, 29)", "rgb(255, 255, 255)"
    assert found["background"] == (dark_paper if dark else light_paper)


def test_an_image_is_linked_in_all_maps_and_data_are_copied(whole, tmp_path):
    found = opened(whole, tmp_path, 1280)
    assert found["linked"] == 3 and found["after"] == 0
    assert found["told"]["text"].strip() == "class0, class0/val000.png"
    assert not found["told"]["hidden"] and found["told"]["width"] > 40
    assert found["button"] == "copied"
    # Where the browser has no clipboard for a file.
    for text in found["copied"]:
        assert json.loads(text)[0]["network"] == "teacher"


def test_an_error_or_a_request_would_be_seen(whole, tmp_path):
    for fault in ('<img src="http://example.org/x.png">', "<script>throw 1</script>"):
        (tmp_path / "page.html").write_text(whole.replace("</body>", f"{fault}</body>"))
        _, console = chromium(tmp_path, "--dump-dom", f"file://{tmp_path}/page.html")
        assert console, fault


def test_a_page_of_nothing_has_no_error(tmp_path):
    folder = reports.run(reports.images(tmp_path), "new", weights=False)
    text = page(tmp_path / "r.html", folder)
    (tmp_path / "r.html").write_text(text)
    _, console = chromium(tmp_path, "--dump-dom", f"file://{tmp_path}/r.html")
    assert not console


def test_it_prints(whole, tmp_path):
    (tmp_path / "page.html").write_text(whole)
    pdf = tmp_path / "page.pdf"
    _, console = chromium(tmp_path, f"--print-to-pdf={pdf}", f"file://{tmp_path}/page.html")
    assert not console and pdf.read_bytes().startswith(b"%PDF") and pdf.stat().st_size > 50_000
