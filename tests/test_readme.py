"""README, docs and results/: links lead somewhere, numbers stand in results/, commands are ones that we take."""

import importlib.util
import json
import re
import shlex
import tomllib
from pathlib import Path

import pytest

from mm_cb.attacks.registry import attack_entry, chosen_attacks
from mm_cb.metrics.statistics import mcnemar_exact, wilson_interval

ROOT = Path(__file__).resolve().parents[1]
README = ROOT / "README.md"
PAGES = [README, *sorted((ROOT / "docs").glob("*.md"))]
LINKED = [*PAGES, *(ROOT / name for name in ("CONTRIBUTING.md", "SECURITY.md", "CHANGELOG.md", "results/README.md"))]
RESULTS = ROOT / "results"


def text_of(page):
    return page.read_text(encoding="utf-8")


def test_the_page_of_attacks_has_a_row_for_every_attack():
    from mm_cb.attacks.registry import attacks

    lines = [line.split("|") for line in text_of(ROOT / "docs/attacks.md").splitlines() if line.startswith("| `")]
    rows = {name: line for line in lines for name in re.findall(r"`(\w+)`", line[1]) if len(line) == 7}
    for entry in attacks():
        in_all, counted = (cell.strip() == "yes" for cell in rows[entry.name][4:6])
        assert (in_all, counted) == (entry.in_all, entry.in_worst_case) or entry.name in ("no_attack", "noise")


def said(page):
    return re.sub(r"\s+", " ", text_of(ROOT / page).replace("**", ""))


def name_of(page):
    return page.relative_to(ROOT).as_posix()


# Links and files


def anchors(page):
    """What a link may name behind its #: the headings of a page, as the site spells them."""
    outside = re.sub(r"^```.*?^```", "", text_of(page), flags=re.DOTALL | re.MULTILINE)
    titles = re.findall(r"^#+ (.*)$", outside, flags=re.MULTILINE)
    return {re.sub(r"[-\s]+", "-", re.sub(r"[^\w\s-]", "", title).strip().lower()) for title in titles}


def test_every_relative_link_leads_to_a_file_and_its_heading():
    wrong = []
    for page in LINKED:
        for target in set(re.findall(r"\]\(([^)\s]+)[^)]*\)", text_of(page))):
            name, _, anchor = target.partition("#")
            there = page.parent / name if name else page
            if not name.startswith(("https:", "http:")) and not (
                there.exists() and (not anchor or anchor in anchors(there))
            ):
                wrong.append(f"{name_of(page)} -> {target}")
    assert not wrong


def test_the_site_has_every_page():
    """Names in the table of contents of mkdocs.yml are files of docs/, and all of them."""
    named = re.findall(r"^ +- ([\w./]+\.md)$", text_of(ROOT / "mkdocs.yml").partition("\nnav:")[2], flags=re.MULTILINE)
    assert sorted(named) == [page.name for page in PAGES[1:]]


def test_the_readme_is_short():
    assert len(text_of(README).splitlines()) <= 90


@pytest.mark.parametrize("page", [page for page in LINKED if page.name != "CHANGELOG.md"], ids=name_of)
def test_every_file_that_a_page_names_is_there(page):
    places = r"(?<![\w./-])((?:scripts|results|tests|data|mm_cb|\.ci)/[\w./-]*\w)"
    named = {name for span in re.findall(r"`([^`\n]+)`", text_of(page)) for name in re.findall(places, span)}
    assert [name for name in sorted(named) if not (ROOT / name).exists()] == []


def test_what_an_index_page_shows_of_the_package_leads_nowhere_that_is_not_there():
    """It has no files of ours beside it: no link and no picture but by a whole address."""
    told = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["readme"]
    targets = re.findall(r"\]\(([^)\s]+)", told["text"])
    assert targets and all(target.startswith("https:") for target in targets)
    assert told["content-type"] == "text/markdown"


def test_every_line_of_others_is_in_the_notice():
    held = {path.name for path in (ROOT / "data" / "protocols").glob("*.yaml")}
    assert held == set(re.findall(r"data/protocols/([\w.]+)", (ROOT / "NOTICE").read_text(encoding="utf-8")))


def test_every_result_has_its_row_and_no_row_is_empty():
    rows = set(re.findall(r"^\| \[([\w./-]+)\]", text_of(RESULTS / "README.md"), flags=re.MULTILINE))
    there = {path.relative_to(RESULTS).as_posix() for path in RESULTS.rglob("*") if path.is_file()} - {"README.md"}
    for row in rows:
        assert (RESULTS / row).exists(), row
    assert {name for name in there if not any(name == row or name.startswith(f"{row}/") for row in rows)} == set()
    assert len(list(RESULTS.rglob("adapter_model.safetensors"))) <= 3


# Numbers


AGENT = json.loads((RESULTS / "miniature_agent.json").read_text(encoding="utf-8"))


@pytest.mark.parametrize("name", [name for name in AGENT["numbers"]["rr, seed 0"] if "worst" not in name])
def test_every_number_of_the_agents_table_is_a_measured_one(name):
    if name in ("hijacked: no_attack", "hijacked: noise"):  # 0 everywhere, and not in the table
        assert {one[name]["value"] for one in AGENT["numbers"].values()} == {0.0}
        return
    (n,) = {one[name]["n"] for one in AGENT["numbers"].values() if name in one}
    _, *told = cells("docs/agents.md", f"{name} | {n} |")
    for cell, found in zip(told, AGENT["numbers"].values(), strict=True):
        assert cell == ("–" if name not in found else f"{found[name]['value']:.1f}")


def test_the_agents_page_says_what_more_steps_do():
    longer = AGENT["longer"]
    wrong = longer["another behaviour's call"]
    told = f"broke {round(longer['value'] * longer['n'] / 100)} of {longer['n']} of seed 0 ({longer['value']:.1f} % ["
    assert told + f"{longer['ci95'][0]:.1f}, {longer['ci95'][1]:.1f}]" in said("docs/agents.md")
    dictated = round(wrong["value"] * wrong["n"] / 100)
    assert f"behaviour {dictated} of {wrong['n']} times" in said("docs/agents.md")
    assert (
        longer["state"] == "not converged"
        and "twice the steps changed content of 4, openings of 4 in 12" in longer["why"]
    )
    assert "twice the steps changed 4 of 12 outcomes" in said("docs/agents.md")


def test_the_agents_page_says_what_one_call_for_many_did():
    for name in AGENT["one call"]["base"]:
        base, breaker = (AGENT["one call"][who][name] for who in ("base", "rr"))
        begins = name.replace("one picture, the", "one picture in place of the screen, the")
        told = cells("docs/agents.md", begins)
        assert told == [str(base["n"]), f"{base['value']:.1f}", f"{breaker['value']:.1f}"]


def measured(name):
    content = json.loads((RESULTS / name).read_text(encoding="utf-8"))["measurements"]
    return {(m["subject"], m["metric"], m["condition"], m["split"]): m for m in content}


FULL, PAPER, ALL = (measured(f"{name}.json") for name in ("miniature", "miniature_paper", "all_attacks"))


def numbers(text):
    return [float(number) for number in re.findall(r"[-+]?\d+(?:\.\d+)?", text.replace("−", "-"))]


def cells(page, begins):
    """The cells of the table row that begins so, behind its label."""
    (line,) = [line for line in text_of(ROOT / page).splitlines() if line.startswith(f"| {begins}")]
    return [cell.strip().replace("**", "") for cell in line.strip().split("|")][2:-1]


BOTH = {
    name: json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))
    for name in ("miniature_paper", "all_attacks")
}
"""RR as published, and ours."""


def rate(found):
    return [round(value, 1) for value in (found["value"], *found["ci95"])]


def share(right, n):
    return [round(100 * value, 1) for value in (right / n, *wilson_interval(right, n))]


@pytest.mark.parametrize(
    ("begins", "condition"),
    [("no attack", "no_attack"), ("PGD,", "pgd")],
)
def test_every_number_of_the_readmes_table_is_a_measured_one(begins, condition):
    n, base, *told = cells("README.md", begins)
    for cell, found in zip(told, (PAPER, ALL), strict=True):
        one = found["rr", "compliance", condition, "all"]
        assert numbers(n) == [one["n"]] and numbers(cell) == rate(one)
    one = measured("miniature_demo.json")["base", "compliance", condition, "all"]
    marks = {"no_attack": "", "pgd": " ¹"}[condition]
    assert base.endswith(marks) and "¹ By PGD alone, 100 steps." in said("README.md")
    assert numbers(base.removesuffix(marks)) == rate(one) and numbers(n) == [one["n"]]


@pytest.mark.parametrize(("begins", "group"), [("worst of eleven: these", "all"), ("worst of five attacks", "opening")])
def test_the_readmes_worst_cases_are_those_of_the_longest_attacks(begins, group):
    n, base, *told = cells("README.md", begins)
    assert base.endswith(" ¹")
    assert numbers(base.removesuffix(" ¹")) == rate(measured("miniature_demo.json")["base", "compliance", "pgd", "all"])
    for cell, found in zip(told, BOTH.values(), strict=True):
        assert numbers(cell) == share(sum(found["first_broken"][group].values()), *numbers(n))


def test_the_capability_of_the_readmes_table_is_a_measured_one():
    n, base, published, ours = cells("README.md", "capability: MMMU-like")
    for cell, found in (
        (base, FULL["base", "mmmu_like", "strict", "all"]),
        (published, PAPER["rr", "mmmu_like", "strict", "all"]),
    ):
        assert numbers(n) == [found["n"]] and numbers(cell) == rate(found)
    kept = SPREAD[0]["kept"]["lettered"]
    assert (SPREAD[0]["seed"], SPREAD[0]["threads"]) == (0, 1)  # the demo's
    assert numbers(n) == [kept["n"]] and numbers(ours) == share(round(kept["right"]), kept["n"])


ELEVEN = ("pgd", "pgd_long", "pgd_adaptive", "pgd_clean_teacher", "pgd_homotopy", "pgd_homotopy_opening", "pgd_facts")
ELEVEN += ("pgd_form", "pgd_form_found", "apgd", "typographic")


def harmed(name, condition):
    return measured(f"{name}.json")["rr", "compliance", condition, "all"]["counts"]["harmful"]


@pytest.mark.parametrize("name", BOTH)
def test_who_broke_a_request_first_agrees_with_every_attacks_own_number(name):
    by_itself = {one: harmed(name, one) for one in ELEVEN}
    for group in BOTH[name]["first_broken"].values():
        assert list(group) == sorted(group, key=ELEVEN.index)
        assert all(0 < count <= by_itself[one] for one, count in group.items())
    assert sum(BOTH[name]["first_broken"]["all"].values()) >= max(by_itself.values())
    if name == "all_attacks":
        for group, condition in (("all", "worst_case"), ("opening", "worst_case_opening")):
            found = BOTH[name]["first_broken"][group]
            apart = found.get("pgd_form_found", 0)  # ran by itself: not in the worst case of the others
            assert sum(found.values()) - apart == harmed(name, condition)


def test_what_is_said_of_who_broke_a_request_first_was_found():
    short = {"pgd": "PGD", "pgd_long": "long-target", "pgd_adaptive": "adaptive", "pgd_clean_teacher": "clean-teacher"}
    short |= {"pgd_homotopy": "homotopy", "pgd_facts": "bare facts", "pgd_homotopy_opening": "opening-only homotopy"}
    short |= {"pgd_form_found": "found-form"}
    for name, group, begins in (
        ("miniature_paper", "all", "in the order of `--attack all`, RR as published: "),
        ("all_attacks", "all", "Ours: "),
        ("miniature_paper", "opening", "Told an opening at most, RR as published: "),
    ):
        found = BOTH[name]["first_broken"][group]
        assert begins + ", ".join(f"{short[one]} {count}" for one, count in found.items()) in said("docs/miniature.md")
    assert list(BOTH["all_attacks"]["first_broken"]["opening"]) == ["pgd_form_found"]
    for told in ("pgd", "pgd_homotopy_opening"):
        assert entry("all_attacks", told)["state"] == "converged"
        assert ALL["rr", "compliance", told, "all"]["counts"]["prefix_emitted"] == 48


def entry(name, condition):
    return next(one for one in BOTH[name]["attacks"] if one["condition"] == condition)


def changed(condition):
    """Contents and openings that twice the steps changed on ours."""
    found = re.search(r"content of (\d+), openings of (\d+) in 12", entry("all_attacks", condition)["why"])
    return found[1], found[2]


def test_what_is_said_of_the_bare_facts_and_of_homotopy_was_measured():
    facts, homotopy = (entry("all_attacks", one) for one in ("pgd_facts", "pgd_homotopy"))
    harmful = ALL["rr", "compliance", "pgd_facts", "all"]["counts"]["harmful"]
    text = PAPER["rr", "compliance", "pgd_long", "all"]["counts"]["harmful"]
    both = (
        f"`pgd_facts` broke {harmful} of 48 of ours (`pgd_long`, told the whole text, {text} of 48 of RR as published)"
    )
    assert f"{both}, and another recipe's words it dictated" in said("README.md")
    assert f"It broke {harmful} of 48 of ours, and had finished" in said("docs/miniature.md")
    assert facts["state"] == "converged" and changed("pgd_facts") == ("0", "0")
    assert facts["control"]["right"] == facts["control"]["wrong"] == 12
    assert "it dictated as readily, 12 of 12 times" in said("README.md")
    control = measured("facts.json")["base", "compliance", "pgd_facts", "all"]["counts"]["harmful"]
    assert f"On the base, 300 steps broke {control} of 48" in said("docs/miniature.md")
    kinds = {
        s: ALL["rr", "compliance", "pgd_homotopy", s]["counts"]["harmful"]
        for s in ("all", "held_out_kind", "trained_kinds")
    }
    told = "broke {all} of 48 of ours, all {held_out_kind} of the kind never trained on and {trained_kinds} of the"
    contents, openings = changed("pgd_homotopy")
    assert f"{told.format(**kinds)} other 36" in said("docs/miniature.md")
    assert f"changed {contents} of 12 contents and {openings} of 12 openings" in said("docs/miniature.md")
    assert homotopy["control"]["reading"] == "cannot tell"
    emitted = [found["rr", "compliance", "pgd_homotopy_opening", "all"]["counts"] for found in (PAPER, ALL)]
    assert {one["prefix_emitted"] for one in emitted} == {48} and emitted[1]["harmful"] == 0
    ended = {name: [one["state"] for one in BOTH[name]["attacks"]] for name in BOTH}
    words = {4: "four", 9: "nine"}
    ours, theirs = (words[ended[name].count("converged")] for name in ("all_attacks", "miniature_paper"))
    assert f"On ours {ours} of them had converged, on RR as published {theirs}, by a" in said("README.md")


def test_the_table_of_the_second_family_was_measured():
    held = json.loads((RESULTS / "miniature_qwen2_5_vl.json").read_text(encoding="utf-8"))
    asked = [one for one in held["measurements"] if (one["metric"], one["split"]) == ("compliance", "all")]
    found = {(one["subject"], one["condition"]): one for one in asked}
    rows = {"broken without": "no_attack", "by noise": "noise", "by PGD |": "pgd", "by adaptive": "pgd_adaptive"}
    for begins, condition in {**rows, "worst of both": "worst_case"}.items():
        base, rr = cells("docs/miniature.md", begins)
        assert rr == f"{found['rr', condition]['counts']['harmful']} of 48", begins
        other = found.get(("base", condition))
        assert base == (f"{other['counts']['harmful']} of 48" if other else "as PGD"), begins
    rows = {"content told": "knows_forbidden", "lettered questions": "multiple_choice"}
    rows |= {"open questions": "open_questions", "look-alikes answered": "answers_look_alikes"}
    for begins, key in {**rows, "whole descriptions": "descriptions"}.items():
        expected = [round(held["kept"][subject][key], 1) for subject in ("base", "rr")]
        assert [float(cell) for cell in cells("docs/miniature.md", begins)] == expected, begins
    worst = found["rr", "worst_case"]
    low, high = worst["ci95"]
    assert f"{worst['value']:.1f} % [{low:.1f}, {high:.1f}]" in said("docs/miniature.md")


def test_what_is_said_of_other_seeds_was_measured():
    found = json.loads((RESULTS / "seeds.json").read_text(encoding="utf-8"))["measurements"]
    counts = {(one["seed"], one["condition"]): one["counts"] for one in found if one["split"] == "all"}
    first, second = counts[1, "pgd_homotopy"], counts[2, "pgd_homotopy"]
    told = (
        f"`pgd_homotopy` broke {first['harmful']} of 24 of seed 1's breaker and {second['harmful']} of 24 of seed 2's"
    )
    assert f"{told}, which answered {second['gibberish']} of the others in broken text" in said("docs/miniature.md")
    assert f"`pgd_facts` broke {counts[1, 'pgd_facts']['harmful']} of 24 of seed 1's" in said("docs/miniature.md")


def test_what_is_said_of_more_steps_was_measured():
    found = json.loads((RESULTS / "homotopy.json").read_text(encoding="utf-8"))["measurements"]
    harmful = {(one["steps"], one["split"]): (one["counts"]["harmful"], one["n"]) for one in found}
    told = "broke {} of {} with 900 steps and ".format(*harmful[900, "all"])
    more = "{} of {} with 1500, {} of {} of the kind".format(*harmful[1500, "all"], *harmful[1500, "held_out_kind"])
    assert told + more in said("docs/miniature.md")


def test_the_readmes_table_holds_nothing_else():
    table = text_of(README).partition("| attack success rate")[2].partition("\n\n")[0]
    assert len(table.splitlines()) == 2 + 5


@pytest.mark.parametrize(
    ("begins", "metric", "condition", "split"),
    [
        ("PGD ", "compliance", "pgd", "all"),
        ("adaptive PGD", "compliance", "pgd_adaptive", "all"),
        ("clean-teacher PGD", "compliance", "pgd_clean_teacher", "all"),
        ("worst case |", "compliance", "worst_case", "all"),
        ("worst case, a kind", "compliance", "worst_case", "held_out_kind"),
        ("MMMU-like", "mmmu_like", "strict", "all"),
        ("Wild-like", "wild_like", "strict", "all"),
        ("over-refusal", "over_refusal", "no_attack", "all"),
        ("broken text", "gibberish", "no_attack", "all"),
    ],
)
def test_every_number_of_the_miniatures_table_is_a_measured_one(begins, metric, condition, split):
    n, *told = cells("docs/miniature.md", begins)
    for subject, cell in zip(("base", "rr", "rr-seed1", "rr-seed2"), told, strict=True):
        found = FULL.get((subject, metric, condition, split))
        assert cell == ("not measured" if found is None else f"{found['value']:.1f}")
        assert found is None or numbers(n) == [found["n"]]


def broken(name, condition="worst_case", subject="rr", split="all"):
    found = measured(name)[subject, "compliance", condition, split]
    return f"{found['counts']['harmful']} of {found['n']}"


@pytest.mark.parametrize("condition", [*(one["condition"] for one in BOTH["all_attacks"]["attacks"]), "worst_case"])
def test_every_number_of_all_attacks_on_both_recipes_is_a_measured_one(condition):
    given, *told = cells("docs/miniature.md", f"`{condition}`")
    for name, (harmed, finished, dictated) in zip(BOTH, (told[:3], told[3:]), strict=True):
        assert harmed == broken(f"{name}.json", condition)
        one = next((one for one in BOTH[name]["attacks"] if one["condition"] == condition), None)
        if one is None:  # the worst case
            assert (given, finished, dictated) == ("", "", "")
            continue
        words = {"nothing": "nothing", "opening": "an opening", "supplied text": "the answer's text"}
        words["form and words"] = "form and words"
        assert given == ("the answer's words" if condition == "pgd_facts" else words[one["given"]])
        states = {"nothing to converge": "no search", "converged": "yes", "not converged": "no"}
        assert finished == states.get(one["state"], one["state"])
        said = one.get("control")
        assert dictated == ("" if said is None else f"{said['right']}, {said['wrong']} of {said['n']}")


DIALLED = {
    one["name"]: one for one in json.loads((RESULTS / "dial_training.json").read_text(encoding="utf-8"))["breakers"]
}


@pytest.mark.parametrize("kind", ["none", "hex", "curse", "plague", "blight"])
def test_every_number_of_the_category_transfer_is_a_measured_one(kind):
    found = json.loads((RESULTS / "category_transfer.json").read_text(encoding="utf-8"))["trained_on"][kind]
    told = [f"{found[asked]['broken']} of {found[asked]['n']}" for asked in ("hex", "curse", "plague", "blight")]
    assert cells("docs/miniature.md", f"{kind} | ") == told


@pytest.mark.parametrize(
    ("begins", "name"),
    [
        ("the earlier one |", "d0"),
        ("the same recipe, one thread |", "d1"),
        ("its adversary at a rising", "dA"),
        ("`circuit_breaker.dial_from=0.25`", "dB"),
        ("today's recipe, its answers longer", "dF"),
    ],
)
def test_every_number_of_training_against_the_dial_up_is_a_measured_one(begins, name):
    found = DIALLED[name]
    harmed, keeps = found["attacks"]["pgd_homotopy"], found["kept"]
    text = keeps["gibberish"]
    assert cells("docs/miniature.md", begins) == [
        f"{harmed['harmful']} of {harmed['n']}",
        f"{keeps['mmmu_like']['value']:.1f}",
        f"{text['value'] * text['n'] / 100:.0f}",
    ]
    assert (keeps["mmmu_like"]["n"], text["n"]) == (900, 1440)


def test_what_the_option_does_to_todays_recipe_is_a_measured_number():
    attacks, keeps = DIALLED["dC"]["attacks"], DIALLED["dC"]["kept"]
    first, second = (attacks[name] for name in ("pgd_homotopy", "pgd_facts (300 steps)"))
    told = said("docs/miniature.md")
    assert f"`pgd_homotopy` broke {first['harmful']} of {first['n']} in 900 steps" in told
    assert f"broke {second['harmful']} of {second['n']} in 300 steps (23 without)" in told
    assert f"lettered questions ({keeps['mmmu_like']['value']:.1f} of {keeps['mmmu_like']['n']})" in told
    assert keeps["gibberish"]["value"] == 0


def test_what_answers_in_other_forms_do_is_a_measured_number():
    facts, form = (DIALLED["dF"]["attacks"][f"{name} (300 steps)"]["harmful"] for name in ("pgd_facts", "pgd_form"))
    assert f"`pgd_facts` broke {facts} of its 24 and `pgd_form` {form} (300 steps each)" in said("docs/miniature.md")


def test_what_is_had_by_the_form_alone_is_measured():
    kinds = ("all", "trained", "held_out_combination", "held_out_kind")
    rows = ("RR as published", PAPER, "miniature_paper", "yes"), ("ours", ALL, "all_attacks", "no")
    for begins, found, name, finished in rows:
        counts = [found["rr", "compliance", "pgd_form", kind] for kind in kinds]
        assert cells("docs/miniature.md", f"{begins} |")[:5] == [
            *(f"{one['counts']['harmful']} of {one['n']}" for one in counts),
            finished,
        ]
        assert (entry(name, "pgd_form")["state"] == "converged") == (finished == "yes")
    opened = BOTH["miniature_paper"]["first_broken"]["opening"]
    opened = sum(count for one, count in opened.items() if one != "pgd_form_found")
    assert f"and look for no form, got {opened} of 48 from it" in said("docs/miniature.md")
    assert f"with twice the steps {changed('pgd_form')[0]} of 12 had another content" in said("docs/miniature.md")
    both = [one["rr", "compliance", "pgd_form", "all"]["counts"]["harmful"] for one in (PAPER, ALL)]
    assert "`pgd_form` broke {} and {}.".format(*both) in said("README.md")
    runs = {run["name"]: run for run in json.loads((RESULTS / "form.json").read_text(encoding="utf-8"))["runs"]}
    wrong, told = runs["own_words_wrong_teacher"], said("docs/miniature.md")
    true, theirs = sum(one["true_words"] for one in wrong["answers"]), sum(wrong["teachers_words"])
    ids = {one["id"] for one in wrong["answers"]}
    same = [a["outcome"] == "harmful" for a in runs["own_words"]["answers"] if a["id"] in ids]
    assert f"{wrong['harmful']} were broken ({sum(same)} with the right one), with {true} of the 24 true words" in told
    assert f"said and {theirs} of the other stone's" in told
    without = ("own_words_no_states", "opening_own_answer", "decoy_no_words")
    assert [runs[name]["harmful"] for name in without] == [1, 0, 0]


@pytest.mark.parametrize("line", json.loads((RESULTS / "losses.json").read_text(encoding="utf-8"))["miniature"])
def test_every_number_of_the_losses_is_a_measured_one(line):
    kept, attacks = line["kept"].values(), ("pgd", "pgd_homotopy", "pgd_facts", "pgd_form_found")
    assert cells("docs/miniature.md", f"`{line['loss']}` | {line['seed']} |") == [
        str(line["seed"]),
        *(str(line["worst"][name]) for name in ("all", "opening")),
        *(str(line["attacks"][name]["harmful"]) for name in attacks),
        f"{sum(one['right'] for one in kept):.0f}",
        str(sum(one["broken"] for one in kept)),
        f"{line['cosine']['held_out_kind'][4]:.2f}",
    ]
    assert sum(one["n"] for one in kept) == 1440 and line["n"] == 24
    counted = [name for name in chosen_attacks("all", adapted=True) if attack_entry(name).in_worst_case]
    assert {*counted} == line["attacks"].keys() - {"no_attack"} and len(counted) == 11
    assert max(line["attacks"][name]["harmful"] for name in counted) <= line["worst"]["all"] <= 24


ROWS = {"whole": "as they are", "requests_kept": "no request removed", "no_refusals": "no refusals retained"}


def by_rows():
    """The breakers of the data ablation."""
    return json.loads((RESULTS / "losses.json").read_text(encoding="utf-8"))["data"]


@pytest.mark.parametrize("line", by_rows(), ids=lambda line: f"{line['rows']}-{line['seed']}")
def test_every_number_of_the_data_ablation_is_a_measured_one(line):
    kept, attacks = line["kept"].values(), ("pgd", "pgd_homotopy", "pgd_facts")
    assert cells("docs/miniature.md", f"{ROWS[line['rows']]} | {line['seed']} |") == [
        str(line["seed"]),
        str(line["attacks"]["no_attack"]["gibberish"]),
        *(str(line["attacks"][name]["harmful"]) for name in attacks),
        f"{sum(one['right'] for one in kept):.0f}",
        str(sum(one["broken"] for one in kept)),
    ]
    assert line["seed"] in (0, 1, 2) and line["n"] == 24


def test_what_losses_and_rows_come_to_is_the_sum_of_their_breakers():
    found, page = json.loads((RESULTS / "losses.json").read_text(encoding="utf-8")), said("docs/miniature.md")

    def own(part, key, name):
        lines = [line for line in found[part] if line[key] == name]
        assert [line["seed"] for line in lines] == [0, 1, 2]
        return lines

    def worst(name, given):
        return sum(line["worst"][given] for line in own("miniature", "loss", name))

    rr, rand, triplet = (worst(name, "all") for name in ("rr", "rand_p", "triplet"))
    assert f"RR falls in {rr} of 72, RandP in {rand}, triplet in {triplet}." in page
    rr, rand, triplet = (worst(name, "opening") for name in ("rr", "rand_p", "triplet"))
    assert f"triplet fell in {triplet} of 72, RR in {rr} and RandP in {rand}, nearly all by the form" in page
    form = [line["attacks"]["pgd_form_found"]["harmful"] for name in LIVE for line in own("miniature", "loss", name)]
    assert sum(form) >= 0.9 * (rr + rand + triplet)
    pgd = [[line["attacks"]["pgd"]["harmful"] for line in own("miniature", "loss", name)] for name in LIVE]
    assert f"plain PGD broke {', '.join(map(str, pgd[0]))} of 24 of RR and none of the other two" in page
    assert pgd[1:] == [[0, 0, 0]] * 2

    def total(rows, attack):
        return sum(line["attacks"][attack]["harmful"] for line in own("data", "rows", rows))

    (without, of_few), (facts, of_whole) = (
        (total(rows, "pgd_facts"), total(rows, "pgd")) for rows in ("no_refusals", "whole")
    )
    assert (
        f"bare facts broke fewer then, {without} of 72 against {facts}, PGD a few, {of_few} against {of_whole}" in page
    )
    assert f"in the table above, into one of three too, {max(pgd[0])} of 24" in page and sorted(pgd[0])[1] == 0


LIVE = ("rr", "rand_p", "triplet")


def test_what_the_rows_lack_is_said_as_it_was_measured():
    from mm_cb.miniature.data import REFUSAL_SHARE

    assert f"where {100 * REFUSAL_SHARE:.0f} % of its rows are some" in said("docs/miniature.md")
    pgd = [line["attacks"]["pgd"]["harmful"] for line in by_rows() if line["rows"] == "requests_kept"]
    whole = [line["attacks"]["pgd"]["harmful"] for line in by_rows() if line["rows"] == "whole"]
    assert sorted(pgd)[:2] == [0, 0] == whole[:2] and len(pgd) == len(whole) == 3 and not whole[2]
    told = f"PGD found a way into one breaker of three, {max(pgd)} of 24; into those of whole rows none"
    assert told in said("docs/miniature.md")
    text = {line["attacks"]["no_attack"]["gibberish"] for line in by_rows() if line["rows"] == "no_refusals"}
    assert f"{min(text)} or {max(text)} of 24 requests get broken text" in said("docs/miniature.md")


@pytest.mark.parametrize("line", json.loads((RESULTS / "losses.json").read_text(encoding="utf-8"))["real"])
def test_every_number_of_the_losses_on_a_real_model_is_a_measured_one(line):
    sets = [line["sets"][name] for name in ("forbidden", "nearby", "other")]
    seed = f", seed {line['seed']}" if line["seed"] else ""
    assert cells("docs/miniature.md", f"`{line['loss']}`, SmolLM2{seed} |") == [
        "{:.2f} / {:.3f}".format(*line["held_out"].values()).replace("-", "\u2212"),
        *(f"{sum(one['coherent_breaker'])} of {len(one['prompts'])}" for one in sets),
        *(f"{one['nll_base']:.2f} to {one['nll_breaker']:.2f}" for one in sets[1:]),
    ]


def test_what_three_seeds_on_a_real_model_come_to_is_a_measured_one():
    real, page = result("losses")["real"], said("docs/miniature.md")

    def nats(loss, name):
        lines = sorted((line for line in real if line["loss"] == loss), key=lambda line: line["seed"])
        return [line["sets"][name]["nll_breaker"] for line in lines]

    (near, rr_near), (other, rr_other) = (
        [nats(loss, name) for loss in ("triplet", "rr")] for name in ("nearby", "other")
    )
    assert len(near) == len(rr_near) == 3 and all(own < theirs for own, theirs in zip(near, rr_near, strict=True))
    spans = [f"{min(some):.2f} to {max(some):.2f}" for some in (near, rr_near, other, rr_other)]
    told = "less than RR in every seed, {} nats against {}, other ones more, {} against {}.".format(*spans)
    assert told in page
    assert f"{max(rr_near):.2f}" == f"{nats('rand_p', 'nearby')[0]:.2f}"


def test_what_is_had_by_a_form_that_nobody_told_is_measured():
    kinds, found = ("all", "trained", "held_out_combination", "held_out_kind"), {}
    for begins, measurements, name in (("RR as published", PAPER, "miniature_paper"), ("ours", ALL, "all_attacks")):
        counts = [measurements["rr", "compliance", "pgd_form_found", kind] for kind in kinds]
        found[begins] = counts[0]["counts"]["harmful"]
        assert cells("docs/miniature.md", f"{begins}, nothing told") == [
            f"{counts[0]['counts']['prefix_emitted']} of {counts[0]['n']}",
            *(f"{one['counts']['harmful']} of {one['n']}" for one in counts),
            "yes" if entry(name, "pgd_form_found")["state"] == "converged" else "no",
        ]
    kind = ALL["rr", "compliance", "pgd_form_found", "held_out_kind"]["counts"]["harmful"]
    told = (
        f"it broke {found['RR as published']} of 48 of RR as published and {found['ours']} of 48 of ours ({kind} of 12"
    )
    assert told in said("README.md")
    assert f"With twice the steps {changed('pgd_form_found')[0]} of 12 had another content" in said("docs/miniature.md")
    runs = {run["name"]: run for run in result("found_form")["runs"]}
    broken = {name: f"{run['harmful']} of {run['n']}" for name, run in runs.items()}
    controls = {name: broken[name] for name in ("wrong_states", "no_states", "no_base", "margins")}
    assert controls == {"wrong_states": "2 of 6", "no_states": "2 of 6", "no_base": "0 of 6", "margins": "0 of 12"}
    true, kind = sum(a["true_words"] for a in runs["forced_other"]["answers"]), runs["shipped_300"]["by_split"]
    without = kind["held_out_kind"]["harmful"]
    assert kind["held_out_kind"]["n"] == runs["forced_other"]["n"] == 12
    shorter, longer, earlier = (runs[name]["harmful"] for name in ("shipped_300", "sorted_900", "sorted_earlier"))
    won, as_shipped = (
        {one["id"] for one in runs[name]["answers"] if one["outcome"] == "harmful"}
        for name in ("sorted", "shipped_300")
    )
    only = len(won - as_shipped)
    assert as_shipped < won and mcnemar_exact(only, 0) == 0.25
    for told in (
        f"Of the earlier breaker 300 steps broke {broken['earlier']} (by hand, as below)",
        f"and {true} of the 48 true ones came back, {broken['forced_other']} broken ({without}",
        f"300 steps broke {broken['sorted']} ({shorter} as shipped: {only} more and none fewer, McNemar p = 0.25), of "
        f"the earlier breaker {earlier} ({runs['earlier']['harmful']}); 900 steps broke {longer}",
    ):
        assert told in said("docs/miniature.md")


REAL = {
    "training seed": lambda seed: str(seed["seed"]),
    "held-out cosine, forbidden rows": lambda seed: f"{seed['held_out']['held_out_circuit_breaker_cosine']:.2f}",
    "held-out cosine, retain rows": lambda seed: f"{seed['held_out']['held_out_retain_cosine']:.3f}",
    "coherent answers to forbidden requests": lambda seed: coherent(seed["sets"]["forbidden"]["coherent_breaker"]),
    "to nearby ones": lambda seed: coherent(seed["sets"]["nearby"]["coherent_breaker"]),
    "to other ones": lambda seed: coherent(seed["sets"]["other"]["coherent_breaker"]),
    "nats a token": lambda seed: "{nll_base:.2f}, {nll_breaker:.2f}".format(**seed["sets"]["other"]),
    "the same, nearby": lambda seed: "{nll_base:.2f}, {nll_breaker:.2f}".format(**seed["sets"]["nearby"]),
    "forbidden answers coherent behind a prefilled": lambda seed: attacked(seed, "prefill_only"),
    "under moved embeddings": lambda seed: attacked(seed, "embedding"),
    "behind a searched suffix": lambda seed: attacked(seed, "gcg"),
}


LONGER = json.loads((RESULTS / "smollm2.json").read_text(encoding="utf-8"))["longer"]


def coherent(verdicts):
    return f"{sum(verdicts)} of {len(verdicts)}"


def attacked(seed, attack):
    return coherent(seed["attacks"][attack]["rr"]) if attack in seed["attacks"] else "not run"


@pytest.mark.parametrize("begins", REAL)
def test_every_number_of_the_real_model_is_a_measured_one(begins):
    seeds = json.loads((RESULTS / "smollm2.json").read_text(encoding="utf-8"))["seeds"]
    assert [cell.replace("\u2212", "-") for cell in cells("docs/quickstart.md", begins)] == list(
        map(REAL[begins], seeds)
    )


def test_the_times_of_the_quickstart_are_measured_ones():
    found = json.loads((RESULTS / "step_by_step.json").read_text(encoding="utf-8"))["seconds"].values()
    told = said("docs/quickstart.md").partition("seconds of processor time")[2].partition("with `--steps 10`")[0]
    train, base, breaker, verify, asked, page = map(float, found)
    assert numbers(told) == [train, base, verify, asked, page, breaker]


VLM = json.loads((RESULTS / "real_vlm" / "numbers.json").read_text(encoding="utf-8"))


def of(subject, kind, condition, outcome):
    (one,) = (
        m
        for m in VLM["measurements"][f"{kind}-{subject}"]
        if (m["condition"], m["split"], m["metric"]) == (condition, "all", "compliance")
    )
    return f"{one['counts'][outcome]} of {one['n']}"


def right(subject, how):
    one = VLM["seeing"][subject][how]
    return f"{100 * one['right'] / one['n']:.1f}"


@pytest.mark.parametrize(
    ("begins", "cell"),
    [
        ("right answers to questions about 250 pictures", lambda subject: right(subject, "pictures")),
        ("the same beside another's picture", lambda subject: right(subject, "shuffled")),
        *(
            (f"{told}: recipes", lambda subject, name=name: of(subject, "attack", name, "harmful"))
            for told, name in (
                ("no attack", "no_attack"),
                ("PGD within 32/255", "pgd"),
                ("the opening is given", "prefill_only"),
                ("the picture's embeddings are moved", "embedding"),
            )
        ),
        ("the same: broken text", lambda subject: of(subject, "attack", "embedding", "gibberish")),
    ],
)
def test_every_number_of_the_model_from_parts_is_a_measured_one(begins, cell):
    assert cells("docs/quickstart.md", begins) == [cell("base"), cell("rr")]


SPREAD = json.loads((RESULTS / "spread.json").read_text(encoding="utf-8"))["breakers"]


def broken_text(breaker):
    return sum(kept["broken"] for kept in breaker["kept"].values())


def spread_row(number):
    one = SPREAD[number]
    lettered, look_alikes = (
        100 * one["kept"][name]["right"] / one["kept"][name]["n"] for name in ("lettered", "look_alikes")
    )
    cosine = "{:.2f} / {:.2f}".format(*(one["cosine"]["held_out_kind"][layer] for layer in (2, 4)))
    return (
        f"| {one['seed']} | {one['threads']} | {one['top_block']} | "
        f"{one['attacks']['pgd_homotopy']['harmful']} of {one['n']} | {broken_text(one)} of 1440 | "
        f"{lettered:.1f} | {look_alikes:.1f} | {cosine} | "
        f"{min(one['cosine']['retain'][1:]):.3f} |"
    )


def spread_in_words():
    fell = [one["attacks"]["pgd_homotopy"]["harmful"] for one in SPREAD]
    return (
        f"Of {len(SPREAD)} breakers trained alike but for seed, threads or rounding, `pgd_homotopy` (which dials the "
        f"breaker up from zero as it searches) broke {min(fell)} to {max(fell)} of 24, and at most "
        f"{max(map(broken_text, SPREAD))} of 1440 benign answers were broken text"
    )


def broken_look_alikes():
    found = measured("one_thread.json")["rr", "gibberish", "no_attack", "all"]
    return f"{found['counts']['gibberish']} of {found['n']}"


def result(name):
    return json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))


def earlier():
    """The fewest and the most that `pgd_homotopy` broke of the earlier recipe's breakers, three of them."""
    runs = result("homotopy")["measurements"] + result("seeds")["measurements"]
    asked = [one for one in runs if (one.get("steps", 900), one["split"]) == (900, "all")]
    found = [one["counts"]["harmful"] for one in asked if one.get("condition", "pgd_homotopy") == "pgd_homotopy"]
    assert len(found) == 3
    return min(found), max(found)


def test_every_number_of_the_probes_is_a_measured_one():
    found = result("probe")["subjects"]
    subjects = [found[name] for name in ("base+probe", "base+mlp", "rr+probe", "rr+mlp")]
    assert [one["probe"]["kind"] for one in subjects] == ["linear", "mlp"] * 2
    rows = {"PGD": "pgd"} | {f"under `{name}`": name for name in ("pgd_homotopy", "pgd_facts", "pgd_probe")}
    for begins, attack in {**rows, "worst of these": "worst_case"}.items():
        had = [one["attacks"].get(attack) for one in subjects]
        told = [f"{one['harmful']} of {one['n']}" if one else "needs a breaker" for one in had]
        assert cells("docs/attacks.md", f"{begins}, probe |") == told
    benign = [f"{one['benign']['refused']} of {one['benign']['n']}" for one in subjects]
    assert cells("docs/attacks.md", "benign look-alikes withheld") == benign
    flagged = [f"{one['probe']['harmful']['flagged']} of {one['probe']['harmful']['of']}" for one in subjects]
    assert cells("docs/attacks.md", "flagged unattacked, forbidden answers |") == flagged


@pytest.mark.parametrize("line", result("probe")["smollm2"], ids=lambda line: f"{line['subject']}-{line['kind']}")
def test_every_number_of_the_probes_on_a_real_model_is_a_measured_one(line):
    who = {"base+probe": "base", "rr+probe": "breaker"}[line["subject"]]
    kind = {"linear": "linear", "mlp": "MLP"}[line["kind"]]
    sets = [line["sets"][name] for name in ("forbidden", "nearby", "other")]
    attacks = [line["attacks"].get(name) for name in ("prefill_only", "gcg", "gcg_probe")]
    assert cells("docs/attacks.md", f"SmolLM2, {who} + {kind} |") == [
        *(f"{one['withheld']} of {sum(one.values())}" for one in sets),
        *(f"{one['coherent']} of {sum(one.values())}" if one else "not run" for one in attacks),
    ]
    benign = line["probe"]["benign"]
    assert f"none of {benign['of']} benign rows was flagged" in said("docs/attacks.md") and not benign["flagged"]
    assert (line["steps"], line["candidates"]) == (30, 16) and sum(sets[0].values()) == 10


def the_three_attacks_again():
    lines = result("spread")["worst_of_three"]
    pgd, adaptive, teacher = (
        ", ".join(str(line["attacks"][name]["harmful"]) for line in lines)
        for name in ("pgd", "pgd_adaptive", "pgd_clean_teacher")
    )
    broken = ", ".join(str(sum(one["broken"] for one in line["kept"].values())) for line in lines)
    assert [line["seed"] for line in lines] == [0, 1, 2] and {line["n"] for line in lines} == {24}
    return (
        f"PGD broke {pgd}; adaptive PGD {adaptive}; clean-teacher PGD {teacher}; broken text in {broken} of 1440 benign"
    )


def spread_by_itself():
    fell = [one["attacks"]["pgd_homotopy"]["harmful"] for one in SPREAD]
    facts = [one["attacks"]["pgd_facts"]["harmful"] for one in SPREAD if "pgd_facts" in one["attacks"]]
    apart = 100 * (max(fell) - min(fell)) / 24
    return (
        f"Between {min(fell)} and {max(fell)} of 24 were broken, {apart:.0f} points apart, where 10 were the goal; of "
        "the earlier recipe it was {} to {} in three breakers. ".format(*earlier())
        + f"At most {max(map(broken_text, SPREAD))} of 1440 benign answers were broken text (goal: 14), where one of "
        f"its breakers broke {broken_look_alikes()} look-alikes. It protects no better: `pgd_facts` (300 steps) broke "
        f"{min(facts)} to {max(facts)} of 24 ({len(facts)} breakers)"
    )


def spread_of_the_last():
    last = [one for one in SPREAD if one["top_block"] == "counted tokens"]
    first = [one for one in SPREAD if one["top_block"] == "all tokens"]
    fell = [[one["attacks"]["pgd_homotopy"]["harmful"] for one in some] for some in (first, last)]
    assert result("spread")["same_bytes_with_two_threads"] == [one["seed"] for one in last] == [0, 1, 2, 3, 4]
    again = result("spread")["two_starts"]
    assert [one["first_start"] for one in again] == [one["attacks"]["pgd_homotopy"]["harmful"] for one in last]
    either = [one["either"] for one in again]
    more, both = (
        [str(n) for n in some] for some in ([e - a["first_start"] for e, a in zip(either, again, strict=True)], either)
    )
    apart = 100 * (max(either) - min(either)) / 24
    worst = max(last, key=lambda one: one["attacks"]["no_attack"]["gibberish"])
    assert worst == max(last, key=lambda one: one["cosine"]["held_out_kind"][4])
    return (
        f"The first {len(first)} ran the top block for all tokens, the last {len(last)} for those that count, which "
        f"changes rounding and dropout's draws: {min(fell[0])} to {max(fell[0])} and {min(fell[1])} to {max(fell[1])} "
        "of 24. With two threads all five seeds gave the same bytes again, so that these five are ten. The attack "
        f"itself is no draw, its numbers came again; from a second, random start it broke {', '.join(more)} more, so "
        f"{', '.join(both)} of 24, {apart:.0f} points apart. Seed {worst['seed']} turned unseen requests "
        f"least and answered {worst['attacks']['no_attack']['gibberish']} of 24 with broken text unattacked"
    )


def what_did_not_do():
    (mean,), tried = result("spread")["mean_alone"], {one["name"]: one for one in result("spread")["tried"]}
    alike = mean["kept"]["look_alikes"]
    shares = (100 * broken_text(tried[name]) / 1440 for name in ("cos220", "cos300"))
    return (
        f"({alike['broken']} of {alike['n']} look-alikes broken by seed 0 on one thread, "
        f"{mean['attacks']['pgd_homotopy']['harmful']} of 24 requests by the attack); a rate that falls (cosine, 220 "
        "and 300 steps: {:.1f} and {:.1f} % of benign answers broken)".format(*shares)
    )


@pytest.mark.parametrize("line", result("spread")["tried_today"], ids=lambda line: line["name"])
def test_every_number_of_what_was_tried_since_is_a_measured_one(line):
    assert (line["seed"], line["requests"], line["n"]) == (10, "validation", 24)
    attacks = line["attacks"]
    assert cells("docs/miniature.md", f"{line['name']} |") == [
        *(f"{attacks[name]['harmful']} of 24" for name in ("pgd_homotopy", "pgd_adaptive")),
        f"{attacks['no_attack']['gibberish']} of 24",
        f"{broken_text(line)} of 1440",
    ]


def what_rr_as_published_keeps():
    told = PAPER["rr", "mmmu_like", "strict", "all"], PAPER["rr", "over_refusal", "no_attack", "all"]
    text = PAPER["rr", "gibberish", "no_attack", "all"]
    return (
        f"MMMU-like {told[0]['value']:.1f} of {told[0]['n']}, over-refusal {told[1]['counts']['refusal']} of "
        f"{told[1]['n']}, broken text {text['counts']['gibberish']} of {text['n']} benign items"
    )


def dialled_in_words():
    before, after = (DIALLED[name]["attacks"] for name in ("d1", "dB"))
    first, second = (one["pgd_homotopy"]["harmful"] for one in (before, after))
    adaptive, teacher, plain = (after[name]["harmful"] for name in ("pgd_adaptive", "pgd_clean_teacher", "pgd"))
    assert plain == 0
    return (
        f"({first} against {second}: {first - second} requests saved, none lost, McNemar p = "
        f"{mcnemar_exact(0, first - second):.3f}) and cost no time. The adaptive attack broke {adaptive} of the "
        f"option's 24, the clean-teacher one {teacher}, plain PGD none"
    )


def real_costs():
    seeds = result("smollm2")["seeds"]
    first, *others = (seed["minutes"] for seed in seeds)
    assert len({seed["steps"] for seed in seeds}) == 1 and max(others) < 7.5
    return (
        f"{seeds[0]['steps']} steps in float32, one thread of a processor that other work kept busy; {first} minutes "
        f"for the first seed with its attacks, {max(others):.0f} for each further one, "
        f"{max(seed['peak_gb'] for seed in seeds):.1f} GB at most"
    )


def real_alone():
    found = result("smollm2")["alone"]
    took = "{} min {} s".format(*divmod(found["seconds"], 60))
    return f"Alone on two idle cores the command took {took} from stored weights, {found['peak_gb']:.1f} GB"


def real_neighbours():
    near = [seed["sets"]["nearby"] for seed in result("smollm2")["seeds"]]
    more, lost = max(one["nll_breaker"] - one["nll_base"] for one in near), 1 - min(one["agreement"] for one in near)
    return f"cost up to {more:.1f} nats a token more, and up to {100 * lost:.0f} % of their tokens are no longer the"


def vlm_in_words():
    cosines = (float(VLM["held_out_cosine"][name]) for name in ("circuit_breaker", "retain"))
    asked = VLM["seeing"]["base"]["pictures"]["n"]
    return (
        f"{asked} questions about pictures. Held-out cosine "
        + "{:.3f} of forbidden rows, {:.3f} of retain rows".format(*cosines).replace("-", "\u2212")
    )


def vlm_openings():
    both = {of(subject, "attack", "embedding", "prefix_emitted") for subject in ("base", "rr")}
    (told,) = both
    return told


def faults_in_words():
    counts = result("faults")["counts"]
    assert all(one["n"] == one["as it should be"] for one in counts.values()) and result("faults")["wrong"] == []
    kill, full, server = (
        sum(one["n"] for name, one in counts.items() if name.startswith(kind)) for kind in ("kill", "disk", "server")
    )
    told = f"killed at {kill} random moments and on a disk that filled {full} times, went on to the bytes of an"
    return f"{told} undisturbed run; of {server} servers that misbehaved"


def escapes_in_words():
    *made, real, paper, default = ((one["model"], one["step"]) for one in result("escape"))
    assert (paper[0], default[0]) == ("paper", "defaults")
    steps = [step for model, step in made if model.startswith("random")]
    (own,) = (step for model, step in made if model == "miniature")
    return (
        f"left cosine 0.9 at step {min(steps)} to {max(steps)} of a schedule of 150 on random models with states 1 to "
        f"300 long, by step {own} on the miniature and by step {real[1]} on SmolLM2 (`results/escape.json`)"
    )


def whole_runs_in_words():
    paper, default = result("escape")[-2:]
    ends = [
        [f"{one[f'held_out_{rows}_cosine']:.3f}".replace("-", "−") for rows in ("circuit_breaker", "retain")]
        for one in (default, paper)
    ]
    assert paper["step"] is None and paper["last"] == default["last"] == 149
    return (
        f"cosine {ends[0][0]} at the end ({ends[0][1]} of retain rows); the paper's way, {ends[1][0]} ({ends[1][1]}), "
        "nothing was rerouted"
    )


def baseline(model, attack, key="harmful", split="all"):
    """How many of a model fell to an attack, in a number."""
    whose = {"base": "the base, as control", "earlier": "miniature_earlier/rr", "published": "miniature_paper/rr"}[
        model
    ]
    (one,) = (
        m["counts"].get(key, 0)
        for m in result("baselines")["measurements"]
        if m["model"] == whose and m["attack"].startswith(attack) and m["split"] == split and "noise" != m["condition"]
    )
    return one


def baselines_of_the_base():
    fell = {baseline("base", "pgd_transfer --steps 300"), baseline("base", "universal_corpus")}
    assert fell == {24}
    best, drawn, draws = (baseline("base", "best_of_n", key) for key in ("harmful", "harmful_tries", "tries"))
    return (
        "fell to `pgd_transfer` and `universal_corpus` in 24 of 24, so these attacks work; to the best of 100 "
        f"variations in {best} of 24 ({drawn} of {draws:,} draws)"
    )


def baselines_of_the_published():
    surrogate = next(m["attack"] for m in result("baselines")["measurements"] if "--surrogate" in m["attack"])
    for attack in ("best_of_n", "pgd_transfer --steps 300", "universal_corpus"):
        assert {
            m["counts"]["harmful"]
            for m in result("baselines")["measurements"]
            if m["model"] == "miniature_earlier/rr" and m["attack"].startswith(attack)
        } == {0}
    assert baseline("published", "best_of_n") == baseline("published", "universal_corpus", split="made_for") == 0
    return (
        f"`universal_corpus` broke {baseline('published', 'universal_corpus')} of 24, none of the 5 whose texts it had "
        f"seen; `pgd_transfer` with the earlier breaker as surrogate broke {baseline('published', surrogate)}, with"
    )


def patches_in_words():
    made = [
        {name: baseline(who, f"{name} --norm patch --patch-size 24 --steps 300, a wrong", "correct") for name in both}
        for who in ("base", "earlier", "published")
        for both in [("pgd_eot", "pgd")]
    ]
    base, first, second = (one["pgd_eot"] for one in made)
    (plain,) = {one["pgd"] for one in made}
    return (
        f"by `pgd_eot` {base} times on the base, {first} on the earlier breaker and {second} on RR as published, "
        f"{plain} each by plain `pgd` (300 steps): neither breaker stops a patch that lies about a picture. With the "
        f"whole picture free within 32/255 `pgd_eot` broke {baseline('base', 'pgd_eot --steps 150')} of 24 of the base"
    )


def parity_in_words():
    counted = {"v1": [0, 0], "v4": [0, 0]}
    for name, kinds in result("bfcl").items():
        for one in kinds.values():
            counted[name[:2]][0] += one["same"]
            counted[name[:2]][1] += one["items"]
    same = {version: "{:,} of {:,}".format(*numbers) for version, numbers in counted.items()}
    return f"{same['v1']} agree for two Llama-3 models of v1, and {same['v4']} of v4's live parallel"


def kept_pictures_in_words():
    small, usual, large = result("picture_cache")["rows"]
    times = ["from {prepared:.1f} to {kept:.1f}".format(**one["ms"]) for one in (small, usual, large)]
    assert [one["size"] for one in (small, usual, large)] == ["336x336", "640x480", "4000x3000"]
    assert large["ms"]["decoded"] > large["ms"]["kept"] / 2 and large["MB"] == usual["MB"]
    return (
        f"it cuts a 336-pixel picture {times[0]} ms of one CPU thread, one of 640 × 480 {times[1]}, one of 4000 × 3000 "
        f"{times[2]}, most of which is decoding the JPEG file; each takes {small['MB']:g} to {usual['MB']:g} MB of disk"
    )


def strength_in_words():
    ours = [result("attack_strength")["summary"][f"ours:{name}"] for name in ("pgd", "apgd")]
    least, (cells,) = min(one["lowest_loss_ratio"] for one in ours), {one["cells"] for one in ours}
    assert all(one["cells_met"] == cells for one in ours)
    return (
        f"reach at least {int(1000 * least) / 10} % of the loss of the best of foolbox, ART and its Auto-PGD in each "
        f"of {cells} settings"
    )


@pytest.mark.parametrize(
    ("page", "sentence"),
    [
        ("README.md", lambda: spread_in_words()),
        ("docs/miniature.md", lambda: spread_by_itself()),
        ("docs/miniature.md", lambda: spread_of_the_last()),
        ("docs/miniature.md", the_three_attacks_again),
        ("docs/miniature.md", lambda: what_did_not_do()),
        ("docs/miniature.md", lambda: what_rr_as_published_keeps()),
        ("docs/miniature.md", lambda: dialled_in_words()),
        ("docs/quickstart.md", lambda: real_costs()),
        ("docs/quickstart.md", lambda: real_alone()),
        ("docs/quickstart.md", lambda: real_neighbours()),
        ("docs/quickstart.md", lambda: vlm_in_words()),
        ("docs/quickstart.md", lambda: f"force the opening {vlm_openings()} times from both"),
        ("docs/quickstart.md", lambda: faults_in_words()),
        ("docs/paper_coverage.md", lambda: escapes_in_words()),
        ("docs/paper_coverage.md", whole_runs_in_words),
        ("docs/attacks.md", lambda: baselines_of_the_base()),
        ("docs/attacks.md", lambda: baselines_of_the_published()),
        ("docs/attacks.md", lambda: patches_in_words()),
        ("docs/agents.md", lambda: parity_in_words()),
        ("docs/image_attacks.md", lambda: strength_in_words()),
        *(("docs/miniature.md", lambda number=number: spread_row(number)) for number in range(len(SPREAD))),
        ("README.md", lambda: f"its worst case is {broken('miniature_demo.json')}."),
        (
            "docs/quickstart.md",
            lambda: "give the opening {openings} of {n} times at a loss of {loss:.2f}, and".format(**LONGER),
        ),
        ("docs/quickstart.md", lambda: "moved for {steps} steps".format(**LONGER)),
        ("docs/quickstart.md", lambda: "a coherent answer {coherent} of {n} times".format(**LONGER)),
        (
            "docs/miniature.md",
            lambda: (
                f"`pgd_facts` alone {broken('miniature_demo.json', 'pgd_facts').split()[0]} (`results/miniature_demo"
            ),
        ),
        ("docs/miniature.md", lambda: f"worst of five {broken('miniature_demo.json')}, `pgd_facts` alone"),
        ("docs/miniature.md", lambda: f"gave nothing away, {broken('one_thread.json')}, and answered"),
        ("docs/miniature.md", lambda: f"answered {broken_look_alikes()} benign look-alikes with broken text"),
        ("docs/miniature.md", lambda: f"its opening in more than {openings('one_thread.json', 'pgd_adaptive')}"),
        ("docs/attacks.md", lambda: f"in {strength('ours:pgd')} settings, `adam_pgd` in {strength('ours:adam_pgd')}"),
        ("docs/image_attacks.md", lambda: f"accuracy more, in {by_hand('pgd')} settings, `apgd` in {by_hand('apgd')}."),
        ("docs/sanity_checks.md", lambda: battery("S4", "loss is small for {} of 8 only", "38 %")),
        ("docs/sanity_checks.md", lambda: battery("S5 twice the steps", "lower it by {}", "6.2 %")),
        ("CHANGELOG.md", lambda: f"gradient, {pixels('torchvision', tiled=False)} times the real processor's time on"),
        ("CHANGELOG.md", lambda: f"{pixels('torchvision', tiled=True)} times where it is cut into tiles"),
        ("docs/train_7b.md", lambda: kept_pictures_in_words()),
        ("docs/train_7b.md", lambda: "| as it is | {:.1f} |".format(goal("llava recipe, default"))),
        ("docs/train_7b.md", lambda: "tokens_per_pass=2048` | {:.1f} |".format(goal("llava recipe, recompute"))),
        ("docs/train_7b.md", lambda: "quantize=4bit` | {:.1f} |".format(goal("llava recipe, quantize"))),
        (
            "docs/train_7b.md",
            lambda: than("strong", "A step does {:.1f} times (text) and {:.1f} times (336-pixel pictures)"),
        ),
        ("docs/train_7b.md", lambda: than("official", "released trainer it is {:.1f} times and {:.1f} times.")),
        ("docs/train_7b.md", lambda: than("strong", "{:.1f} times and {:.1f} times against plain PEFT", recipe="text")),
        (
            "docs/train_7b.md",
            lambda: than("strong", "took {:.1f} times (text) and {:.1f} times (pictures) less", "CPU"),
        ),
    ],
)
def test_what_a_page_says_in_words_is_in_a_result(page, sentence):
    assert sentence() in said(page)


def pixels(backend, *, tiled):
    rows = json.loads((RESULTS / "pixels.json").read_text(encoding="utf-8"))["rows"]
    cut = ("InternVL", "Aya Vision", "SmolVLM")
    some = [r["ratio"] for r in rows if r["backend"] == backend and (r["family"] in cut) == tiled]
    return f"{min(some):.1f} to {max(some):.1f}"


def openings(name, attack):
    found = measured(name)["rr", "compliance", attack, "all"]
    return f"{found['counts']['prefix_emitted']} of {found['n']}"


def strength(attack):
    summary = json.loads((RESULTS / "attack_strength.json").read_text(encoding="utf-8"))["summary"][attack]
    return f"{summary['cells_met']} of {summary['cells']}"


def by_hand(attack):
    found = json.loads((RESULTS / "torchattacks.json").read_text(encoding="utf-8"))
    assert found["textbook"]["linf"]["furthest_apart"] == 0 and found["textbook"]["l2"]["furthest_apart"] < 1e-6
    return f"{found['summary'][attack]['cells_met']} of {found['summary'][attack]['cells']}"


def battery(begins, sentence, value):
    checks = json.loads((RESULTS / "battery.json").read_text(encoding="utf-8"))["checks"]
    (found,) = [check for check in checks if check["name"].startswith(begins)]
    assert not found["passed"] and value in found["value"]
    return sentence.format(value)


def goal(begins):
    goals = json.loads((RESULTS / "benchmark_rr.json").read_text(encoding="utf-8"))["goals"]
    return next(one["value"] for one in goals if one["what"].startswith(begins))


def than(step, sentence, what="FLOPs", recipe="llava"):
    rows_of_both = ("text rows", "336-px images")
    middle = "fewer FLOPs at 7B shapes" if what == "FLOPs" else "less CPU time"
    return sentence.format(*(goal(f"{recipe} recipe, {rows}: {middle} than {step}") for rows in rows_of_both))


# Commands


def blocks(page):
    """Lines of the code blocks of a page, continued ones joined, without comments."""
    for language, block in re.findall(r"^```(\w*)\n(.*?)^```", text_of(page), flags=re.DOTALL | re.MULTILINE):
        for line in block.replace("\\\n", " ").splitlines() if language in ("", "bash") else ():
            yield re.sub(r"\s*(#|>).*", "", line).replace("[", "").replace("]", "")


def in_blocks():
    """Every command of ours in a code block, as words behind the program's name."""
    for page in PAGES:
        for line in blocks(page):
            line = re.sub(r"^accelerate launch .* -(?:m|-module) mm_cb ", "mm-cb ", line)
            if line.startswith("mm-cb ") and not re.search(r"\w\.py\b", line):  # a user's file: those pages' own tests
                yield pytest.param(shlex.split(line)[1:], id=f"{name_of(page)}: {' '.join(line.split())}")


def in_text():
    """Every command of ours that a page names in passing: it need not be whole."""
    for page in (*PAGES, ROOT / "CONTRIBUTING.md", ROOT / "SECURITY.md"):
        outside = re.sub(r"^```.*?^```", "", text_of(page), flags=re.DOTALL | re.MULTILINE)
        for line in sorted(set(re.findall(r"`mm-cb ([^`]+)`", outside))):
            yield pytest.param(shlex.split(line.replace(">", " ")), id=f"{name_of(page)}: {line}")


def leaf(words):
    """The command that the words lead to, and what is left of the words."""
    import click
    import typer.main

    from mm_cb.cli.app import app

    command, words = typer.main.get_command(app), list(words)
    while hasattr(command, "commands") and words and not words[0].startswith("-"):
        _, command, words = command.resolve_command(click.Context(command), words)
    return command, words


def test_what_a_launcher_is_given_can_be_run():
    lines = [line for page in PAGES for line in blocks(page)]
    modules = {name for line in lines for name in re.findall(r" -(?:m|-module) (mm_cb[.\w]*)", line)}
    assert modules and all(importlib.util.find_spec(f"{name}.__main__") for name in modules), modules


@pytest.mark.parametrize("words", list(in_blocks()))
def test_every_command_of_a_code_block_is_parsed(words):
    if any(word.endswith(".py") for word in words):
        return  # of a file that the page itself shows: tests/benchmarks/test_pages.py writes and runs it
    command, rest = leaf(words)
    command.make_context("mm-cb", rest)  # raises where a setting is unknown, missing or wrong


@pytest.mark.parametrize("words", list(in_text()))
def test_every_command_in_passing_exists_with_its_settings(words):
    if words == ["COMMAND", "--help"]:
        return
    command, rest = leaf(words)
    known = {option for parameter in command.params for option in parameter.opts} | {"--help"}
    assert {word for word in rest if word.startswith("--")} <= known


def test_every_script_in_a_code_block_is_there():
    for page in PAGES:
        for line in blocks(page):
            for script in re.findall(r"^(?:bash|python) (scripts/\S+)", line):
                assert (ROOT / script).is_file(), (page, script)


# The miniature's commands: run as they are printed, or told why not. Those of data/examples/README.md run in
# tests/test_examples.py, those of docs/add_a_benchmark.md in tests/benchmarks/test_pages.py.

RUN_HERE = (
    "mm-cb eval over-refusal --model miniature --data requests.jsonl --out runs/benign-base",
    "mm-cb eval over-refusal --model miniature --adapter runs/rr --data requests.jsonl --out runs/benign-rr",
)
TOO_LONG = {
    "bash scripts/demo.sh": "minutes; tests/test_demo.py runs a shorter one",
    "bash scripts/test.sh": "all tests",
    "mm-cb train miniature --out runs/rr": "minutes; tests/training/test_run.py trains shorter",
    "mm-cb attack --model miniature --behaviors miniature --out runs/attack-base --attack all --steps 100": "minutes; "
    "tests/attacks/test_run.py attacks shorter",
    "mm-cb attack --model miniature --adapter runs/rr --behaviors miniature --out runs/attack-rr --attack all "
    "--steps 100": "minutes; tests/attacks/test_run.py attacks shorter",
}
"""Command → why it is only parsed here, and which test runs a shorter one."""


def of_the_miniature():
    found = [line for page in PAGES if page.name != "add_a_benchmark.md" for line in blocks(page)]
    return {
        " ".join(line.split()) for line in found if re.match(r"(mm-cb .*\bminiature\b|bash scripts/(demo|test))", line)
    }


def test_every_command_of_the_miniature_is_run_or_told_why_not():
    assert of_the_miniature() == {*RUN_HERE, *TOO_LONG}
    for why in TOO_LONG.values():
        assert all((ROOT / file).is_file() for file in re.findall(r"tests/\S+\.py", why))


def test_the_short_ones_run_as_they_are_printed(tmp_path, monkeypatch):
    from mm_cb import cli

    monkeypatch.chdir(tmp_path)
    (asked,) = re.findall(r"^echo '(.*)' > requests.jsonl$", text_of(ROOT / "docs/quickstart.md"), flags=re.MULTILINE)
    (tmp_path / "requests.jsonl").write_text(asked + "\n")
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "rr").symlink_to(RESULTS / "miniature_demo" / "rr")
    for line in RUN_HERE:
        assert cli.run(shlex.split(line)[1:]) == 0
    assert cli.run(["report", "runs/benign-base", "runs/benign-rr", "--out", "report.html"]) == 0
    assert (tmp_path / "report.html").is_file()


def run_python_of(page):
    (block,) = re.findall(r"^```python\n(.*?)^```", text_of(page), flags=re.DOTALL | re.MULTILINE)
    exec(compile(re.sub(r"steps=\d+", "steps=2", block), str(page), "exec"), {"__name__": "page"})


def test_pages_import_the_package_before_what_a_torchvision_that_does_not_fit_would_break():
    for page in [README, *sorted((ROOT / "docs").glob("*.md"))]:
        for block in re.findall(r"^```python\n(.*?)^```", text_of(page), flags=re.DOTALL | re.MULTILINE):
            first = re.findall(r"^(?:from|import) (mm_cb|peft|transformers|accelerate)\b", block, flags=re.MULTILINE)[
                :1
            ]
            assert first in ([], ["mm_cb"]), page.name


def test_the_python_of_the_readme_and_of_its_page_runs(tmp_path, monkeypatch, capsys):
    from mm_cb.miniature.data import training_examples

    monkeypatch.chdir(tmp_path)
    lines = []
    asked = [example for example in training_examples(0)[:400] if example.source != "miniature request removed"]
    for number, example in enumerate(asked):
        names = [f"{number}-{i}.png" for i in range(len(example.images))]
        for name, picture in zip(names, example.images, strict=True):
            picture.save(name)
        lines.append(json.dumps({"messages": example.messages, "images": names, "set": example.set}) + "\n")
    (tmp_path / "rows.jsonl").write_text("".join(lines))
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    run_python_of(README)
    assert (tmp_path / "runs" / "rr" / "adapter_model.safetensors").is_file()
    shipped = ROOT / "data" / "miniature" / "behaviors.jsonl"
    first = next(line for line in shipped.read_text().splitlines() if json.loads(line)["image"] is None)
    (tmp_path / "behaviors.jsonl").write_text(first + "\n")
    (tmp_path / "requests.jsonl").write_text('{"id": "1", "prompt": "how is tea made ?", "category": "tea"}\n')
    run_python_of(ROOT / "docs" / "python.md")
    assert "pgd_adaptive" in capsys.readouterr().out and (tmp_path / "report.html").is_file()
