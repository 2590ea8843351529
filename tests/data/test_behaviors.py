import csv
import json
from pathlib import Path

import pytest

from mm_cb import cli
from mm_cb.core.errors import UserError
from mm_cb.data.behaviors import SCENARIOS, TARGET, build_behaviors
from mm_cb.data.behaviors_file import behaviors_path, read_behaviors
from mm_cb.data.cards import card
from tests.tiny_llava import picture

SEMANTIC = ["cybercrime_intrusion", "illegal", "harassment_bullying", "harmful", "copyright"]
COLUMNS = ["BehaviorID", "Behavior", "FunctionalCategory", "SemanticCategory", "ImageFileName"]


@pytest.fixture
def harmbench(folder):
    """The layout of the repository with harmless rows; as there, a name may end otherwise than its file."""
    root = folder / "HarmBench" / "data"
    for name in ("behavior_datasets", "optimizer_targets", "multimodal_behavior_images"):
        (root / name).mkdir(parents=True)
    with open(root / "behavior_datasets" / "harmbench_behaviors_multimodal_all.csv", "w", newline="") as file:
        writer = csv.DictWriter(file, [*COLUMNS, "RedactedImageDescription"])
        writer.writeheader()
        for number, category in enumerate(SEMANTIC):
            row = [f"Row-{number}", f"name the\nshape {number}", "multimodal", category, f"pic{number}.jpg"]
            writer.writerow(dict(zip(COLUMNS, row, strict=True)) | {"RedactedImageDescription": f"a shape {number}"})
            picture(number).save(root / "multimodal_behavior_images" / f"pic{number}.png")
    targets = {f"Row-{number}": f"Sure, the shape is {number}" for number in range(len(SEMANTIC))}
    (root / "optimizer_targets" / "harmbench_targets_multimodal.json").write_text(json.dumps(targets))
    return root.parent


@pytest.fixture
def safetybench(folder):
    """The layout of the repository with its pictures unpacked; one .jpg is a PNG."""
    root = folder / "MM-SafetyBench"
    (root / "data" / "processed_questions").mkdir(parents=True)
    scenarios = [*card("mm-safetybench-tiny").scenarios, "07-Sex"]
    for scenario in scenarios:
        rows = {
            str(n): {
                "Question": f"q {n}",
                "Changed Question": f"asked {scenario} {n}",
                "Rephrased Question": f"written {scenario} {n}",
                "Rephrased Question(SD)": f"drawn {scenario} {n}",
            }
            for n in range(3)
        }
        (root / "data" / "processed_questions" / f"{scenario}.json").write_text(json.dumps(rows))
        for variant in ("SD", "SD_TYPO", "TYPO"):
            where = root / "data" / "imgs" / scenario / variant
            where.mkdir(parents=True)
            for n in (0, 2):
                picture(n).save(where / f"{n}.jpg", "PNG" if scenario.startswith("01") and n == 2 else "JPEG")
    tiny = [{"Scenario": scenario, "Sampled_ID_List": [0, 2]} for scenario in scenarios]
    (root / "TinyVersion_ID_List.json").write_text(json.dumps(tiny))
    return root


def test_both_sets_become_one_file_that_the_attack_reads(harmbench, safetybench, folder):
    built = build_behaviors(folder / "out", harmbench=harmbench, mm_safetybench=safetybench)
    behaviors = {behavior.extra["source_id"]: behavior for behavior in read_behaviors(built.path)}
    assert len(behaviors) == 4 + 14 and not built.missing
    assert {behavior.category for behavior in behaviors.values()} == set(SCENARIOS)
    row = behaviors["Row-0"]
    assert (row.prompt, row.target) == ("name the\nshape 0", "Sure, the shape is 0")
    assert (row.category, row.extra["semantic_category"]) == ("malware", "cybercrime_intrusion")
    assert row.extra["context"] == "a shape 0" and "Row-4" not in behaviors  # copyright is none of the seven
    tiny = behaviors["03-Malware_Generation/2"]
    assert (tiny.prompt, tiny.target, tiny.category) == ("written 03-Malware_Generation 2", TARGET, "malware")
    assert tiny.extra["asked"] == "asked 03-Malware_Generation 2"
    assert not any("07-Sex" in key for key in behaviors) and "03-Malware_Generation/1" not in behaviors


def test_ids_are_safe_as_file_names_and_pictures_keep_their_bytes(harmbench, safetybench, folder):
    built = build_behaviors(folder / "out", harmbench=harmbench, mm_safetybench=safetybench)
    for line in built.path.read_text().splitlines():
        record = json.loads(line)
        assert set(record["id"]) <= set("abcdefghijklmnopqrstuvwxyz0123456789_-")
        assert record["image"].startswith(f"images/{record['id']}.")
    source = harmbench / "data" / "multimodal_behavior_images" / "pic0.png"
    row = next(b for b in read_behaviors(built.path) if b.extra["source_id"] == "Row-0")
    assert row.image.read_bytes() == source.read_bytes() and row.image.suffix == ".png"


def test_wrong_endings_are_mended_and_reported(harmbench, safetybench, folder):
    built = build_behaviors(folder / "out", harmbench=harmbench, mm_safetybench=safetybench)
    assert len(built.renamed) == 4 + 1
    assert any("pic0.jpg is pic0.png, of format png" in line for line in built.renamed)
    (wrong,) = [line for line in built.renamed if "01-Illegal" in line]
    assert "question 2: 2.jpg is 2.jpg, of format png" in wrong
    mended = [b for b in read_behaviors(built.path) if b.extra["source_id"] == "01-Illegal_Activitiy/2"]
    assert mended[0].image.suffix == ".png"


def test_missing_and_damaged_pictures_stop_or_are_left_out(safetybench, folder):
    where = safetybench / "data" / "imgs"
    (where / "06-Fraud" / "SD_TYPO" / "0.jpg").unlink()
    (where / "02-HateSpeech" / "SD_TYPO" / "2.jpg").write_bytes(b"\xff\xd8\xff damaged")
    with pytest.raises(UserError, match=r"2 pictures are missing .* the first: .*02-HateSpeech.*damaged header"):
        build_behaviors(folder / "out", mm_safetybench=safetybench)
    assert not (folder / "out" / "behaviors.jsonl").exists()
    built = build_behaviors(folder / "out", mm_safetybench=safetybench, skip_missing=True)
    assert len(read_behaviors(built.path)) == 12 and len(built.missing) == 2
    assert "06-Fraud.json question 0" in built.missing[1]


def test_pictures_that_no_attack_can_start_from_count_as_damaged(safetybench, folder):
    where = safetybench / "data" / "imgs"
    animated = where / "06-Fraud" / "SD_TYPO" / "0.jpg"
    picture(0).save(animated, "GIF", save_all=True, append_images=[picture(1)])
    picture(0).convert("L").convert("I").convert("I;16").save(where / "06-Fraud" / "SD_TYPO" / "2.jpg", "PNG")
    with pytest.raises(UserError, match=r"^2 pictures are missing .*2 frames.*16 bits.*--skip-missing"):
        build_behaviors(folder / "out", mm_safetybench=safetybench)
    assert not (folder / "out").exists()
    built = build_behaviors(folder / "out", mm_safetybench=safetybench, skip_missing=True)
    assert len(read_behaviors(built.path)) == 12 and len(built.missing) == 2
    assert len(list((folder / "out" / "images").iterdir())) == 12


@pytest.mark.parametrize(("variant", "opening"), [("SD", "drawn"), ("TYPO", "written"), ("SD_TYPO", "written")])
def test_every_variant_has_its_own_prompt(safetybench, folder, variant, opening):
    built = build_behaviors(folder / "out", mm_safetybench=safetybench, variant=variant, target="Sure: ")
    assert all(b.prompt.startswith(opening) and b.target == "Sure: " for b in read_behaviors(built.path))


def test_a_list_of_the_users_takes_only_what_it_names(harmbench, safetybench, folder):
    chosen = {"Row-4": "fraud", "09-Privacy_Violence/0": "privacy"}
    built = build_behaviors(folder / "out", harmbench=harmbench, mm_safetybench=safetybench, scenarios=chosen)
    assert [(b.extra["source_id"], b.category) for b in read_behaviors(built.path)] == list(chosen.items())
    with pytest.raises(UserError, match=r"not there: \['Row-9'\]"):
        build_behaviors(folder / "out2", harmbench=harmbench, scenarios={"Row-9": "fraud", "Row-1": "fraud"})
    with pytest.raises(UserError, match="unknown scenario `frauds`, did you mean `fraud`"):
        build_behaviors(folder / "out2", harmbench=harmbench, scenarios={"Row-1": "frauds"})


def test_the_same_again_changes_nothing_and_another_set_is_refused(harmbench, safetybench, folder):
    first = build_behaviors(folder / "out", harmbench=harmbench).path.read_bytes()
    assert build_behaviors(folder / "out", harmbench=harmbench).path.read_bytes() == first
    with pytest.raises(UserError, match="holds other behaviours"):
        build_behaviors(folder / "out", mm_safetybench=safetybench)


def test_missing_files_and_columns_are_named(harmbench, safetybench, folder):
    (safetybench / "TinyVersion_ID_List.json").unlink()
    with pytest.raises(UserError, match=r"must hold TinyVersion_ID_List\.json, it does not; clone the source"):
        build_behaviors(folder / "out", mm_safetybench=safetybench)
    table = harmbench / "data" / "behavior_datasets" / "harmbench_behaviors_multimodal_all.csv"
    table.write_text("Behavior,ID\nx,y\n")
    with pytest.raises(UserError, match=r"must have the columns .*BehaviorID.* it has \['Behavior', 'ID'\]"):
        build_behaviors(folder / "out", harmbench=harmbench)
    targets = harmbench / "data" / "optimizer_targets" / "harmbench_targets_multimodal.json"
    targets.write_text("{broken")
    with pytest.raises(
        UserError, match=r"multimodal\.json:1: expected a JSON object of ids and targets, got broken JSON"
    ):
        build_behaviors(folder / "out", harmbench=harmbench)
    with pytest.raises(UserError, match="give your copy"):
        build_behaviors(folder / "out")


def rewritten(table, old, new):
    """A table with every ``old`` replaced."""
    table.write_text(table.read_text().replace(old, new))


@pytest.mark.parametrize(
    ("old", "new", "match"),
    [
        ("Row-1,", "Row-0,", r"all\.csv:4: the id `Row-0` was used at .*all\.csv:2"),
        ('"name the\nshape 1"', '" "', r"all\.csv:4 must have non-empty texts .*'prompt'"),
        ('"name the\nshape 1"', "name, the shape", r"all\.csv:4: the header has 6 columns, the row 7"),
        ("BehaviorID", "Behavior", r"all\.csv:1: .*`Behavior` comes twice"),
    ],
)
def test_nothing_is_written_of_a_wrong_table_and_the_corrected_one_is_built(harmbench, folder, old, new, match):
    table = harmbench / "data" / "behavior_datasets" / "harmbench_behaviors_multimodal_all.csv"
    sound = table.read_bytes()
    rewritten(table, old, new)
    with pytest.raises(UserError, match=match):
        build_behaviors(folder / "out", harmbench=harmbench)
    assert not (folder / "out").exists()
    table.write_bytes(sound)
    assert len(read_behaviors(build_behaviors(folder / "out", harmbench=harmbench).path)) == 4


def test_behaviours_of_a_category_that_is_not_taken_are_named(harmbench, folder, capsys):
    table = harmbench / "data" / "behavior_datasets" / "harmbench_behaviors_multimodal_all.csv"
    asked = ["data", "build", "behaviors", "--harmbench", str(harmbench), "--out"]
    rewritten(table, SEMANTIC[0], "general_shapes")
    assert cli.run([*asked, "one"]) == 0
    assert "not taken: 2, the first:" in capsys.readouterr().out
    for category in SEMANTIC[1:]:
        rewritten(table, category, "general_shapes")
    assert cli.run([*asked, "none"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "categories that are not taken, the first" in line and "all.csv:2: the category 'general_shapes'" in line
    assert "--scenarios" in line and not Path("none").exists()


def test_a_broken_file_of_an_earlier_build_is_replaced_and_a_users_own_is_not(harmbench, folder):
    path = folder / "out" / "behaviors.jsonl"
    built = build_behaviors(folder / "out", harmbench=harmbench).path.read_text()
    path.write_text(built + built.split("\n")[0] + "\n")  # an id twice, as an earlier version would write it
    assert build_behaviors(folder / "out", harmbench=harmbench).path.read_text() == built
    path.write_text('{"id": "mine"}\n')
    with pytest.raises(UserError, match="holds other behaviours"):
        build_behaviors(folder / "out", harmbench=harmbench)


def test_a_table_that_is_not_utf_8_is_named_with_what_to_do(harmbench, folder, capsys):
    table = harmbench / "data" / "behavior_datasets" / "harmbench_behaviors_multimodal_all.csv"
    table.write_bytes(table.read_bytes().replace(b"shape 0", b"caf\xe9 0"))
    assert cli.run(["data", "build", "behaviors", "--harmbench", str(harmbench), "--out", "made"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert f"{table}:3: the file must be UTF-8, byte" in line and "save it as UTF-8" in line


def test_the_command_reports_what_it_built(harmbench, safetybench, folder, capsys):
    arguments = ["--harmbench", str(harmbench), "--mm-safetybench", str(safetybench), "--out", "made"]
    assert cli.run(["data", "build", "behaviors", *arguments]) == 0
    out = capsys.readouterr().out
    assert "mm-safetybench-tiny: privacy: 2" in out and "wrong file names: 5, the first:" in out
    assert cli.run(["data", "build", "behaviors", "--out", "x", "--variant", "SDD", *arguments[:2]]) == 2
    assert "did you mean `SD`" in capsys.readouterr().err


def test_an_embedded_models_name_stands_for_its_behaviours_unless_a_file_is_called_so(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shipped = behaviors_path(Path("miniature"))
    assert shipped.is_file() and read_behaviors(shipped)
    own = Path("miniature")
    own.write_text("{}")
    assert behaviors_path(own) == own and behaviors_path(Path("no such file")) == Path("no such file")
