"""POPE: the official rule on awkward answers, its five numbers, both layouts of the data, stored answers."""

import io
import json
import random
import string

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

import mm_cb
from mm_cb import cli
from mm_cb.benchmarks.base import Question
from mm_cb.benchmarks.pope import Pope, PopeAnswers, PopeSettings, official_answer, strict_answer
from mm_cb.core.errors import UserError
from mm_cb.core.runs import read_jsonl
from mm_cb.metrics.results import find, read_results
from mm_cb.report.combine import combine
from mm_cb.report.load import load_run
from mm_cb.report.table import headline_table
from tests.reference import pope_rules
from tests.stub_server import StubServer, user_text


@pytest.mark.parametrize(
    ("text", "official", "strict"),
    [
        ("Yes", "yes", "yes"),
        ("yes.", "yes", "yes"),
        ("No", "no", "no"),
        ("No.", "no", "no"),
        ("no", "no", "no"),
        ("No, there is no square.", "no", "no"),
        ("There is not a square in the image.", "no", "no"),
        ("Yes, there is a square. No circle is there.", "yes", "yes"),
        ("Yes, not only one", "no", "no"),
        ("There is a square in the picture.", "yes", None),
        ("NO", "yes", None),
        ("No!", "yes", None),
        ("no\n", "yes", None),
        ("No,there is none", "yes", None),
        ("Nothing", "yes", None),
        (". No", "yes", None),
        ("", "yes", None),
        ("YES", "yes", "yes"),
        ("well, yes", "yes", "yes"),
        ("yesterday", "yes", None),
    ],
)
def test_the_official_rule_and_the_strict_one(text, official, strict):
    assert (official_answer(text), strict_answer(text)) == (official, strict)


def test_blindly_drawn_characters_say_nothing():
    rng = random.Random(0)
    drawn = "".join(rng.choice(string.printable[:94].replace(".", "")) for _ in range(400))
    assert official_answer(f"yes {drawn}") == "yes" and strict_answer(f"yes {drawn}") is None
    assert official_answer(f"no {drawn}") == "no" and strict_answer(f"no {drawn}") is None


def test_an_answer_that_says_nothing_misses_an_object_and_finds_none():
    there, absent = (Question(label, "q", reference=label) for label in ("yes", "no"))
    missed = Pope().score(there, "")["strict"]
    assert missed.value == 0 and missed.counts == {"tp": 0, "fp": 0, "tn": 0, "fn": 1, "fallback": 1}
    neither = Pope().score(absent, "")["strict"]
    assert neither.value == 0 and neither.counts == {"tp": 0, "fp": 0, "tn": 0, "fn": 0, "fallback": 1}
    assert Pope().score(absent, "")["official"].counts["fp"] == 1


KNOWN = ("Yes", "No", "no way", "", "NO", "There is not. Yes", "yes, a circle", "a, b, not", "Yes. No.", "no,t")


def lines(path, count, labels=("yes", "no"), **more):
    rows = [
        {"question_id": n, "image": f"{n % 3}.png", "text": f"Is there a square in image {n}?", "label": labels[n % 2]}
        for n in range(1, count + 1)
    ]
    path.write_text("".join(json.dumps(row | more) + "\n" for row in rows))
    return rows


def pictures(folder):
    folder.mkdir(parents=True, exist_ok=True)
    for n in range(3):
        Image.new("RGB", (8, 6), (60 * n, 10, 10)).save(folder / f"{n}.png")


def answered(path, answers, key="answer"):
    path.write_text("".join(json.dumps({key: answer}) + "\n" for answer in answers))
    return path


@pytest.mark.parametrize("seed", range(5))
def test_the_five_numbers_are_the_official_ones(seed, tmp_path):
    rng = random.Random(seed)
    rows = lines(tmp_path / "coco_pope_random.json", 60, labels=rng.choice([("yes", "no"), ("no", "yes")]))
    answers = [rng.choice(KNOWN) for _ in rows]
    stored = answered(tmp_path / "answers.jsonl", answers)
    arguments = ["--data", str(tmp_path / "coco_pope_random.json"), "--answers", str(stored)]
    assert cli.run(["score", "pope", *arguments, "--out", str(tmp_path / "run")]) == 0
    measured = read_results(tmp_path / "run" / "results.json")
    expected = pope_rules.evaluate(answers, [row["label"] for row in rows])
    names = {"pope": "accuracy", **{f"pope_{name}": name for name in ("precision", "recall", "f1", "yes")}}
    for metric, name in names.items():
        for split in ("all", "random"):
            m = find(measured, "base", metric, "official", split)
            assert m.value == pytest.approx(100 * expected[name], abs=1e-9) and m.n == 60
    strict = find(measured, "base", "pope", "strict")
    assert strict.counts["fallback"] == sum(strict_answer(answer) is None for answer in answers) > 0
    assert strict.value == pytest.approx(
        100 * sum(strict_answer(a) == row["label"] for a, row in zip(answers, rows, strict=True)) / 60
    )


def test_a_model_that_says_nothing_has_no_precision_and_no_strict_point(tmp_path):
    lines(tmp_path / "p.json", 4)
    stored = answered(tmp_path / "a.jsonl", [""] * 4, key="text")
    arguments = ["--data", str(tmp_path / "p.json"), "--answers", str(stored), "--out", str(tmp_path / "run")]
    assert cli.run(["score", "pope", *arguments]) == 0
    measured = read_results(tmp_path / "run" / "results.json")
    assert find(measured, "base", "pope", "official").value is None  # the original rule would give 50 for silence
    assert find(measured, "base", "pope", "strict").value == 0
    assert find(measured, "base", "pope_yes", "official").value is None
    assert find(measured, "base", "pope_yes", "strict").value == 0
    assert find(measured, "base", "pope_precision", "strict").value is None
    assert find(measured, "base", "gibberish", "no_attack").value == 100


def test_base_and_breaker_stand_in_one_table_with_a_paired_difference(tmp_path):
    lines(tmp_path / "p.json", 20)
    runs = []
    for subject, answers in (("base", ["No", "Yes"] * 10), ("rr", ["No", "Yes"] * 6 + ["Yes", "No"] * 4)):
        stored = answered(tmp_path / f"{subject}.jsonl", answers)
        runs.append(tmp_path / subject)
        where = ["--data", str(tmp_path / "p.json"), "--answers", str(stored), "--out", str(runs[-1])]
        assert cli.run(["score", "pope", *where, "--subject", subject]) == 0
    data = combine([load_run(folder) for folder in runs])
    rows = {row.label: row for row in headline_table(data.measurements).rows}
    wanted = {"POPE accuracy, official", "POPE accuracy, strict", "POPE F1, official", "POPE F1, strict"}
    assert wanted <= rows.keys() and "POPE precision, official" not in rows
    f1 = find(data.measurements, "rr", "pope_f1", "official")
    assert f1.difference == pytest.approx(-40) and f1.difference_ci95[0] < -40 < f1.difference_ci95[1] < 0
    assert rows["POPE accuracy, strict"].paired.difference == pytest.approx(-40)


# asking


def test_the_originals_files_are_asked_with_their_pictures_and_goes_on(tmp_path):
    folder = tmp_path / "pope"
    folder.mkdir()
    pictures(tmp_path / "val")
    for kind in ("random", "popular"):
        lines(folder / f"coco_pope_{kind}.json", 3)
    where = ["--model", "m", "--data", str(folder), "--images", str(tmp_path / "val"), "--suffix", " One word."]
    with StubServer(lambda request, number: "Yes") as server:
        for _ in range(2):
            command = ["eval", "pope", *where, "--endpoint", server.url, "--out", str(tmp_path / "run")]
            assert cli.run(command) == 0 and len(server.requests) == 6
        assert {user_text(request) for request in server.requests} == {
            f"Is there a square in image {n}? One word." for n in (1, 2, 3)
        }
        assert server.requests[0]["messages"][0]["content"][0]["type"] == "image_url"
    items = read_jsonl(tmp_path / "run" / "items.jsonl")
    assert [item["id"] for item in items[:6]] == [f"{kind}/{n}" for kind in ("popular", "random") for n in (1, 2, 3)]
    measured = read_results(tmp_path / "run" / "results.json")
    assert {m.split for m in measured if m.metric == "pope"} == {"all", "popular", "random"}


def encoded(n):
    buffer = io.BytesIO()
    Image.new("RGB", (84, 42), (60 * n, 10, 10)).save(buffer, "PNG")
    return {"bytes": buffer.getvalue(), "path": None}


def test_the_hubs_columns_are_asked_of_the_miniature(tmp_path):
    rows = [
        {"id": str(n), "question_id": str(n), "question": "is the stone red ?", "answer": "yes", "image_source": "x",
         "image": encoded(n), "category": "adversarial"}
        for n in (1, 2)
    ]  # fmt: skip
    (tmp_path / "data").mkdir()
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "data" / "test-00000-of-00001.parquet")
    found = mm_cb.evaluate("pope", "miniature", data=tmp_path, out=tmp_path / "run", max_new_tokens=4)
    assert found.find("pope").n == 2 and found.find("pope", "official", "adversarial").n == 2
    assert found.folder == tmp_path / "run" and found.subject == "base" and found.find("mmmu") is None


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ({"label": "maybe"}, "must be yes or no, got 'maybe'"),
        ({"text": ""}, "wrong or missing: text"),
        ({"text": " \u200b\n"}, "wrong or missing: text"),
        ({"label": " "}, "wrong or missing: label"),
        ({"image": "../out.png"}, "must lie inside"),
        ({"image": None}, "p.json:1: `image` must be a path, got null or none"),
        ({"image": 3}, "p.json:1: `image` must be a path, got 3"),
        ({"image": ""}, "p.json:1: `image` must be a path, got ''"),
    ],
)
def test_rows_that_are_not_as_popes(row, expected, tmp_path):
    lines(tmp_path / "p.json", 1, **row)
    with pytest.raises(UserError, match=expected) as caught:
        Pope().questions(str(tmp_path / "p.json"), PopeSettings())
    assert "p.json:1" in str(caught.value)


def test_a_picture_that_is_missing_is_known_before_anything_is_asked(tmp_path, capsys):
    lines(tmp_path / "p.json", 1)
    where = ["--model", "m", "--endpoint", "http://127.0.0.1:9/v1", "--data", str(tmp_path / "p.json")]
    assert cli.run(["eval", "pope", *where, "--out", str(tmp_path / "run")]) == 2
    assert "1.png` does not exist" in capsys.readouterr().err and not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("answers", "expected"),
    [
        ([{"answer": "yes"}], "must hold 2 answers, one a question, got 1"),
        ([{"answer": "yes"}, {"answer": 3}], "must be the answer to question `2`, as a text"),
        *(
            (
                [{"answer": "yes", key: 1}, {"answer": "no", key: foreign}],
                f"has the `{key}` {foreign!r} where question `2`",
            )
            for key in ("question_id", "id", "qid", "doc_id", "questionId", "QID")
            for foreign in (1, 3, "x", None, [2])
        ),
        ([{"answer": "yes", "image": "1.png"}, {"answer": "no", "image": "9.png"}], "about the picture '9.png', but"),
        ([{"answer": "yes", "text": "no"}] * 2, "a.jsonl:1: `answer` and `text` must be one text, they differ"),
        ([{"answer": "yes", "question": "Is there a dog?"}] * 2, "a.jsonl:1 answers 'Is there a dog?', but question"),
    ],
)
def test_stored_answers_that_do_not_fit(answers, expected, tmp_path, capsys):
    lines(tmp_path / "p.json", 2)
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(answer) + "\n" for answer in answers))
    where = ["--data", str(tmp_path / "p.json"), "--answers", str(tmp_path / "a.jsonl"), "--out", str(tmp_path / "o")]
    assert cli.run(["score", "pope", *where]) == 2
    assert expected in capsys.readouterr().err and not (tmp_path / "o").exists()


def test_questions_are_no_answers_to_themselves(tmp_path, capsys):
    lines(tmp_path / "p.json", 2)
    (tmp_path / "copy.json").write_bytes((tmp_path / "p.json").read_bytes())
    for name, expected in (("p.json", "must be another file than `--data`"), ("copy.json", "POPE questions, read by")):
        where = ["--data", str(tmp_path / "p.json"), "--answers", str(tmp_path / name), "--out", str(tmp_path / "o")]
        assert cli.run(["score", "pope", *where]) == 2
        assert expected in capsys.readouterr().err and not (tmp_path / "o").exists()


def test_a_thought_in_front_of_a_stored_answer_is_not_scored(tmp_path, capsys):
    lines(tmp_path / "p.json", 4)
    said = ["yes", "No, none.", "yes", "no"]
    asked = [{"answer": "yes", "text": row["text"]} for row in read_jsonl(tmp_path / "p.json")]
    (tmp_path / "both.jsonl").write_text("".join(json.dumps(row) + "\n" for row in asked))
    questions = Pope().questions(str(tmp_path / "p.json"), PopeSettings(images=str(tmp_path)))
    assert set(Pope().stored_answers(PopeAnswers(answers=str(tmp_path / "both.jsonl")), questions).values()) == {"yes"}
    thoughts = ["<think>no</think>\n\n", "", "[THINK]No?[/THINK]", ""]
    items = []
    for name, answers in (("plain", said), ("thinks", [a + b for a, b in zip(thoughts, said, strict=True)])):
        stored = answered(tmp_path / f"{name}.jsonl", answers)
        where = ["--data", str(tmp_path / "p.json"), "--answers", str(stored), "--out", str(tmp_path / name)]
        assert cli.run(["score", "pope", *where]) == 0
        items.append(read_jsonl(tmp_path / name / "items.jsonl"))
    assert "2 answers came with a thought" in " ".join(capsys.readouterr().out.split())
    assert {item.pop("thought", "") for item in items[1]} == set(thoughts) and items[0] == items[1]
    answered(tmp_path / "cut.jsonl", [*said[:3], "<think>no"])
    where = [
        "--data",
        str(tmp_path / "p.json"),
        "--answers",
        str(tmp_path / "cut.jsonl"),
        "--out",
        str(tmp_path / "cut"),
    ]
    assert cli.run(["score", "pope", *where]) == 0
    assert [item["reason"] for item in read_jsonl(tmp_path / "cut" / "items.jsonl") if "reason" in item] == ["cut"] * 2


def test_a_folder_of_pictures_is_not_given_where_rows_hold_their_own(tmp_path):
    rows = [{"question_id": "1", "question": "Is it?", "answer": "yes", "category": "random", "image": encoded(0)}]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "test.parquet")
    assert Pope().questions(str(tmp_path / "test.parquet"), PopeSettings())
    with pytest.raises(UserError, match="holds its picture itself: leave `--images` out"):
        Pope().questions(str(tmp_path / "test.parquet"), PopeSettings(images=str(tmp_path)))
