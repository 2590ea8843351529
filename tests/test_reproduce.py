"""scripts/reproduce_7b.sh: what it prints is what it runs, it resumes, and its commands are ours."""

import json
import os
import re
import shlex
import subprocess
from pathlib import Path

import pytest

from mm_cb.report.combine import combine
from mm_cb.report.load import load_run
from mm_cb.report.table import headline_table

ROOT = Path(__file__).resolve().parent.parent
KNOWING = {"pgd_adaptive", "pgd_clean_teacher", "pgd_homotopy", "pgd_homotopy_opening"}
"""Attacks that know the breaker: they are aimed at what the adapter changed."""
STUB = """#!/usr/bin/env bash
printf '%q ' "$@" >>"$LOG"; echo >>"$LOG"
words=("$@")
for i in "${!words[@]}"; do if [ "${words[i]}" = --out ]; then out="${words[i + 1]}"; fi; done
if [ "$1" = report ]; then exit 0; fi
if [ "$1" = judge ]; then
    mkdir -p "$2/judgements" && printf '{"judge": "%s"}' "$4" >"$2/judgements/newest.json"
    exit 0
fi
mkdir -p "$out"
if [ -e "$out/arguments" ] && [ "$(<"$out/arguments")" != "$*" ]; then echo "another recipe" >&2; exit 2; fi
echo "$*" >"$out/arguments"
if [ "$(basename "$out")" = "${STOP_AT:-}" ]; then echo '{"ended": null}' >"$out/run.json"; exit 1; fi
echo '{"ended": "2030-01-01"}' >"$out/run.json"
"""


@pytest.fixture
def given(tmp_path):
    """Stand-ins for everything that the script asks its user for, and a command that only writes down its arguments."""
    stub = tmp_path / "bin" / "mm-cb"
    stub.parent.mkdir()
    stub.write_text(STUB)
    stub.chmod(0o755)
    for name in ("behaviors.jsonl", "safety.txt", "rules.json", "benign.jsonl"):
        (tmp_path / name).write_text("")
    return {
        "BEHAVIORS": "behaviors.jsonl", "SAFETY_PROMPT": "safety.txt", "JUDGE": "harmbench multimodal",
        "RULE_FILE": "rules.json", "WILD_JUDGE": "a judge", "WILD_ENDPOINT": "http://127.0.0.1:9/v1",
        "OVER_REFUSAL": "benign.jsonl",
        "OUT": "my runs/7b", "LOG": str(tmp_path / "log"), "MM_CB": str(stub), "TRAIN": "training.max_steps=2 a.b=c",
    }  # fmt: skip


def start(folder, variables, *arguments):
    environment = {"PATH": os.environ["PATH"], **variables}
    script = ["bash", str(ROOT / "scripts" / "reproduce_7b.sh"), *arguments]
    return subprocess.run(script, cwd=folder, env=environment, capture_output=True, text=True)


def printed(folder, variables):
    """The commands of a dry run, without the program's name, and the state of each."""
    done = start(folder, variables, "--dry-run")
    assert done.returncode == 0, done.stderr
    lines = [line.rpartition(" # ") for line in done.stdout.splitlines() if not line.startswith("#")]
    program = len(shlex.split(variables["MM_CB"]))
    return [shlex.split(command)[program:] for command, _, _ in lines], [state for _, _, state in lines]


def kind(command):
    return "attack check" if command[:2] == ["attack", "check"] else command[0]


def logged(variables):
    path = Path(variables["LOG"])
    found = [shlex.split(line) for line in path.read_text().splitlines()] if path.exists() else []
    path.unlink(missing_ok=True)
    return found


def test_a_dry_run_prints_what_is_then_run_and_runs_nothing(given, tmp_path):
    before = sorted(tmp_path.iterdir())
    commands, states = printed(tmp_path, given)
    assert sorted(tmp_path.iterdir()) == before and set(states) == {"to do"}
    assert start(tmp_path, given).returncode == 0
    assert logged(given) == commands
    kinds = [kind(command) for command in commands]
    expected = {"train": 1, "attack check": 1, "attack": 13, "judge": 13, "eval": 9, "report": 1}
    assert {kind: kinds.count(kind) for kind in kinds} == expected
    assert kinds[0] == "train" and kinds[-1] == "report"
    assert commands[0][2:4] == ["--out", "my runs/7b/train"] and commands[0][-2:] == ["training.max_steps=2", "a.b=c"]


def test_the_report_is_given_every_run_that_was_made(given, tmp_path):
    commands, _ = printed(tmp_path, given)
    made = [command[command.index("--out") + 1] for command in commands if command[0] in ("attack", "eval")]
    assert commands[-1] == ["report", *made, "--out", "my runs/7b/report.html"] and len(set(made)) == len(made)


def test_subjects_differ_in_adapter_and_safety_prompt_alone(given, tmp_path):
    commands, _ = printed(tmp_path, given)
    plain = {}
    for command in (c for c in commands if kind(c) in ("attack", "eval")):
        out = command[command.index("--out") + 1]
        who = {"rr": ["--adapter", "my runs/7b/train"], "base+safety_prompt": ["--system", "safety.txt"]}
        subject = next(name for name in ("base+safety_prompt", "base", "rr") if f"/{name}-" in out)
        rest = list(command)
        for word in (*who.get(subject, ()), out):
            rest.remove(word)
        plain.setdefault(out.rpartition(f"/{subject}-")[2], []).append(rest)
    assert len(plain) == 10
    for what, found in plain.items():
        assert found == [found[0]] * len(found) and len(found) == (1 if what in KNOWING else 3)


def not_judging(commands):
    return [command for command in commands if command[0] != "judge"]


def test_a_second_run_asks_every_step_whether_it_is_finished_and_judges_nothing_twice(given, tmp_path):
    start(tmp_path, given)
    logged(given)
    commands, states = printed(tmp_path, given)
    assert set(states[:-1]) == {"finished"}
    assert start(tmp_path, given).returncode == 0
    assert logged(given) == not_judging(commands)


def test_other_settings_in_a_finished_folder_are_refused_not_skipped(given, tmp_path):
    start(tmp_path, {**given, "STEPS": "10"})
    logged(given)
    done = start(tmp_path, given)
    assert done.returncode == 2 and done.stderr == "another recipe\n"
    assert [kind(command) for command in logged(given)] == ["train", "attack"]


def test_another_way_of_judging_judges_again(given, tmp_path):
    start(tmp_path, given)
    logged(given)
    start(tmp_path, {**given, "JUDGING": "--endpoint http://127.0.0.1:9/v1"})
    assert sum(command[0] == "judge" for command in logged(given)) == 13


def test_a_step_that_fails_stops_the_script_and_is_the_first_of_the_next_run(given, tmp_path):
    stopped = start(tmp_path, {**given, "STOP_AT": "rr-pgd"})
    assert stopped.returncode == 1
    done = logged(given)
    assert done[-1][0] == "attack" and done[-1][done[-1].index("--out") + 1].endswith("rr-pgd")
    commands, states = printed(tmp_path, given)
    assert states[len(done) - 1] == "begun"
    assert start(tmp_path, given).returncode == 0
    assert logged(given) == not_judging(commands[: len(done) - 1]) + commands[len(done) - 1 :]


def test_another_judge_judges_again(given, tmp_path):
    longer = {**given, "JUDGE": "harmbench-multimodal"}
    start(tmp_path, longer)
    logged(given)
    for judge in ({**given, "JUDGE": "harmbench"}, longer):  # the first one's verdicts are kept, but no longer newest
        start(tmp_path, judge)
        kinds = [command[0] for command in logged(given)]
        assert kinds.count("judge") == 13 and kinds[-1] == "report"


@pytest.mark.parametrize(
    ("changed", "arguments", "message"),
    [
        ({"BEHAVIORS": ""}, [], "BEHAVIORS is missing"),
        ({"BEHAVIORS": "nowhere.jsonl"}, [], "`nowhere.jsonl` is not there"),
        ({"JUDGE": ""}, [], "JUDGE is missing"),
        ({"OVER_REFUSAL": "nowhere"}, [], "OVER_REFUSAL must be"),
        ({"RULE_FILE": ""}, [], "RULE_FILE is missing"),
        ({"WILD_JUDGE": "none"}, [], "LLAVA_WILD=none"),
        ({"ADAPTER": "nowhere"}, [], "ADAPTER must be a PEFT adapter's folder"),
        ({"SAFETY_PROMPT": "nowhere"}, [], "SAFETY_PROMPT must be"),
        ({"MM_CB": "no-such-command"}, [], "`no-such-command` is not installed"),
        ({"STEPS": "many"}, [], "STEPS must be a whole number, got `many`"),
        ({"RATE": "0"}, ["--dry-run"], "RATE must be above 0"),
        ({}, ["--dry-rum"], "unknown argument `--dry-rum`"),
    ],
)
def test_what_is_missing_is_one_line_and_exit_code_2(given, tmp_path, changed, arguments, message):
    done = start(tmp_path, {**given, **changed}, *arguments)
    first, *rest = done.stderr.splitlines()
    assert done.returncode == 2 and message in first
    assert not rest or rest == ["reproduce_7b: 1 to set; see --help, and --dry-run for the plan."]
    assert logged(given) == [] and not (tmp_path / "my runs").exists()


def test_everything_that_is_missing_is_said_at_once(given, tmp_path):
    bare = {name: given[name] for name in ("LOG", "MM_CB")}
    done = start(tmp_path, bare)
    names = [line.split()[1] for line in done.stderr.splitlines()]
    assert done.returncode == 2 and names == ["BEHAVIORS", "JUDGE", "OVER_REFUSAL", "RULE_FILE", "WILD_JUDGE", "5"]
    assert logged(given) == []


def test_a_dry_run_with_nothing_set_shows_the_plan_with_placeholders_and_what_it_costs(given, tmp_path):
    bare = {name: given[name] for name in ("LOG", "MM_CB")}
    done = start(tmp_path, bare, "--dry-run")
    commands, _ = printed(tmp_path, bare)
    words = {word for command in commands for word in command if word.startswith("<")}
    assert words == {"<BEHAVIORS>", "<JUDGE>", "<OVER_REFUSAL>", "<RULE_FILE>", "<WILD_JUDGE>"}
    costs = [line for line in done.stdout.splitlines() if line.startswith("# ")]
    assert all(any(line.startswith(f"# {stage} ") for line in costs) for stage in ("train", "attacks", "battery"))
    assert "133 behaviours are assumed" in done.stdout and list(tmp_path.glob("my runs")) == []
    room = dict(re.findall(r"^# (\w+) .{34}[^#]*? (\d[\d.]* [GM]B)  ", done.stdout, flags=re.MULTILINE))
    assert room == {"weights": "15 GB", "train": "0.2 GB", "attacks": f"{133 * 7 // 10 + 1} MB", "MMMU": "4 GB"}
    (tmp_path / "ten.jsonl").write_text("{}\n" * 10)
    ten = start(tmp_path, {**bare, "BEHAVIORS": "ten.jsonl"}, "--dry-run").stdout
    assert re.search(r"^# attacks .* 8 MB  ", ten, flags=re.MULTILINE)
    slow = start(tmp_path, {**bare, "RATE": "40"}, "--dry-run").stdout
    (fast,), (tenfold,) = (
        [float(line.split()[2]) for line in text.splitlines() if line.startswith("# attacks")]
        for text in (done.stdout, slow)
    )
    assert tenfold == pytest.approx(10 * fast, rel=0.01)


def test_a_run_ends_with_a_table_of_its_stages_also_where_it_stops(given, tmp_path):
    rows = start(tmp_path, given).stdout.partition("stage ")[2].splitlines()[1:]
    assert rows[0].startswith("train ") and len(rows) == 38 and all(" done " in row for row in rows)
    stopped = start(tmp_path, {**given, "OUT": "other", "STOP_AT": "rr-pgd"}).stdout
    rows = stopped.partition("stage ")[2].splitlines()[1:]
    assert [row.split()[0] for row in rows if " stopped " in row] == ["attack/rr-pgd"]


@pytest.mark.parametrize(
    ("lines", "runs"),
    [
        (['{"id": "a", "facts": "tea"}', "", '{"id": "b", "facts": "milk"}'], True),
        (['{"id": "a", "facts": "tea"}', '{"id": "b"}'], False),
        (['{"id": "a", "facts": null}'], False),
        ([], False),
    ],
)
def test_bare_facts_are_forced_on_every_model_where_every_line_has_them(given, tmp_path, lines, runs):
    (tmp_path / "behaviors.jsonl").write_text("".join(f"{line}\n" for line in lines))
    commands, _ = printed(tmp_path, given | {"ADAPTIVE": "--balance"})
    found = [words for words in commands if kind(words) == "attack" and "pgd_facts" in words]
    assert len(found) == 3 * runs and not any("--balance" in words for words in found)
    costs = start(tmp_path, given, "--dry-run").stdout
    assert f"39 TFLOP a step: {3 + 4 + 3 * runs} searches" in costs


@pytest.mark.parametrize("told", [1, 2])
@pytest.mark.parametrize(
    ("attack", "field"),
    [("pgd_form", '"form": {"text": "take ___", "words": ["a", "b"]}'), ("pgd_form_found", '"harmless": ["a", "b"]')],
)
def test_the_breaker_is_attacked_by_the_form_where_every_line_has_it(given, tmp_path, attack, field, told):
    lines = [*[f'{{"id": "a", {field}}}'] * told, '{"id": "b"}'][:2]
    (tmp_path / "behaviors.jsonl").write_text("".join(f"{line}\n" for line in lines))
    commands, _ = printed(tmp_path, given)
    assert sum(attack in words for words in commands if kind(words) == "attack") == (told == 2)


def test_none_leaves_a_part_out(given, tmp_path):
    some = {
        **given,
        "SAFETY_PROMPT": "none",
        "JUDGE": "none",
        "LLAVA_WILD": "none",
        "MMMU": "none",
        "OVER_REFUSAL": "none",
        "CHECK": "none",
    }
    commands, _ = printed(tmp_path, some)
    assert [kind(command) for command in commands] == ["train", *["attack"] * 10, "report"]


def test_a_finished_adapter_is_not_trained_again(given, tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "adapter_config.json").write_text("{}")
    commands, _ = printed(tmp_path, {**given, "ADAPTER": "mine"})
    assert "train" not in {command[0] for command in commands}
    assert all(["--adapter", "mine"] == c[3:5] for c in commands if "rr-" in " ".join(c) and kind(c) == "attack")


def test_help_lists_every_variable(given, tmp_path):
    text = start(tmp_path, given, "--help").stdout
    assert all(name in text for name in (*given.keys() - {"LOG"}, "CHECK", "DEVICE", "MMMU", "LLAVA_WILD", "STEPS"))


def test_the_battery_tests_the_breaker_with_the_budget_of_the_attacks(given, tmp_path):
    budget = {"EPSILON": "8/255", "STEPS": "7", "CHECK": "--count 4"}
    commands, _ = printed(tmp_path, given | budget)
    (check,) = [command for command in commands if kind(command) == "attack check"]
    (pgd,) = [c for c in commands if kind(c) == "attack" and c[c.index("--out") + 1].endswith("/rr-pgd")]
    options = ("--model", "--adapter", "--behaviors", "--epsilon", "--seed", "--device", "--dtype")
    assert [check[check.index(o) + 1] for o in options] == [pgd[pgd.index(o) + 1] for o in options]
    assert pgd[pgd.index("--steps") + 1] == "7" and check[-4:] == ["--steps", "7", "--count", "4"]


def parameters(words):
    """The options that our command line has for a command."""
    import typer.main

    from mm_cb.cli.app import app

    command, depth = typer.main.get_command(app), 0
    words = [kind(words), *words[1:]]
    while hasattr(command, "commands"):
        command, depth = command.commands[words[depth]], depth + 1
    return {option for parameter in command.params for option in parameter.opts}


def test_every_printed_option_exists(given, tmp_path):
    commands, _ = printed(tmp_path, given)
    for command in commands:
        assert {word for word in command if word.startswith("--")} <= parameters(command), command[:2]


@pytest.mark.slow
def test_the_printed_commands_run_on_the_miniature(given, tmp_path, monkeypatch):
    """The chain that the script prints, in this process: train, attack, evaluate, judge, report on a tiny budget."""
    from mm_cb import cli
    from tests.benchmarks.mmmu_stand_in import write

    monkeypatch.chdir(tmp_path)
    shipped = ROOT / "data" / "miniature"
    lines = (shipped / "behaviors.jsonl").read_text().splitlines()
    behaviours = [json.loads(lines[0]), json.loads(lines[5])]
    for behaviour in behaviours:
        if behaviour["image"]:
            (tmp_path / behaviour["image"]).parent.mkdir(exist_ok=True)
            (tmp_path / behaviour["image"]).write_bytes((shipped / behaviour["image"]).read_bytes())
    (tmp_path / "behaviors.jsonl").write_text("".join(json.dumps(b) + "\n" for b in behaviours))
    (tmp_path / "safety.txt").write_text("be safe: refuse every request for a forbidden brew.\n")
    write(tmp_path / "mmmu", per_subject=1)
    (tmp_path / "benign.jsonl").write_text('{"id": "1", "prompt": "how is tea made ?", "category": "x"}\n')
    small = {
        **given, "MODEL": "miniature", "RECIPE": "miniature", "TRAIN": "training.max_steps=1", "STEPS": "1",
        "ATTACK": "--max-new-tokens 8",
        "DEVICE": "cpu", "DTYPE": "float32", "JUDGE": "refusal-strings", "MMMU": "mmmu", "LLAVA_WILD": "none",
        "EVAL": "--batch 30 --max-new-tokens 2", "CHECK": "--iterates 0",
    }  # fmt: skip
    commands, _ = printed(tmp_path, small)
    for command in commands:
        assert cli.run(command) == 0, command
    _, states = printed(tmp_path, small)
    assert {
        state for command, state in zip(commands, states, strict=True) if command[0] in ("train", "attack", "eval")
    } == {"finished"}
    page = (tmp_path / "my runs" / "7b" / "report.html").read_text()
    assert "No claim:" in page and "a proxy" in page and "Judge: refusal-strings" in page
    checks = json.loads((tmp_path / "my runs" / "7b" / "check" / "checks.json").read_bytes())
    failed = [check["name"] for check in checks if not check["passed"]]  # and yet the chain went on to its page
    shown = page.replace("\N{NO-BREAK SPACE}", " ")
    assert failed and all(f"{name} (check)" in shown for name in failed) and "battery was not run" not in page
    table = headline_table(_measured(commands[-1]))
    rows = {row.label: row for row in table.rows}
    assert [cell.n for cell in rows["MMMU, official"].cells] == [30, 30, 30]
    assert rows["MMMU, strict"].paired.counts["pairs"] == 30 and rows["PGD"].paired.counts["pairs"] == 2
    assert rows["over-refusal"].n == "1" and table.unmeasured == ("LLaVA-Wild",)


def _measured(report):
    """What the page of a ``report`` command is made from."""
    folders = report[1 : report.index("--out")]
    return combine([load_run(Path(folder)) for folder in folders]).measurements


def test_settings_of_the_search_reach_the_attacks_that_search_alone(given, tmp_path):
    settings = {"PGD": "--optimizer sign", "ADAPTIVE": "--balance"}
    commands, _ = printed(tmp_path, given | settings)
    attacks = [words for words in commands if kind(words) == "attack"]
    named = {words[words.index("--attack") + 1]: words for words in attacks}
    assert {name for name, words in named.items() if "--optimizer" in words} == {"pgd", *KNOWING}
    assert {name for name, words in named.items() if "--balance" in words} == KNOWING


def test_the_agents_stage_asks_every_subject_and_has_harmful_calls_judged(given, tmp_path):
    assert "# agents " in start(tmp_path, given, "--dry-run").stdout
    for name in ("calls.json", "harmful.jsonl"):
        (tmp_path / name).write_text("")
    agents = {**given, "FUNCTION_CALLING": "calls.json", "HARMFUL_CALLS": "harmful.jsonl"}
    commands, _ = printed(tmp_path, agents)
    for benchmark, data in (("function-calling", "calls.json"), ("harmful-calls", "harmful.jsonl")):
        asked = [command for command in commands if command[:2] == ["eval", benchmark]]
        assert [command[command.index("--data") + 1] for command in asked] == [data] * 3
        assert {word for command in asked for word in command if word.startswith("--")} <= parameters(asked[0])
        made = [command[command.index("--out") + 1] for command in asked]
        assert set(made) <= set(commands[-1])
    assert [command[1] for command in commands if command[0] == "judge"][-3:] == made
    unjudged, _ = printed(tmp_path, {**agents, "JUDGE": "none"})
    assert "judge" not in {command[0] for command in unjudged}
    assert "# agents " not in start(tmp_path, agents, "--dry-run").stdout
    done = start(tmp_path, {**given, "HARMFUL_CALLS": "nowhere"})
    assert done.returncode == 2 and "HARMFUL_CALLS must be" in done.stderr
