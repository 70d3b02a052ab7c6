# Copyright (C) 2026 anomalib-fbclip authors
# SPDX-License-Identifier: Apache-2.0

"""The page of a prediction: written by a run and by the command, and used in a browser."""

import csv
import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest
from PIL import Image

from anomalib_fbclip.commands.cli import main
from anomalib_fbclip.host import report
from anomalib_fbclip.host.prediction_index import COLUMNS
from anomalib_fbclip.host.report import Report, write_report

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
FLAGS = (
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync"),
    *("--disable-background-networking", "--disable-component-update", "--disable-dev-shm-usage"),
)
needs_browser = pytest.mark.skipif(BROWSER is None, reason="no browser: apt-get install -y chromium")


def use(page: Path, script: str) -> dict:
    """What a script that runs behind the page's own, in a browser without a network, returns."""
    changed = page.with_name(f"used_{page.name}")
    code = f"<pre id=result></pre><script>get('result').textContent = JSON.stringify((() => {{{script}}})());</script>"
    changed.write_text(page.read_text(encoding="utf-8").replace("</body>", code + "</body>"), encoding="utf-8")
    profile = page.parent / "profile"
    done = subprocess.run(
        [BROWSER, *FLAGS, f"--user-data-dir={profile}", "--window-size=1200,800", "--dump-dom", changed.as_uri()],
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    shutil.rmtree(profile, ignore_errors=True)
    found = re.search(r'<pre id="result">(.*?)</pre>', done.stdout, re.DOTALL)
    assert found is not None, done.stderr[-2000:]
    return json.loads(found[1].replace("&amp;", "&").replace("&lt;", "<").replace("&gt;", ">"))


MARKED = '[{"box": [1, 2, 5, 9], "area": 20, "peak": 0.91, "centre": [3, 5]}]'


@pytest.fixture
def make(tmp_path):
    """The folder of a prediction with a number of images, the scores rising to 1, each fourth strip drawn."""

    def write(number: int, label: str | None = None) -> Path:
        folder = tmp_path / "results" / "FBCLIP" / "latest" / "images"
        folder.mkdir(parents=True)
        rows = []
        for index in range(number):
            score = (index + 1) / number
            picture = f"line/{index % 500}.png" if index % 4 == 0 else ""
            if picture and index < 500:
                (folder / "line").mkdir(exist_ok=True)
                Image.new("RGB", (90, 30), (index % 255, 90, 90)).save(folder / picture)
            note = "score above its threshold, no pixel above the map's" if index == number - 1 else ""
            values = ("", score, int(score > 0.5), 0.5, score / 2, picture, "", note, MARKED, "", "")
            row = dict(zip(COLUMNS, values, strict=True))
            rows.append({**row, "path": f"/data/line/{index}.png", "label": label or row["label"]})
        rows.append({"path": "/data/</script><b>ü.png", "error": "cannot identify image file"})
        with (folder / "predictions.csv").open("w", newline="", encoding="utf-8") as file:
            table = csv.DictWriter(file, COLUMNS)
            table.writeheader()
            table.writerows(rows)
        return folder

    return write


def test_a_run_writes_a_page_that_needs_nothing_else(model, engine, tmp_path) -> None:
    for index, colour in enumerate(("white", "grey")):
        Image.new("RGB", (60, 40), colour).save(tmp_path / f"{index}.png")
    runner = engine()
    runner.predict(model(report=True), data_path=tmp_path / "0.png")
    (page,) = (tmp_path / "results").rglob("report.html")
    text = page.read_text(encoding="utf-8")
    assert "Uncalibrated" in text
    assert not re.findall(r"""(?:src|href)=["']|https?:|@import|url\(""", text)
    engine(callbacks=[Report("other.html")]).predict(model(threshold=0.5), data_path=tmp_path / "1.png")
    (page,) = (tmp_path / "results").rglob("other.html")
    assert "Uncalibrated" not in page.read_text(encoding="utf-8")


def test_the_command(make, capsys, tmp_path) -> None:
    folder = make(8)
    for place in (folder, folder.parent, folder.parents[1], folder / "predictions.csv"):
        assert main(["report", str(place)]) == 0
    assert str(folder / "report.html") in capsys.readouterr().out
    assert main(["report", str(folder), "--output", str(tmp_path / "page.html")]) == 0
    text = (tmp_path / "page.html").read_text(encoding="utf-8")
    assert "results/FBCLIP/latest/images/line/0.png" in text
    assert "1 marked: 4 x 7 at 1, 2 (area 20, peak 0.91)" in text
    (tmp_path / "empty").mkdir()
    assert main(["report", str(tmp_path / "empty")]) == 1
    assert "holds no predictions.csv" in capsys.readouterr().err


@needs_browser
def test_filter_sort_and_slider(make) -> None:
    found = use(
        _page(make(8)),
        """
        const names = () => [...document.querySelectorAll(".row")].sort((a, b) => a.offsetTop - b.offsetTop)
            .map(row => row.querySelector(".name").textContent);
        const words = () => [...document.querySelectorAll(".row .score span")].map(span => span.textContent);
        const set = (id, value, event) => { get(id).value = value; get(id).dispatchEvent(new Event(event)); };
        const seen = {first: names(), counts: get("counts").textContent, words: words()};
        const images = [...document.querySelectorAll("img")];
        seen.images = images.length;
        seen.link = document.querySelector("a.strip").getAttribute("href");
        seen.bold = document.querySelectorAll(".row b").length;
        set("slider", "0.9", "input");
        seen.moved = get("counts").textContent; seen.movedWords = words();
        set("show", "above", "change"); seen.above = names();
        get("reset").click(); seen.reset = get("counts").textContent;
        set("show", "disagree", "change"); seen.disagree = names();
        set("show", "all", "change"); set("sort", "low", "change"); seen.low = names();
        set("size", "560", "change"); seen.large = document.querySelector(".row").offsetHeight;
        set("name", "LINE/3", "input"); seen.name = names();
        set("name", "nothing", "input"); seen.empty = !get("empty").hidden;
        return seen;
        """,
    )
    assert found["first"][:2] == ["7.png", "6.png"]
    assert found["counts"] == "4 above, 4 not above, 1 unreadable; 9 shown"
    assert found["words"][0] == "anomalous"
    assert found["link"] == "line/4.png"
    assert found["bold"] == 0
    assert found["moved"].startswith("1 above, 7 not above")
    assert found["movedWords"][:2] == ["above", "below"]
    assert found["above"] == found["disagree"] == ["7.png"]
    assert found["reset"].startswith("4 above")
    assert found["low"][0] == "0.png"
    assert found["large"] == 560
    assert found["name"] == ["3.png"]
    assert found["empty"]


@needs_browser
def test_without_calibration_the_page_counts_but_does_not_judge(make) -> None:
    found = use(
        _page(make(8, label="uncalibrated")),
        """
        const words = [...document.querySelectorAll(".row .score span")].map(span => span.textContent);
        return {words, counts: get("counts").textContent};
        """,
    )
    assert set(found["words"]) <= {"uncalibrated", "unreadable"}
    assert found["counts"].startswith("4 above, 4 not above")


@needs_browser
def test_ten_thousand_images(make, monkeypatch) -> None:
    monkeypatch.setattr(report, "PAGE_BYTES", 10_000 * 400)
    page = _page(make(10_000))
    assert page.stat().st_size < 8e6
    found = use(
        page,
        """
        const clock = work => { const begin = performance.now(); work(); return performance.now() - begin; };
        const seen = {rows: document.querySelectorAll(".row").length};
        seen.move = clock(() => { get("slider").value = "0.75"; get("slider").dispatchEvent(new Event("input")); });
        seen.counts = get("counts").textContent;
        seen.sort = clock(() => { get("sort").value = "path"; get("sort").dispatchEvent(new Event("change")); });
        list.scrollTop = list.scrollHeight;
        seen.scroll = clock(render);
        seen.after = document.querySelectorAll(".row").length;
        return seen;
        """,
    )
    assert 0 < found["rows"] < 40
    assert 0 < found["after"] < 40
    assert found["counts"] == "2500 above, 7500 not above, 1 unreadable; 10001 shown"
    # A frame that takes a second would be felt as freezing.
    assert max(found["move"], found["sort"], found["scroll"]) < 1000


def _page(folder: Path) -> Path:
    return write_report(folder / "predictions.csv", folder / "report.html")
