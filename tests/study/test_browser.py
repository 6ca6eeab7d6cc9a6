"""The page in a real browser: what a reader would see, at the width of a desk and of a phone, light and dark."""

from __future__ import annotations

import io
import json
import re
import shutil
import subprocess
from html import escape, unescape

import pytest
from common import SOUND, outcome, outcomes
from matplotlib.figure import Figure

from basisadapt.study.plan.cells import resolve
from basisadapt.study.plan.reading import read_spec
from basisadapt.study.report.files import report_files
from basisadapt.study.report.report import make_report
from basisadapt.study.report.table import build_table

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "chrome"))), None)
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium")

PROBE = """<script>
addEventListener("load", () => {
  for (const fold of document.querySelectorAll("details")) fold.open = true;
  const root = document.documentElement, table = document.querySelector("table.sortable");
  const order = () => [...table.tBodies[0].rows].map(row => row.cells[0].textContent);
  const click = column => { table.tHead.rows[0].cells[column].querySelector("button").click(); return order(); };
  const seen = {
    width: innerWidth,
    images: [...document.images].map(image => image.naturalWidth),
    alts: [...document.images].map(image => image.alt),
    overflow: root.scrollWidth - root.clientWidth,
    boxes: [...document.querySelectorAll(".box")].map(box => box.clientWidth <= root.clientWidth),
    hidden: document.querySelector(".box").scrollWidth - document.querySelector(".box").clientWidth,
    scrolls: getComputedStyle(document.querySelector(".box")).overflowX,
    requests: performance.getEntriesByType("resource").map(entry => entry.name).filter(name => !/^data:/.test(name)),
    background: getComputedStyle(document.body).backgroundColor,
    start: order(), up: click(1), down: click(1), names: click(0),
    sort: table.tHead.rows[0].cells[0].ariaSort,
  };
  const told = parent.document.createElement("pre");
  told.id = "seen";
  told.textContent = JSON.stringify(seen);
  parent.document.body.append(told);
});
</script></body>"""


def png(run_id):
    content = io.BytesIO()
    figure = Figure(figsize=(3, 2))
    figure.add_subplot().plot([0, 1])
    figure.savefig(content, format="png")
    return {"phi.png": content.getvalue(), "learned_spectrum.png": content.getvalue()}


@pytest.fixture
def page(folder):
    """A study with a failed and a diverged cell, a long name and characters that HTML reserves."""
    path = folder / "tiny.yaml"
    text = path.read_text().replace("title: Two bases", "title: Two <b>bases</b> & more")
    path.write_text(text + "claims: [{text: Sinc < all, better: sinc, than: [fourier, LoRA]}]\n")
    study = resolve(read_spec("tiny.yaml"))
    known = outcomes(study, SOUND)
    first, second = study.cells[:2]
    known[first.key] = outcome(first, status="failed", error="RuntimeError: " + "a_long_word" * 20)
    known[second.key] = outcome(second, status="diverged")
    return report_files(make_report(build_table(study, known)), png)["report.html"]


def look(folder, page, width, *options):
    """What PROBE sees of the page, in a frame of that width: a window cannot be as narrow as a phone."""
    probed = folder / "probed.html"
    inner = escape(page.replace("</body>", PROBE))
    probed.write_text(f'<!doctype html><body><iframe width="{width}" height="900" frameborder="0" srcdoc="{inner}">')
    command = [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--host-resolver-rules=MAP * ~NOTFOUND"]
    command += [f"--user-data-dir={folder / 'profile'}", *options, "--dump-dom", probed.as_uri()]
    dom = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True).stdout
    return json.loads(unescape(re.search(r'<pre id="seen">(.*?)</pre>', dom, re.DOTALL)[1]))


@pytest.mark.parametrize(("width", "dark"), [(1280, False), (390, True)])
def test_the_page_in_a_browser(folder, page, width, dark):
    options = ["--blink-settings=preferredColorScheme=0"] if dark else []
    seen = look(folder, page, width, "--window-size=1400,1000", *options)
    assert seen["width"] == width
    assert len(seen["images"]) == 1 + 2 * 3
    assert all(natural > 100 for natural in seen["images"])
    assert "Learned spectrum: sinc, seed 2" in seen["alts"]
    assert all(seen["alts"])
    assert seen["overflow"] == 0
    assert seen["boxes"] == [True, True]
    assert seen["requests"] == []
    assert seen["background"] == ("rgb(21, 24, 28)" if dark else "rgb(255, 255, 255)")
    assert seen["start"] == ["sinc", "fourier", "LoRA"]
    assert seen["up"] == ["fourier", "LoRA", "sinc"]  # 72.00, 78.67, 79.00
    assert seen["down"] == ["sinc", "LoRA", "fourier"]
    assert seen["names"] == ["fourier", "LoRA", "sinc"]
    assert seen["sort"] == "ascending"


def test_every_column_is_in_sight_at_a_desk_and_scrolled_to_below(folder):
    """The widest table: three seeds, an interval, and what is measured of φ."""
    study = resolve(read_spec("ablate_basis"), seeds=[1, 2, 3])
    linear = {"linear_fit.mean": 1.65, "linear_fit.largest": 2.0, "nonlinear_share.mean": 0.0015}
    measured = {**linear, "nonlinear_share.largest": 0.125, "parameters.trainable": 173338.0}
    known = {
        cell.key: outcome(cell, 0.5 + 0.001 * cell.seed, **measured, **dict.fromkeys(study.spec.columns, 2.5))
        for cell in study.cells
    }
    page = report_files(make_report(build_table(study, known)), png)["report.html"]
    assert page.partition("</thead>")[0].count("<th") >= 12
    assert page.count('<div class="box"') == page.count("<table")
    at_a_desk, below = look(folder, page, 1300), look(folder, page, 800)
    assert at_a_desk["hidden"] == 0
    assert (below["hidden"] > 0, below["scrolls"], below["overflow"]) == (True, "auto", 0)


def test_the_page_stands_without_scripts_and_names_no_other_place(page):
    assert "<table" in page.partition("<script>")[0]
    assert not re.findall(r'(?:src|href)="(?!data:)', page)
    assert "://" not in page
    assert "url(" not in page
    assert "&lt;b&gt;bases&lt;/b&gt; &amp; more" in page
    assert "<b>" not in page
