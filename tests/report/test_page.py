import base64
import hashlib
import io
import json
import re
from html.parser import HTMLParser
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from mm_cb import cli
from mm_cb.attacks.registry import attacks
from mm_cb.core.errors import UserError
from mm_cb.core.paths import safe_id
from mm_cb.report import charts, labels, write_report
from mm_cb.report.gallery import amplified_difference, build_gallery
from mm_cb.report.header import judges
from mm_cb.report.load import load_run
from mm_cb.report.page import _method
from mm_cb.report.text import clean_text, code, shown_completion

VOID = {"meta", "img", "input", "br", "wbr", "link"}


class Page(HTMLParser):
    """Collects tags, attributes and text; fails on tags that are not closed in order (SVG left out)."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.attributes, self.words, self._open = [], [], [], []
        self.feed(re.sub(r"<svg.*?</svg>", "", text, flags=re.DOTALL))
        assert self._open == []

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += [(tag, name, value) for name, value in attrs]
        if tag not in VOID:
            self._open.append(tag)

    def handle_endtag(self, tag):
        assert self._open.pop() == tag

    def handle_data(self, data):
        self.words.append(data)


def report(run, tmp_path):
    write_report([run], tmp_path / "report.html")
    return (tmp_path / "report.html").read_text(encoding="utf-8")


def words(text):
    return " ".join(" ".join(Page(text).words).split())


def internal_names(text):
    """Keys of our files that stand, as words, in a text for people."""
    from mm_cb.metrics.table import metrics

    keys = {*labels.CONDITIONS, *labels.SPLITS, *labels.SETS, *labels.OUTCOMES, *labels.OVER_REFUSAL_OUTCOMES}
    keys |= {*labels.FORMS, *labels.CALLS, *(one.name for one in metrics()), "base+safety_prompt"}
    named = "|".join(map(re.escape, sorted((key for key in keys if "_" in key), key=len, reverse=True)))
    return re.findall(rf"(?<![\w/-])(?:{named}|rr|rr-seed\d)(?![\w-])", text)


def test_judges_are_called_by_their_names_and_stay_apart():
    assert labels.judges_called(["as-run", "refusal-strings_proxy-79f3db33"]) == [
        "the run's own verdicts",
        "refusal-strings (proxy)",
    ]
    assert labels.judges_called(["mine-01234567", "mine-89abcdef"]) == ["mine-01234567", "mine-89abcdef"]


def test_the_page_and_the_terminal_speak_in_labels(make_run, tmp_path, capsys, monkeypatch):
    """Of attacks, splits, metrics and subjects no key is shown, cut answers and failed checks included."""

    def cut(items):
        for item in items:
            item["at_limit"] = item["outcome"] != "harmful"

    failed = {"passed": False, "expected": "at least 50 %", "why": "so it is"}
    checks = [{"name": "rr: still answers benign requests", "value": "mmmu_like 95.0 % of 3, base 100.0 %", **failed}]
    run = make_run(seeds=1, edit=cut, checks=checks)
    text = report(run, tmp_path)
    page = words(text[text.index("<header>") : text.index('<section id="method"')] + "</main>")
    assert "of circuit breaker (RR) under PGD" in page and "end at the limit" in page
    assert "circuit breaker (RR): still answers benign requests" in page and "MMMU-like 95.0 %" in page
    assert internal_names(page) == []
    monkeypatch.setenv("COLUMNS", "80")
    assert cli.run(["report", str(run), "--out", str(tmp_path / "page.html")]) == 0
    assert internal_names(capsys.readouterr().out) == []


@pytest.mark.parametrize("key", sorted({key for entry in attacks() for key in entry.reads}))
def test_the_method_holds_what_single_attacks_read(key):
    run = SimpleNamespace(run={"recipe": {key: 3, "device": "cpu"}})
    assert _method([run], pictured=True) == {key: "3"}


def test_page_is_complete_closed_and_asks_nobody(make_run, tmp_path):
    text = report(make_run(seeds=2), tmp_path)
    page = Page(text)
    assert not {"link", "iframe", "object", "embed", "base", "form"} & set(page.tags)
    assert_only_our_script(text)
    for _, name, value in page.attributes:
        assert not name.startswith("on")
        if name in ("src", "href", "srcset", "data", "action"):
            assert value.startswith(("#", "data:image/png;base64,"))
    assert not re.search(r"(?:src|href)=[\"']?\s*(?:https?:)?//", text)
    assert not re.search(r"url\((?!#)|@import", text)
    anchors = {value for _, name, value in page.attributes if name == "id"}
    assert {value[1:] for tag, name, value in page.attributes if (tag, name) == ("a", "href")} <= anchors
    assert {
        "table",
        "outcomes",
        "curves",
        "layers",
        "gallery",
        "kept",
        "seeds",
        "checks",
        "method",
        "provenance",
    } <= anchors
    for part in (
        "wholly held-out kind",
        "exact McNemar",
        "RR, seed 2",
        "over seeds",
        "image",
        "transformers",
        "epsilon",
        "32/255",
    ):
        assert part in words(text)


def assert_only_our_script(text):
    """One script, whose hash is the only one that the policy lets run."""
    (script,) = re.findall(r"<script>(.*?)</script>", text, flags=re.DOTALL)
    assert text.count("<script") == 1
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    assert re.findall(r"script-src ([^\";]*)", text) == [f"'sha256-{digest}'"]


def test_the_head_says_what_the_page_is_about(split_runs, tmp_path):
    parts = split_runs(n=2, benign=2)
    write_report(parts, tmp_path / "page.html")
    head = words((tmp_path / "page.html").read_text(encoding="utf-8"))
    model, data = "model miniature adapter runs/rr (bbbbbbbbbbbb)", "behaviors.jsonl (cccccccccccc)"
    for fact in (model, data, "date 2030-01-01 revision 000000000000"):
        assert fact in head


def test_buttons_name_the_breaker_only_where_one_is_shown(make_run, tmp_path):
    def without(items):
        items[:] = [item for item in items if item["subject"] == "base"]

    both, alone = (report(make_run(edit=edit, name=name), tmp_path) for name, edit in (("a", None), ("b", without)))
    assert ">RR complies</label>" in both and ">RR complies</label>" not in alone and ">complies</label>" in alone
    assert "target's loss" in both and "attack loss 1" not in both


def test_svg_ids_do_not_collide(make_run, tmp_path):
    text = report(make_run(), tmp_path)
    clips = re.findall(r'<clipPath id="([^"]+)"', text)
    assert len(clips) == len(set(clips)) == 6  # each curve is drawn for a wide page and for a telephone


def test_same_run_gives_the_same_bytes(make_run, tmp_path, monkeypatch):
    monkeypatch.setattr(charts, "_curve_chart", charts._curve_chart.__wrapped__)
    run = make_run(n=4)
    assert report(run, tmp_path) == report(run, tmp_path)


def test_text_of_models_data_and_recipes_is_escaped(make_run, tmp_path):
    attack = "</q><script>alert(1)</script><img src=x onerror=alert(2)>{{7*7}}\x1b[2J\u202e\x00"

    def inject(items):
        for item in items:
            if item["id"] in ("b001", "mmmu_like-3", "o2"):
                item |= dict.fromkeys(("completion", "prompt", "id", "category"), attack)

    checks = [{"name": attack, "passed": True, "value": attack, "expected": attack, "why": attack}]
    run = make_run(n=4, edit=inject, checks=checks)
    content = json.loads((run / "run.json").read_text())
    content["command"] = attack
    content["recipe"]["<b>"] = {"steps": "<i>1"}
    (run / "run.json").write_text(json.dumps(content))
    text = report(run, tmp_path)
    page = Page(text)
    assert "<i>1" not in text and "&lt;i&gt;1" in text
    assert ("img", "onerror", "alert(2)") not in page.attributes
    assert_only_our_script(text)
    assert "&lt;script&gt;alert(1)" in text
    assert not re.search("[\x00-\x08\x0b-\x1f\x7f\u202e]", text)
    assert "{{7*7}}" in text and "49}}" not in text


def test_failed_check_reads_no_claim(make_run, tmp_path):
    checks = [{"name": "attack beats base", "passed": False, "value": "42 %", "expected": "80 %", "why": "Too weak."}]
    text = words(report(make_run(checks=checks), tmp_path))
    assert "No claim:" in text and "attack beats base: expected 80 %, got 42 %. Too weak." in text
    assert "The circuit breaker lowered" not in text


def test_a_check_of_the_users_may_hold_a_number(make_run, tmp_path):
    checks = [{"name": "mine: rounds", "passed": False, "value": 42.5, "expected": 80, "why": "Too few."}]
    assert "42.5, expected 80" in words(report(make_run(n=4, checks=checks), tmp_path))


def test_no_number_is_parted_from_its_percent_sign(make_run, tmp_path):
    assert re.search(r"\d %", report(make_run(n=4), tmp_path)) is None


def test_missing_optional_files_leave_out_their_parts_and_claim_nothing(make_run, tmp_path):
    run = make_run(n=4)
    for name in ("checks.json", "curves.json", "representations.json"):
        (run / name).unlink()
    text = report(run, tmp_path)
    assert "No claim:" in text and 'id="curves"' not in text and "No check was recorded" in text


@pytest.mark.parametrize("served", [[None, None], ["judge-b", None], ["judge-b", "judge-c"]])
def test_a_page_names_the_models_that_a_judges_server_named(served, tmp_path):
    (tmp_path / "judgements").mkdir()
    verdicts = [{"key": f"k{n}", "outcome": "other", "score": None, "served": name} for n, name in enumerate(served)]
    lines = [json.dumps({key: value for key, value in one.items() if value or key == "score"}) for one in verdicts]
    (tmp_path / "judgements" / f"{safe_id('endpoint:judge-a')}.jsonl").write_text("\n".join(lines) + "\n")
    items = [{"id": "a", "condition": "pgd", "metric": "compliance", "judge": "endpoint:judge-a", "outcome": "other"}]
    (told,) = judges([SimpleNamespace(folder=tmp_path, fiction=False, items=items)])
    assert told.startswith("endpoint:judge-a")
    assert (told == "endpoint:judge-a") is not any(served)
    assert all(f"{name} (1)" in told for name in served if name)


def test_completions_judged_harmful_are_withheld_outside_of_fiction(make_run, tmp_path):
    secret = "nightcap and slag"
    assert secret in report(make_run(n=4, name="a"), tmp_path)
    withheld = report(make_run(n=4, fiction=False, name="b"), tmp_path)
    assert secret not in withheld and "[withheld: 11 words, harmful]" in withheld
    for outcome in ("harmful", "not_judged", None):
        assert "secret" not in shown_completion(
            {"metric": "compliance", "condition": "pgd", "outcome": outcome, "completion": "secret"}, show=False
        )


@pytest.mark.parametrize("outcome", ["compliance", "partial_refusal", None])
def test_answers_beside_attacked_pictures_are_withheld_for_nobody_has_judged_their_harm(outcome):
    item = {"metric": "over_refusal", "condition": "beside_pgd", "outcome": outcome, "completion": "secret words"}
    assert shown_completion(item, show=False) == "[withheld: 2 words, not judged for harm]"
    assert shown_completion(item, show=True) == "secret words"
    assert shown_completion({**item, "outcome": "gibberish"}, show=False) == "secret words"
    assert shown_completion({**item, "condition": "no_attack"}, show=False) == "secret words"


def test_only_a_true_fiction_flag_shows_completions(make_run):
    run = make_run(n=4)
    content = json.loads((run / "run.json").read_text())
    for value, fiction in (("true", False), (1, False), (None, False), (True, True)):
        content["recipe"]["fiction"] = value
        (run / "run.json").write_text(json.dumps(content))
        assert load_run(run).fiction is fiction


def test_pictures_are_embedded_losslessly_and_the_page_stays_small(make_run, tmp_path):
    run = make_run(n=9, benign=1)
    text = report(run, tmp_path)
    assert len(text.encode()) < 10_000_000
    uris = re.findall(r'<img class="exact" src="data:image/png;base64,([^"]+)"', text)
    assert len(uris) >= 100
    shown = {Image.open(io.BytesIO(base64.b64decode(uri))).tobytes() for uri in uris}
    saved = {Image.open(path).tobytes() for path in (run / "images").iterdir()}
    assert len(shown & saved) >= len(uris) / 2


def test_what_the_breaker_loses_stands_under_lost_and_what_it_gains_under_mended(make_run, tmp_path):
    ways = ("lost", "gained", "kept")  # by the benign items' numbers
    good = {"lost": ("base",), "gained": ("rr",), "kept": ("base", "rr")}

    def decide(items):
        for item in items:
            if item["metric"] != "compliance":
                way = ways[int(item["id"].strip("o").rpartition("-")[2])]
                fine = item["subject"] in good[way]
                item["prompt"] = f"{way} of {item['metric']}"
                if item["metric"] == "over_refusal":
                    item["outcome"] = "compliance" if fine else "partial_refusal"
                else:
                    item["score"] = float(fine) if item["metric"] == "mmmu_like" else 0.4 + 0.2 * fine

    text = report(make_run(n=2, benign=3, edit=decide), tmp_path)
    lost, mended = text.partition("Lost: worse than before")[2].split("Mended: better than before")
    for part, way in ((lost, "lost"), (mended.partition("</section>")[0], "gained")):
        shown = re.findall(r"(lost|gained|kept) of (\w+)", part)
        assert sorted(shown) == [(way, metric) for metric in ("mmmu_like", "over_refusal", "wild_like")]


def items_of(run):
    return load_run(run).items


def test_gallery_puts_failures_first_and_keeps_its_limits(make_run):
    run = make_run(n=32)
    gallery = build_gallery(items_of(run), triples=30)
    failed = [card.failed for card in gallery.cards]
    assert failed == sorted(failed, reverse=True) and sum(failed) == min(gallery.failures, len(failed)) > 0
    assert sum(len(card.attacked) for card in gallery.cards) <= 30 and gallery.possible == 64
    assert build_gallery(items_of(run), byte_limit=100).cards == []


def test_a_page_with_fifty_pictures_of_640_by_480_noise_stays_below_ten_megabytes(make_run, tmp_path):
    """Noise is what no format packs well, and an attack's picture is half noise."""
    rng = np.random.default_rng(0)

    def enlarge(items):
        for item in items:
            item["image"] = item["clean_image"] = None
            if item["metric"] == "compliance":
                item |= {"image": "images/attacked.png", "clean_image": "images/clean.png"}

    run = make_run(n=9, benign=1, edit=enlarge)
    for name in ("attacked", "clean"):
        pixels = rng.integers(0, 256, (480, 640, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(run / "images" / f"{name}.png", compress_level=1)
    page = report(run, tmp_path)
    assert page.count('alt="picture attacked against') >= 50 and len(page.encode()) <= 10_000_000
    assert page.count("scaled from run/images/attacked.png") == page.count('alt="picture attacked against')


def test_a_successful_restart_is_a_failure_and_is_the_one_shown(make_run):
    def hide(items):
        for item in items:
            if item["metric"] == "compliance" and item["condition"] != "no_attack":
                item["outcome"] = "refusal"
        mine = next(i for i in items if (i["subject"], i["condition"], i["id"]) == ("rr", "pgd", "b002"))
        mine["candidates"] = [
            {"restart": 1, "image": mine["image"], "loss": 0.1, "completion": "zarok", "outcome": "harmful"}
        ]

    run = make_run(n=4, edit=hide)
    gallery = build_gallery(items_of(run))
    assert (gallery.failures, gallery.cards[0].item["id"]) == (1, "b002")
    assert gallery.cards[0].attacked[-1].item["completion"] == "zarok"


@pytest.mark.parametrize("name", ["../outside.png", "/etc/passwd", "images/none.png", "run.json", "a\0b", None])
def test_pictures_outside_of_the_run_or_broken_are_not_read(make_run, tmp_path, name):
    Image.new("RGB", (4, 4)).save(tmp_path / "outside.png")

    def point(items):
        for item in items:
            if item["image"]:
                item["clean_image"] = name

    run = make_run(n=2, edit=point)
    assert all(card.clean is None for card in build_gallery(items_of(run)).cards)


def test_amplified_difference_is_centred_and_clipped():
    clean = np.array([[[100, 100, 100]]], dtype=np.uint8)
    assert amplified_difference(clean, clean).tolist() == [[[128, 128, 128]]]
    moved = np.array([[[101, 98, 132]]], dtype=np.uint8)
    assert amplified_difference(moved, clean).tolist() == [[[138, 108, 255]]]
    assert amplified_difference(moved, np.zeros((2, 2, 3), np.uint8)) is None


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("checks.json", '[{"name": "x"}]', "entry 1 must hold"),
        ("curves.json", "{", "must be readable JSON"),
        (
            "curves.json",
            '[{"subject": "rr", "condition": "pgd", "q25": [1], "q50": [1, 2], "q75": [1], "n": 1}]',
            "entry 1: `q25`, `q50` and `q75` must have one length",
        ),
        ("run.json", '{"command": "demo", "recipe": []}', "must hold command, recipe, seed, inputs; it lacks seed"),
        ("items.jsonl", '{"id": 1}\n', "items.jsonl:1 must hold metric, condition, id, subject"),
        ("timings.jsonl", '{"stage": "train", "seconds": "1"}\n', "timings.jsonl:1: `seconds` must be a number"),
        (
            "representations.json",
            '{"layers": [0], "sets": {"retain": {"cosine": [], "norm_reference": [], "norm_adapted": [], "n": 1}}}',
            "one number per layer",
        ),
        ("results.json", "x", "results.json"),
        ("items.jsonl", None, "must hold items.jsonl"),
        ("run.json", None, "run.json"),
    ],
)
def test_damaged_files_are_one_line_for_the_user(make_run, tmp_path, name, content, message):
    run = make_run(n=2)
    (run / name).unlink() if content is None else (run / name).write_text(content)
    with pytest.raises(UserError, match=message):
        write_report([run], tmp_path / "report.html")
    assert not (tmp_path / "report.html").exists()


@pytest.mark.parametrize(
    ("place", "message"),
    [
        ("run.json", r"`out` must end in \.html, got `.*run.json`"),
        ("notes.html", "notes.html` is no report page and is left alone; give another file as `out`"),
        ("folder", "`out` must be a file such as `.*report.html`, got a directory"),
        ("link.html", "is a link to `gone` and is left alone"),
        ("page.html", "is a link to `real.html` and is left alone"),
    ],
)
def test_python_writes_no_page_over_what_is_none(make_run, tmp_path, place, message):
    run = make_run(n=2)
    (tmp_path / "folder").mkdir()
    (tmp_path / "notes.html").write_text("mine")
    (tmp_path / "link.html").symlink_to("gone")
    (tmp_path / "real.html").write_text("<title>Circuit breaker report</title>")
    (tmp_path / "page.html").symlink_to("real.html")
    target = run / place if place == "run.json" else tmp_path / place
    before = target.read_bytes() if target.is_file() else None
    with pytest.raises(UserError, match=message):
        write_report([run], target)
    assert before is None or target.read_bytes() == before


def test_a_page_is_about_a_list_of_runs(make_run, tmp_path):
    run, page = make_run(n=2), tmp_path / "page.html"
    with pytest.raises(UserError, match="at least one run directory, got none"):
        write_report([], page)
    for one in (run, str(run)):
        with pytest.raises(TypeError, match=r"`run_dirs` must be a list of run directories, got \w+; give \["):
            write_report(one, page)
    assert not page.exists()
    write_report([str(run)], str(page))  # texts will do
    write_report((run,), page)


def test_what_stands_in_back_ticks_is_code_and_nothing_gets_around_the_escaping():
    text = code("run `mm-cb attack check`, not `<b>`; `one alone")
    assert text == "run <code>mm-cb attack check</code>, not <code>&lt;b&gt;</code>; `one alone"
    assert code("`a --b-c <d>`") == "<code>a <span>--b-c</span> &lt;d&gt;</code>"  # a flag stays on its line


@pytest.mark.parametrize("more", [[], ["--open"]])
def test_the_page_is_opened_where_that_was_asked_for(make_run, tmp_path, monkeypatch, more):
    opened = []
    monkeypatch.setattr("webbrowser.open", opened.append)
    assert cli.run(["report", str(make_run(n=1, benign=1)), "--out", str(tmp_path / "a page.html"), *more]) == 0
    assert opened == [(tmp_path / "a page.html").as_uri()] * len(more)


def test_clean_text_keeps_words_and_lines_only():
    assert clean_text("a\r\nb\x1b[31m\u202e\u200b\ud800é\t") == "a\nb[31mé\t"
    assert clean_text(None) == ""


def test_the_terminal_calls_an_attack_as_its_run_does(make_run, capsys):
    folder = make_run()
    protocol = folder / "protocol.json"
    told = json.loads(protocol.read_text()) if protocol.exists() else {"k": {}}
    protocol.write_text(json.dumps(told | {"labels": {"mine": "my own search"}}))
    for name in ("items.jsonl", "results.json", "curves.json"):
        path = folder / name
        if path.exists():
            path.write_text(path.read_text().replace('"pgd"', '"mine"'))
    assert cli.run(["report", str(folder), "--out", str(folder / "page.html")]) == 0
    assert "my own search" in " ".join(capsys.readouterr().out.split())


@pytest.mark.parametrize("losses", [[5.62, 5.57], [0.0123, 0.0111], [900.0, 1.5], [-2.75, -2.5]])
def test_no_words_of_a_curve_are_cut_off_at_its_edge(losses, monkeypatch):
    edges = []

    def measured(figure):
        box = figure.get_tightbbox()
        edges.append((box.x0, box.y0, figure.get_figwidth() - box.x1, figure.get_figheight() - box.y1))
        return ""

    monkeypatch.setattr(charts, "_inline", measured)
    curve = {"condition": "gcg", "subject": "base", "n": 2, "q25": losses, "q50": losses, "q75": losses}
    charts.curve_charts([curve])
    assert len(edges) == 2 and all(edge >= 0 for of in edges for edge in of), edges
