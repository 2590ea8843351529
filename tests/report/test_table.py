import dataclasses
import io
import re

from rich.console import Console

from mm_cb.attacks.registry import attacks
from mm_cb.metrics.results import Measurement, read_results
from mm_cb.report import headline_table, print_table
from mm_cb.report.strength import Strength


def printed(run, width, encoding="utf-8"):
    raw = io.BytesIO()
    file = io.TextIOWrapper(raw, encoding=encoding)
    print_table(run, Console(file=file, width=width))
    file.flush()
    return raw.getvalue().decode(encoding)


def test_rows_hold_the_headline_quantities_in_order(make_run):
    table = headline_table(read_results(make_run(n=24) / "results.json"))
    assert table.subjects == ("base", "base+safety_prompt", "rr")
    assert [row.label for row in table.rows] == [
        "no attack", "random noise", "PGD", "adaptive PGD", "worst of all attacks",
        *["trained kinds", "like those trained on", "held-out combinations", "wholly held-out kind"] * 2,
        "MMMU-like", "Wild-like", "over-refusal", "broken text",
    ]  # fmt: skip
    pgd = table.rows[2]
    assert (pgd.n, pgd.paired.paired_with, pgd.p) == ("24", "base", "< 0.001")
    assert table.notes[0].endswith("2 tries per item.")


def test_nothing_of_it_is_lost_on_a_narrow_terminal(make_run):
    run = make_run(n=4)
    wide, *others = ("".join(sorted("".join(printed(run, width).split()))) for width in (300, 1, 5, 20, 60, 100))
    assert all(one == wide for one in others)


def test_notes_say_where_an_attack_is_only_repeated(make_run):
    def repeat(items):
        for item in items:
            if item["condition"] == "pgd_adaptive" and item["subject"] != "rr":
                item["same_as"] = "pgd"

    notes = headline_table(read_results(make_run(edit=repeat) / "results.json")).notes
    assert "base: PGD, 1 try per item" in notes[0]
    assert "circuit breaker (RR): PGD + adaptive PGD, 2 tries per item" in notes[0]
    assert "(base, base + safety prompt) that is PGD" in notes[1]


def test_a_clean_teacher_on_the_breaker_alone_is_explained_and_counts_in_the_worst_case(make_run):
    def rename(items):
        for item in [item for item in items if item["condition"] == "pgd_adaptive"]:
            item["condition"] = "pgd_clean_teacher"
            if item["subject"] != "rr":
                items.remove(item)

    table = headline_table(read_results(make_run(edit=rename) / "results.json"))
    assert "clean-teacher PGD" in [row.label for row in table.rows]
    assert any(note.startswith("Clean-teacher PGD pulls") for note in table.notes)
    assert "circuit breaker (RR): PGD + clean-teacher PGD, 2 tries per item" in table.notes[0]


def test_quantities_nobody_measured_have_no_row_and_no_invented_zero():
    assert headline_table([]).rows == ()


def test_items_without_a_verdict_are_named(make_run):
    def unjudge(items):
        items[2]["outcome"] = "not_judged"

    table = headline_table(read_results(make_run(n=24, edit=unjudge) / "results.json"))
    assert "PGD (1)" in table.notes[-1]
    assert table.rows[2].n == "23/24/24"


def test_terminal_table_fits_every_width(make_run):
    run = make_run()
    for width in (80, 100, 140):
        text = printed(run, width)
        assert max(map(len, text.splitlines())) <= width
        assert "…" not in text and ("wholly held-out kind" if width > 80 else "wholly") in text
        assert "base + prompt" in text
    assert "PGD" in printed(run, 100, encoding="ascii")


def test_a_section_that_a_proxy_judged_says_so_once(make_run):
    found = [
        dataclasses.replace(m, counts={**m.counts, "proxy": m.n}) if m.metric == "compliance" else m
        for m in read_results(make_run(n=24) / "results.json")
        if m.condition != "worst_case"
    ]
    worst = [m for m in read_results(make_run(n=24, name="again") / "results.json") if m.condition == "worst_case"]
    table = headline_table([*found, *worst])
    attacked = next(heading for heading, rows in table.sections() if rows[0].label == "no attack")
    assert attacked in table.proxied()
    assert all("by a proxy" in row.remarks for row in dict(table.sections())[attacked])
    file = io.StringIO()
    print_table([*found, *worst], Console(file=file, width=160))
    assert "complies, %, by a proxy" in file.getvalue() and file.getvalue().count("by a proxy") <= len(table.proxied())


def test_a_model_of_text_alone_misses_only_what_it_can_have():
    found = [Measurement("rr", "compliance", name, "all", 0.0, 12) for name in ("no_attack", "gcg")]
    missed = headline_table(found, pictured=False).unmeasured
    texts = [entry for entry in attacks() if not (entry.needs_picture or entry.imported)]
    by_texts, probed = ({e.label for e in texts if e.needs_probe == aimed} for aimed in (False, True))
    assert probed and not probed & set(missed)
    assert set(missed) >= {*by_texts, "base", "over-refusal"} - {"no attack", "suffix search (GCG)"}
    pictured = {entry.label for entry in attacks() if entry.needs_picture} | {"MMMU", "LLaVA-Wild"}
    assert not pictured & set(missed) and pictured & set(headline_table(found).unmeasured)


def test_what_is_remarked_of_an_attack_stays_below_it_on_a_small_terminal(make_run):
    found = read_results(make_run(n=24) / "results.json")
    strengths = [Strength("rr", "pgd", "opening", knows_breaker=False, state="not converged", why="", counted=True)]
    file = io.StringIO()
    print_table(found, Console(file=file, width=72), strengths=strengths)
    lines = [line for line in file.getvalue().splitlines() if re.search(r"opening|converged|too low", line)]
    assert lines and all(line.startswith("    ") for line in lines)
