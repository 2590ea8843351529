import base64
import hashlib
import io
import json
import tempfile
import time
from pathlib import Path

import pytest
from PIL import Image

from mm_cb import cli
from mm_cb.benchmarks.mmmu.benchmark import MmmuSettings
from mm_cb.benchmarks.mmmu.protocol import protocol
from mm_cb.benchmarks.mmmu.questions import as_asked, fingerprint, prompt_text, read_questions
from mm_cb.core.errors import UserError
from mm_cb.core.files import read_jsonl
from mm_cb.inference import generation
from tests.benchmarks.mmmu_stand_in import encoded, row, write
from tests.stub_server import StubServer, error, user_text

INSTRUCTION = "Answer with the option's letter from the given choices directly."


def run(out, data, *more):
    arguments = [
        "eval",
        "mmmu",
        "--model",
        "miniature",
        "--data",
        str(data),
        "--out",
        str(out),
        "--max-new-tokens",
        "3",
    ]
    return cli.run([*arguments, *more])


def question(**changes):
    (only,) = read_one(row("Art", 1, **changes))
    return only


def read_one(*rows):
    with tempfile.TemporaryDirectory() as folder:
        return read_questions(
            str(write(Path(folder), subjects=["Art"], rows=list(rows))), MmmuSettings(subjects=("Art",))
        )


def huge():
    buffer = io.BytesIO()
    Image.new("1", (12000, 8000)).save(buffer, "PNG")
    return {"bytes": buffer.getvalue(), "path": None}


# what is asked


def test_the_official_prompt():
    asked = question(question="Which {one} is it? <image 1>", options="['a {cat}', \"it's\"]", answer="B")
    assert prompt_text(asked, "official") == (
        f"Which {{one}} is it? <image 1>\n(A) a {{cat}}\n(B) it's\n\n{INSTRUCTION}"
    )
    assert prompt_text(asked, "lmms_eval") == f"Which {{one}} is it? <image 1>\nA. a {{cat}}\nB. it's\n\n{INSTRUCTION}"


def test_the_prompt_of_an_open_question():
    asked = question(question="How much?", question_type="open", options="[]", answer="5")
    line = "Answer the question using a single word or phrase."
    assert prompt_text(asked, "official") == f"How much?\n{line}"
    assert prompt_text(asked, "lmms_eval") == f"How much?\n\n{line}"


@pytest.mark.parametrize(
    ("text", "options", "pictures", "shown"),
    [
        ("<image 2> and <image 1> and <image 2>", ["x", "y"], "named", [1, 2]),
        ("see", ["<image 2>", "<image 3>"], "named", [2, 3]),
        ("no marker", ["x", "y"], "named", [1]),
        ("<image 2> and <image 1>", ["x", "y"], "first", [1]),
    ],
)
def test_the_pictures_that_are_shown(text, options, pictures, shown):
    sizes = {1: (84, 42), 2: (30, 90), 3: (50, 50)}
    slots = {f"image_{n}": encoded(n, size) for n, size in sizes.items()}
    asked = as_asked(question(question=text, options=repr(options), answer="A", **slots), "official", pictures)
    assert [picture.size for picture in asked.pictures] == [sizes[n] for n in shown]
    assert [picture.open().size for picture in asked.pictures] == [sizes[n] for n in shown]


def test_several_answers_are_read_from_the_hubs_text():
    asked = question(question_type="open", options="[]", answer="['24/7', '3.429']")
    assert asked.answer == ("24/7", "3.429")


# where it comes from


def test_a_saved_data_set_holds_the_same_questions_as_parquet(tmp_path):
    from datasets import Dataset, DatasetDict, Features, Value
    from datasets import Image as Pictures

    names = ["id", "question", "options", "answer", "question_type"]
    features = Features({**{n: Value("string") for n in names}, **{f"image_{n}": Pictures() for n in range(1, 8)}})
    rows = [row("Art", number) for number in (1, 2, 3)]
    table = Dataset.from_list(rows, features=features)
    table.save_to_disk(str(tmp_path / "one" / "Art"))
    DatasetDict({"validation": table}).save_to_disk(str(tmp_path / "two" / "Art"))
    write(tmp_path / "three", subjects=["Art"], rows=rows)
    only = MmmuSettings(subjects=("Art",))
    prints = {fingerprint(read_questions(str(tmp_path / name), only)) for name in ("one", "two", "three")}
    assert len(prints) == 1


def test_a_subject_without_questions_is_named(tmp_path):
    from pyarrow import parquet

    write(tmp_path, subjects=["Art", "Music"])
    for file in (tmp_path / "Music").glob("*.parquet"):
        parquet.write_table(parquet.read_table(file).slice(0, 0), file)
    with pytest.raises(UserError, match="Music` must hold at least one question of split validation, it holds none"):
        read_questions(str(tmp_path), MmmuSettings(subjects=("Art", "Music")))


def test_questions_come_in_official_order_whatever_is_named_first(tmp_path):
    write(tmp_path, subjects=["Art", "Music"])
    ids = [q.id for q in read_questions(str(tmp_path), MmmuSettings(subjects=("Music", "Art"), limit=2))]
    assert ids == ["validation_Art_1", "validation_Art_2", "validation_Music_1", "validation_Music_2"]


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"options": "['a', 'b'"}, "literal list"),
        ({"options": "__import__('os').getcwd()"}, "literal list"),
        ({"options": "['a', 2]"}, "literal list"),
        ({"options": "[]"}, "literal list"),
        ({"answer": "E"}, "`answer` must be one of A, B, C, D"),
        ({"answer": "?"}, "withheld"),
        ({"id": "validation_Music_1"}, "must belong to split validation of Art"),
        ({"id": "dev_Art_1"}, "must belong to split validation of Art"),
        ({"question": None}, "question hold none"),
        ({"image_1": {"bytes": b"", "path": "a.png"}}, "`image_1` must hold the picture's bytes"),
        (
            {"image_1": {"bytes": b"no picture", "path": None}},
            "`image_1`: expected a PNG, JPEG, WebP, GIF, BMP or TIFF image, got text (10 bytes)",
        ),
        (
            {"image_1": {"bytes": encoded()["bytes"][:-60], "path": None}},
            "`image_1`: expected a whole image, got a damaged one",
        ),
        ({"image_1": huge()}, "`image_1`: expected at most"),
    ],
)
def test_rows_that_are_not_as_mmmus(changes, expected):
    with pytest.raises(UserError) as caught:
        question(**changes)
    assert expected in str(caught.value) and "Art, row 1" in str(caught.value)


def test_a_question_that_comes_twice_is_refused_before_anything_is_asked():
    with pytest.raises(UserError, match="`validation_Art_1` comes 2 times"):
        read_one(row("Art", 1), row("Art", 1))


@pytest.mark.parametrize("number", ["9" * 5000, "-1", "1.5", " "])
def test_numbers_that_are_none_are_one_line(number, tmp_path, capsys):
    assert run(tmp_path / "run", tmp_path, "--subjects", "Art", "--limit", str(number)) == 2
    line = capsys.readouterr().err
    assert "`--limit` must be a whole number" in line and line.count("\n") == 1 and len(line) < 200


def test_transparency_is_dropped_as_the_reference_harness_does():
    buffer = io.BytesIO()
    Image.new("RGBA", (4, 4), (10, 20, 30, 0)).save(buffer, "PNG")
    asked = question(image_1={"bytes": buffer.getvalue(), "path": None})
    assert asked.pictures[1].open().getcolors() == [(16, (10, 20, 30))]


def test_a_picture_that_is_named_but_missing():
    with pytest.raises(UserError, match="must have `image_2`"):
        as_asked(question(question="<image 1> <image 2>"), "official", "named")


# asking


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder = tmp_path_factory.mktemp("mmmu")
    write(folder / "data", per_subject=5, subjects=["Art", "Music"])
    assert run(folder / "run", folder / "data", "--subjects", "Art,Music", "--batch", "4") == 0
    return folder


def measurements(out):
    return json.loads((out / "results.json").read_text())["measurements"]


def test_a_model_is_asked_and_scored(finished):
    items = read_jsonl(finished / "run" / "items.jsonl")
    assert [i["id"] for i in items[:10]] == [f"validation_{s}_{n}" for s in ("Art", "Music") for n in range(1, 6)]
    assert {i["subject"] for i in items} == {"base"} and all(isinstance(i["completion"], str) for i in items)
    assert items[0]["prompt"].endswith(INSTRUCTION)
    assert {m["condition"] for m in measurements(finished / "run") if m["metric"] == "mmmu"} == {"official", "strict"}
    (timing,) = read_jsonl(finished / "run" / "timings.jsonl")
    assert 0 < timing["forward_passes"] <= 3 * 3  # three batches of four, three tokens at most


def test_a_stopped_run_repeats_no_question_and_the_batch_may_change(finished, tmp_path, monkeypatch):
    real, asked = generation.complete_batch, []

    def stopping(subject, requests, tokens):
        if len(asked) == 6:
            raise KeyboardInterrupt
        asked.extend(r.key for r in requests)
        return real(subject, requests, tokens)

    monkeypatch.setattr(generation, "complete_batch", stopping)
    arguments = (tmp_path / "run", finished / "data", "--subjects", "Art,Music")
    assert run(*arguments, "--batch", "3") == 130
    monkeypatch.setattr(generation, "complete_batch", lambda s, r, t: asked.extend(q.key for q in r) or real(s, r, t))
    assert run(*arguments, "--batch", "2") == 0
    assert len(asked) == len(set(asked)) == 10
    for name in ("items.jsonl", "results.json", "checks.json"):
        assert (tmp_path / "run" / name).read_bytes() == (finished / "run" / name).read_bytes()


@pytest.mark.parametrize(
    ("more", "expected"),
    [
        (["--subjects", "Art"], "subjects"),
        (["--subjects", "Art,Music", "--prompt", "lmms_eval"], "prompt"),
        (["--subjects", "Art,Music", "--subject", "mine"], "subject"),
        (["--subjects", "Art,Music", "--limit", "1"], "questions_sha256"),
    ],
)
def test_another_runs_directory_is_refused(finished, capsys, more, expected):
    assert run(finished / "run", finished / "data", *more) == 2
    line = capsys.readouterr().err
    assert "holds another run's results" in line and expected in line and line.count("\n") == 1


@pytest.mark.parametrize(
    ("more", "expected"),
    [
        ([], "a folder per MMMU subject, Accounting, Agriculture"),
        (
            ["--subjects", "Art", "--split", "dev"],
            "must hold split dev as dev-*.parquet or a saved data set, got validation-",
        ),
        (["--subjects", "Art", "--split", "test"], "withheld"),
    ],
)
def test_copies_that_lack_something(finished, tmp_path, capsys, more, expected):
    assert run(tmp_path / "run", finished / "data", *more) == 2
    line = capsys.readouterr().err
    assert expected in line and line.count("\n") == 1
    assert not (tmp_path / "run").exists()


def test_a_data_set_that_is_nowhere_is_one_line(tmp_path, capsys):
    assert run(tmp_path / "run", "no-such/data-set-anywhere", "--subjects", "Art") == 2
    line = capsys.readouterr().err
    assert "no-such/data-set-anywhere" in line and line.count("\n") == 1


def test_all_thirty_subjects_are_asked(tmp_path):
    write(tmp_path / "data", per_subject=1)
    assert run(tmp_path / "run", tmp_path / "data") == 0
    whole = [m for m in measurements(tmp_path / "run") if m["metric"] == "mmmu" and m["split"] == "all"]
    assert [m["n"] for m in whole] == [len(protocol().subjects)] * 2 == [30, 30]


# a model behind an endpoint


def test_a_served_model_is_asked_with_its_pictures_and_scored(tmp_path):
    data = write(tmp_path / "data", per_subject=5, subjects=["Art"])
    where = ["--subjects", "Art", "--endpoint"]
    working = False

    def answer(request, number):
        return "B" if working or number < 2 else error(401)

    with StubServer(answer) as server:
        assert run(tmp_path / "run", data, *where, server.url, "--batch", "1") == 2
        assert not (tmp_path / "run" / "results.json").exists() and len(server.requests) == 3
        working = True
        assert run(tmp_path / "run", data, *where, server.url) == 0
        assert len(server.requests) == 3 + 3
        sent = {user_text(request): shown(request) for request in server.requests}
    questions = read_questions(str(data), MmmuSettings(subjects=("Art",)))
    asked = [as_asked(q, "official", "named") for q in questions]
    assert sorted(len(r.pictures) for r in asked) == [1, 1, 1, 1, 2]
    assert sent == {r.prompt: [p.open().tobytes() for p in r.pictures] for r in asked}
    correct = next(m for m in measurements(tmp_path / "run") if m["metric"] == "mmmu" and m["split"] == "all")
    assert correct["n"] == 5 and correct["counts"]["correct"] == 1  # number 1 of `ABCD`; the open one is no letter


def test_a_question_that_the_server_refuses_is_unscored_and_the_server_may_move(tmp_path, capsys):
    data = write(tmp_path / "data", per_subject=5, subjects=["Art"])
    where = [tmp_path / "run", data, "--subjects", "Art", "--batch", "1", "--endpoint"]
    with StubServer(lambda request, number: "B" if number < 2 else error(401)) as server:
        assert run(*where, server.url) == 2
    with StubServer(lambda request, number: error(400, "image too large") if number == 0 else "B") as server:
        assert run(*where, server.url) == 0 and len(server.requests) == 3
        assert run(*where, server.url) == 0 and len(server.requests) == 3
    out = " ".join(capsys.readouterr().out.split())
    assert out.count("CAUTION 1 requests have no answer: 1 refused") == 2 and "image too large" in out
    items = read_jsonl(tmp_path / "run" / "items.jsonl")
    assert [(item["score"], item["letter"]) for item in items if item["completion"] == ""] == [(None, None)] * 2


def test_neither_the_number_of_workers_nor_the_order_of_answers_changes_a_score(tmp_path):
    data = write(tmp_path / "data", per_subject=5, subjects=["Art", "Music"])
    texts = ["A", "the answer is (C).", "I cannot tell", ""]  # two of four make the official rule draw

    def answer(request, number):
        chosen = hashlib.sha256(user_text(request).encode()).digest()[0] % len(texts)
        time.sleep(0.02 * (chosen % 3))  # later requests overtake earlier ones
        return texts[chosen]

    found = []
    with StubServer(answer) as server:
        for workers in (1, 8):
            out = tmp_path / f"workers-{workers}"
            assert run(out, data, "--subjects", "Art,Music", "--batch", str(workers), "--endpoint", server.url) == 0
            found.append([(out / name).read_bytes() for name in ("items.jsonl", "results.json")])
    assert found[0] == found[1]
    official = next(m for m in json.loads(found[0][1])["measurements"] if m["metric"] == "mmmu" and m["split"] == "all")
    assert official["counts"]["fallback"] > 0


def shown(request):
    """Decoded pictures of a request's last message."""
    urls = [part["image_url"]["url"] for part in request["messages"][-1]["content"] if part["type"] == "image_url"]
    return [Image.open(io.BytesIO(base64.b64decode(url.partition(",")[2]))).tobytes() for url in urls]


def test_a_served_model_takes_no_adapter(tmp_path, capsys):
    write(tmp_path / "data", per_subject=1, subjects=["Art"])
    more = ["--subjects", "Art", "--endpoint", "http://127.0.0.1:9/v1", "--adapter", str(tmp_path)]
    assert run(tmp_path / "run", tmp_path / "data", *more) == 2
    assert "serve the merged model" in capsys.readouterr().err and not (tmp_path / "run" / "results.json").exists()
