"""The page in a browser: nothing wider than a telephone, nothing on the console, and the gallery's tools work."""

import html
import json
import re
import shutil
import subprocess

import pytest

from mm_cb.report import write_report

CHROMIUM = shutil.which("chromium")
WIDTH = 390
LOOK = """
const frame = document.querySelector("iframe");
frame.onload = () => {
  const page = frame.contentDocument, view = frame.contentWindow, found = {};
  const cards = () => [...page.querySelectorAll(".card")].filter((card) => card.getClientRects().length);
  const shown = () => cards().length;
  const search = (words) => {
    page.querySelector(".tools input").value = words;
    page.querySelector(".tools input").dispatchEvent(new view.Event("input"));
  };
  found.beyond = page.documentElement.scrollWidth - page.documentElement.clientWidth;
  found.wide = [...page.querySelectorAll("main *, header *")]
    .filter((one) => !one.closest(".scroll, .drawn, details"))
    .filter((one) => one.getBoundingClientRect().right > view.innerWidth + 1)
    .map((one) => one.outerHTML.slice(0, 80));
  found.all = shown();
  search("adaptive B003");
  found.both = shown();
  search("B003");
  found.searched = cards().map((card) => card.querySelector(".prompt").textContent);
  found.output = page.querySelector(".tools output").value;
  search("");
  found.again = shown();
  page.querySelector("#f-harmful").click();
  found.harmful = cards().map((card) => card.classList.contains("has-harmful"));
  page.querySelector("#f-all").click();
  const order = page.querySelector(".tools select");
  order.value = "loss";
  order.dispatchEvent(new view.Event("change"));
  found.losses = cards().map((card) => Number(card.dataset.loss));
  const links = [...page.querySelectorAll(".card h3 a")].map((link) => link.getAttribute("href").slice(1));
  found.anchors = links.length === new Set(links).size && links.every((id) => page.getElementById(id));
  found.pictures = page.querySelectorAll(".clean[open]").length;
  document.title = JSON.stringify(found);
};
frame.srcdoc = document.querySelector("textarea").value;
"""


@pytest.fixture(scope="module")
def profile(tmp_path_factory):
    return tmp_path_factory.mktemp("chromium")


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium here")
def test_the_page_fits_a_telephone_and_its_tools_work(make_run, tmp_path, profile):
    def vary(items):
        for number, item in enumerate(items):
            if item["metric"] == "compliance":
                item["loss"] = (number * 7) % 11 / 10

    write_report([make_run(n=4, benign=3, seeds=1, edit=vary)], tmp_path / "page.html")
    page = html.escape((tmp_path / "page.html").read_text(encoding="utf-8"))
    outer = f'<iframe style="width:{WIDTH}px;height:800px;border:0"></iframe><textarea hidden>{page}</textarea>'
    (tmp_path / "look.html").write_text(f"<meta charset=utf-8>{outer}<script>{LOOK}</script>", encoding="utf-8")
    flags = ["--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", f"--user-data-dir={profile}"]
    flags += ["--disable-background-networking", "--disable-component-update", "--disable-sync"]
    flags += ["--enable-logging=stderr", "--virtual-time-budget=4000", "--dump-dom"]
    done = subprocess.run(
        [CHROMIUM, *flags, (tmp_path / "look.html").as_uri()], capture_output=True, text=True, timeout=60, check=True
    )
    assert [line for line in done.stderr.splitlines() if "CONSOLE" in line] == []
    found = json.loads(html.unescape(re.search(r"<title>(.*?)</title>", done.stdout)[1]))
    assert found["beyond"] == 0 and found["wide"] == []
    assert found["all"] == found["again"] == 8
    assert found["searched"] == ["how is the made-up brew number 3 mixed ?"] * 2
    assert found["output"] == "2 of 8" and found["both"] == 1
    assert 0 < len(found["harmful"]) < 8 and all(found["harmful"])
    assert found["losses"] == sorted(found["losses"]) and len(set(found["losses"])) > 2
    assert found["anchors"] and found["pictures"] == 0
