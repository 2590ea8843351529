"""The page in a browser, on a telephone and a screen, light and dark: it fits, can be read, and its tools work."""

import html
import json
import re
import shutil
import subprocess
import zlib

import pytest

from mm_cb.report import write_report

CHROMIUM = shutil.which("chromium")
LOOKS = [(width, mode) for width in (390, 1200) for mode in ("light", "dark")]
READABLE = 4.5
"""Contrast of text that WCAG 2 asks for at level AA."""
LOOK = """
const channels = (colour) => (colour.match(/[\\d.]+/g) || [0, 0, 0, 0]).map(Number);
const light = (colour) => channels(colour).slice(0, 3).map((one) => one / 255)
  .map((one) => one <= 0.04045 ? one / 12.92 : ((one + 0.055) / 1.055) ** 2.4)
  .reduce((sum, one, which) => sum + one * [0.2126, 0.7152, 0.0722][which], 0);
const contrast = (one, other) => {
  const [low, high] = [light(one), light(other)].sort((a, b) => a - b);
  return (high + 0.05) / (low + 0.05);
};
const found = {};
const look = (frame) => {
  const page = frame.contentDocument, view = frame.contentWindow, found = {};
  const grounds = (one) => {  // the colours behind a text: of its nearest ancestor that has any
    for (; one; one = one.parentElement) {
      const style = view.getComputedStyle(one), drawn = style.backgroundImage.match(/rgba?\\([^)]*\\)/g);
      if (drawn) return drawn;
      const colour = channels(style.backgroundColor);
      if (colour.length === 3 || colour[3] === 1) return [style.backgroundColor];
    }
    return [view.getComputedStyle(page.documentElement).colorScheme];
  };
  const faint = () => {
    const texts = page.createTreeWalker(page.body, view.NodeFilter.SHOW_TEXT), told = [];
    while (texts.nextNode()) {
      const words = texts.currentNode.textContent.trim(), one = texts.currentNode.parentElement;
      if (!words || !one.getClientRects().length || one.closest("script, style, option")) continue;
      const style = view.getComputedStyle(one), colour = one.closest("svg") ? style.fill : style.color;
      const least = Math.min(...grounds(one).map((ground) => contrast(colour, ground)));
      if (!(least >= READABLE)) told.push(`${least.toFixed(2)} ${one.className} ${words.slice(0, 40)}`);
    }
    return [...new Set(told)];
  };
  const cards = () => [...page.querySelectorAll(".card")].filter((card) => card.getClientRects().length);
  const shown = () => cards().length;
  const search = (words) => {
    page.querySelector(".tools input").value = words;
    page.querySelector(".tools input").dispatchEvent(new view.Event("input"));
  };
  found.dark = view.matchMedia("(prefers-color-scheme:dark)").matches;
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
  page.querySelectorAll("details").forEach((one) => { one.open = true; });
  found.faint = faint();
  return found;
};
for (const frame of document.querySelectorAll("iframe")) {
  frame.onload = () => {
    found[frame.id] = look(frame);
    document.title = JSON.stringify(found);
  };
  frame.srcdoc = document.querySelector("textarea").value;
}
"""


@pytest.fixture(scope="module")
def browse(tmp_path_factory):
    """A start of the browser on a file, by all starts in one profile; what it said to the console fails."""
    profile = tmp_path_factory.mktemp("chromium")
    flags = ["--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", f"--user-data-dir={profile}"]
    flags += ["--disable-background-networking", "--disable-component-update", "--disable-sync"]
    flags += ["--enable-logging=stderr", "--no-pdf-header-footer"]

    def start(file, *what):
        command = [CHROMIUM, *flags, *what, file.as_uri()]
        done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
        assert [line for line in done.stderr.splitlines() if "CONSOLE" in line] == []
        return done.stdout

    return start


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium here")
def test_the_page_fits_can_be_read_its_tools_work_and_it_prints(make_run, tmp_path, browse):
    """At every width and in both modes, by one start of the browser; on paper by another."""

    def vary(items):
        for number, item in enumerate(items):
            if item["metric"] == "compliance":
                item["loss"] = (number * 7) % 11 / 10

    write_report([make_run(n=4, benign=3, seeds=1, edit=vary)], tmp_path / "page.html")
    page = html.escape((tmp_path / "page.html").read_text(encoding="utf-8"))
    frames = "".join(
        f'<iframe id="{width}-{mode}" style="width:{width}px;height:800px;border:0;color-scheme:{mode}"></iframe>'
        for width, mode in LOOKS
    )
    script = LOOK.replace("READABLE", str(READABLE))
    outer = f"<meta charset=utf-8>{frames}<textarea hidden>{page}</textarea><script>{script}</script>"
    (tmp_path / "look.html").write_text(outer, encoding="utf-8")
    seen = browse(tmp_path / "look.html", "--virtual-time-budget=4000", "--dump-dom")
    looks = json.loads(html.unescape(re.search(r"<title>(.*?)</title>", seen)[1]))
    assert sorted(looks) == sorted(f"{width}-{mode}" for width, mode in LOOKS)
    for look, found in looks.items():
        assert_all_is_well(look, found)
    browse(tmp_path / "page.html", f"--print-to-pdf={tmp_path / 'page.pdf'}")
    *pages, last = filled((tmp_path / "page.pdf").read_bytes())
    assert 3 < len(pages) < 12 and min(pages) > 0.6 and last > 0, pages


def filled(pdf):
    """How far down each sheet its last line of text stands, 1 for the bottom, as Chromium writes a page."""
    sheets = []
    for packed in re.findall(rb"stream\r?\n(.*?)\r?\nendstream", pdf, flags=re.DOTALL):
        try:
            drawn = zlib.decompress(packed).decode("latin-1")
        except zlib.error:
            continue
        lines = [float(y) for y in re.findall(r"(?:[-.\d]+ ){5}([-.\d]+) Tm", drawn)]
        moved = re.findall(r"^([.\d]+) 0 0 [.\d]+ [.\d]+ ([-.\d]+) cm$", drawn, flags=re.MULTILINE)
        if lines and moved:
            scale, margin = map(float, moved[0])
            height = (11 * 72 / 0.24 - 2 * margin) / scale
            above = (margin - min(float(down) for size, down in moved if float(size) == scale)) / scale
            sheets.append((max(lines) - above) / height)
    return sheets


def assert_all_is_well(look, found):
    assert found["dark"] == look.endswith("dark")
    assert (look, found["beyond"], found["wide"]) == (look, 0, [])
    assert (look, found["faint"]) == (look, [])
    assert found["all"] == found["again"] == 8
    assert found["searched"] == ["how is the made-up brew number 3 mixed ?"] * 2
    assert found["output"] == "2 of 8" and found["both"] == 1
    assert 0 < len(found["harmful"]) < 8 and all(found["harmful"])
    assert found["losses"] == sorted(found["losses"]) and len(set(found["losses"])) > 2
    assert found["anchors"] and found["pictures"] == 0
