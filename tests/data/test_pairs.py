import hashlib
import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mm_cb import cli
from mm_cb.core.endpoint import Endpoint, EndpointFailure
from mm_cb.core.errors import UserError
from mm_cb.core.files import read_jsonl
from mm_cb.data.describe import describe_by_endpoint, describe_by_model
from mm_cb.data.generated import GeneratedPair, parse_pair
from mm_cb.data.mixture import load_examples
from mm_cb.data.pairs import PairRecipe, build_pairs
from mm_cb.data.sources import Source
from tests.data.conftest import read_examples
from tests.models.conftest import save_text_model
from tests.stub_server import BROKEN_JSON, NOTHING, Reply, StubServer, error, says, user_text
from tests.tiny_llava import picture, tiny_llava

TEMPLATE = "Write a question about this and its answer as JSON {query, completion}: {description}"
COUNT = 6


@pytest.fixture(autouse=True)
def direct(monkeypatch):
    """Pauses take no time here: how long they are is tested in tests/core/test_endpoint.py."""

    async def no_time(seconds):
        pass

    monkeypatch.setattr("mm_cb.core.endpoint._sleep", no_time)


@pytest.fixture
def photos(folder):
    (folder / "photos" / "sub").mkdir(parents=True)
    for number in range(COUNT):
        picture(number).save(folder / "photos" / ("sub" if number % 2 else ".") / f"photo {number}.png")
    return folder / "photos"


def answer(text):
    description = text[-8:]
    words = hashlib.sha256(description.encode()).hexdigest()
    query = " ".join([*(words[i : i + 3] for i in range(0, 24, 3)), description])
    return json.dumps({"query": query, "completion": "a square"})


def well(request, number):
    """Describes pictures by their content's hash, and writes about the description it is given."""
    content = request["messages"][-1]["content"]
    if not isinstance(content, str):
        url = next(part["image_url"]["url"] for part in content if part["type"] == "image_url")
        return hashlib.sha256(url.encode()).hexdigest()[:8]
    return answer(content)


def build(photos, out, server, template=TEMPLATE, behaviors=(), retries=2, timeout=5.0, concurrency=4, **fields):
    endpoint = Endpoint(server.url, "writer", retries=retries, timeout=timeout, concurrency=concurrency)

    def describe(pictures):
        return describe_by_endpoint(endpoint, pictures)

    recipe = PairRecipe("describer", "writer", template, **fields)
    return build_pairs(photos, out, recipe, describe=describe, generator=endpoint, behaviors=behaviors)


def test_pictures_become_examples_that_training_reads(photos, folder):
    with StubServer(well) as server:
        built = build(photos, folder / "out", server)
    examples = read_examples(built.path)
    assert built.pairs == len(examples) == COUNT and not built.rejected and not built.left
    assert {(e.set, e.modality) for e in examples} == {("circuit_breaker", "multimodal")}
    assert all(example.open_images()[0].size == (84, 42) for example in examples)
    origins = [json.loads(line) for line in (folder / "out" / "provenance.jsonl").read_text().splitlines()]
    assert [origin["id"] for origin in origins] == [example.id for example in examples]
    for origin, example in zip(origins, examples, strict=True):
        content = (photos / origin["image"]).read_bytes()
        assert (
            origin["image_sha256"] == hashlib.sha256(content).hexdigest() and example.images[0].read_bytes() == content
        )
        assert origin["template_sha256"] == hashlib.sha256(TEMPLATE.encode()).hexdigest()
        assert (origin["describer"], origin["generator"], origin["attempt"]) == ("describer", "writer", 1)
        assert example.messages[0]["content"][1]["text"].endswith(origin["description"])


def test_a_server_that_misbehaves_loses_nothing_and_costs_nothing_twice(photos, folder):
    faults = [error(429, retry_after_ms="1"), error(500), BROKEN_JSON, NOTHING, Reply(hang_up=True)]
    slow = says("late", delay=1.2)

    def moody(request, number):
        return faults[number // 2 % len(faults)] if number % 2 == 0 else slow if number == 9 else well(request, number)

    with StubServer(well) as good, StubServer(moody) as bad:
        calm = build(photos, folder / "calm", good)
        rough = build(photos, folder / "rough", bad, timeout=1.0, retries=8)
    assert rough.path.read_bytes() == calm.path.read_bytes() and rough.pairs == COUNT


def test_broken_empty_and_half_answers_are_asked_for_again(photos, folder):
    given_so_far = {}

    def careless(request, number):
        if not isinstance(request["messages"][-1]["content"], str):
            return well(request, number)
        text = user_text(request)
        given_so_far[text] = given_so_far.get(text, 0) + 1
        return ["", '{"query": "half', "no"][given_so_far[text] - 1] if given_so_far[text] < 4 else answer(text)

    with StubServer(careless) as server:
        assert build(photos, folder / "few", server, attempts=3).pairs == 0
        given_so_far.clear()
        built = build(photos, folder / "more", server, attempts=4)
    assert built.pairs == COUNT and built.rejected == {"empty answer": COUNT, "no JSON object": 2 * COUNT}
    assert '"attempt": 4' in (folder / "more" / "provenance.jsonl").read_text()


@pytest.mark.parametrize("stops_after", [1, 4, 8, 11])
def test_a_run_that_was_stopped_pays_for_no_answer_twice(photos, folder, stops_after):
    def failing(request, number):
        return well(request, number) if number < stops_after else error(401)

    with StubServer(failing) as server:
        stopped = build(photos, folder / "out", server, concurrency=1)
    assert "wants a key" in stopped.stopped and stopped.pairs + sum(stopped.left.values()) == COUNT
    assert len(read_jsonl(folder / "out" / "pairs.jsonl")) == stopped.pairs
    with StubServer(well) as second, StubServer(well) as whole:
        resumed = build(photos, folder / "out", second, concurrency=1)
        straight = build(photos, folder / "whole", whole)
    assert len(second.requests) == 2 * COUNT - stops_after
    assert resumed.path.read_bytes() == straight.path.read_bytes()
    with StubServer(well) as third:
        assert build(photos, folder / "out", third).pairs == COUNT and not third.requests


def test_a_refused_request_is_tried_again_by_the_next_run_only(photos, folder):
    def picky(request, number):
        return error(400, "too long") if number == 0 else well(request, number)

    with StubServer(picky) as server:
        built = build(photos, folder / "out", server, concurrency=1)
    assert built.pairs == COUNT - 1 and built.left == {"description: refused": 1}
    (failure,) = read_jsonl(folder / "out" / "failures.jsonl")
    assert failure["image"] == "photo 0.png" and "too long" in failure["reason"]
    with StubServer(well) as server:
        assert build(photos, folder / "out", server).pairs == COUNT and len(server.requests) == 2
    assert not read_jsonl(folder / "out" / "failures.jsonl")


def test_a_generator_that_always_refuses_a_picture_is_asked_so_often_and_no_more(photos, folder):
    with StubServer(well) as server:
        refused = build(photos, folder / "all", server).path
    words = read_examples(refused)[0].messages[0]["content"][1]["text"][-8:]

    def strict(request, number):
        content = request["messages"][-1]["content"]
        return error(400, "filtered") if isinstance(content, str) and words in content else well(request, number)

    with StubServer(strict) as server:
        built = build(photos, folder / "out", server, attempts=2)
        assert len(server.requests) == 2 * COUNT + 1
        again = build(photos, folder / "out", server, attempts=2)
        assert len(server.requests) == 2 * COUNT + 1
    assert built.pairs == again.pairs == COUNT - 1 and not built.left and not again.left
    assert built.rejected == again.rejected == {"answer refused": 2}
    assert json.loads((folder / "out" / "run.json").read_text())["ended"]
    assert ["filtered" in failure["reason"] for failure in read_jsonl(folder / "out" / "failures.jsonl")] == [True] * 2


def test_a_describer_that_always_refuses_a_picture_is_asked_once_a_run_and_then_no_more(photos, folder):
    def blind(request, number):
        return well(request, number) if isinstance(request["messages"][-1]["content"], str) else error(400, "too long")

    with StubServer(blind) as server:
        first = build(photos, folder / "out", server, attempts=2)
        assert first.left == {"description: refused": COUNT}
        build(photos, folder / "out", server, attempts=2)
        last = build(photos, folder / "out", server, attempts=2)
        assert len(server.requests) == 2 * COUNT
    assert not last.left and last.rejected == {"description refused": 2 * COUNT}


def test_a_picture_that_was_replaced_is_another_one(photos, folder):
    with StubServer(well) as server:
        build(photos, folder / "out", server)
        (photos / "photo 0.png").write_bytes((photos / "photo 2.png").read_bytes())
        picture(77).save(photos / "photo 2.png")
        examples = read_examples(build(photos, folder / "out", server).path)
    origins = read_jsonl(folder / "out" / "provenance.jsonl")
    for origin, example in zip(origins, examples, strict=True):
        assert hashlib.sha256(example.images[0].read_bytes()).hexdigest() == origin["image_sha256"]
        assert example.id == origin["id"] and example.messages[0]["content"][1]["text"].endswith(origin["description"])


def test_both_sets_can_be_built_from_one_folder_and_trained_together(photos, folder):
    def of_either(request, number):
        said = well(request, number)
        return said.replace("square", "circle") if "for retain" in str(request) else said

    sets = ("circuit_breaker", "retain")
    with StubServer(of_either) as server:
        paths = [build(photos, folder / s, server, set=s, template=f"{TEMPLATE} for {s}").path for s in sets]
    mixture = load_examples([Source(str(path)) for path in paths], 0)
    assert len({mixture[i].id for i in range(len(mixture))}) == len(mixture) == 2 * COUNT


@pytest.mark.parametrize("describing", [True, False])
def test_hang_ups_cost_their_own_pictures_and_no_others(photos, folder, describing):
    """A server that hangs up on two pictures again and again, over more requests than end a run that gets no answer."""
    for number in range(COUNT, 24):
        picture(number).save(photos / f"photo {number}.png")
    bad: set[str] = set()

    def flaky(request, number):
        content = request["messages"][-1]["content"]
        text = content if isinstance(content, str) else json.dumps(content)
        if isinstance(content, str) != describing and (text in bad or len(bad) < 2 <= number):
            bad.add(text)
            return Reply(hang_up=True)
        return well(request, number)

    with StubServer(flaky) as server:
        built = build(photos, folder / "out", server, retries=1, concurrency=2)
    stage = "description" if describing else "answer"
    assert built.left == {f"{stage}: down": 2} and built.pairs == 22 and not built.stopped
    failures = read_jsonl(folder / "out" / "failures.jsonl")
    assert len({failure["image"] for failure in failures}) == 2 and "without a reply" in failures[0]["reason"]
    with StubServer(well) as server:
        assert build(photos, folder / "out", server).pairs == 24
        assert len(server.requests) == (4 if describing else 2)


def test_a_server_that_goes_down_ends_the_run_with_what_there_is(photos, folder):
    for number in range(COUNT, 30):
        picture(number).save(photos / f"photo {number}.png")

    def dying(request, number):
        return well(request, number) if number < 34 else Reply(hang_up=True)

    with StubServer(dying) as server:
        built = build(photos, folder / "out", server, retries=0, concurrency=1)
        assert len(server.requests) == 34 + 16
    assert "without a reply" in built.stopped and built.pairs == 4
    assert built.left == {"answer: down": 16, "answer: not asked": 10}
    with StubServer(well) as server:
        assert build(photos, folder / "out", server).pairs == 30 and len(server.requests) == 26


def test_a_server_that_was_never_there_is_asked_once(photos, folder):
    with StubServer(lambda request, number: Reply(hang_up=True)) as server:
        built = build(photos, folder / "out", server, retries=0, concurrency=1)
        assert len(server.requests) == 1
    assert (
        built.left == {"description: down": 1, "description: not asked": COUNT - 1}
        and "without a reply" in built.stopped
    )


def test_queries_close_to_a_behaviour_are_dropped(photos, folder):
    with StubServer(well) as server:
        keys = [json.loads(line)["id"] for line in build(photos, folder / "a", server).path.read_text().splitlines()]
        close = read_examples(folder / "a" / "pairs.jsonl")[2].messages[0]["content"][1]["text"]
        built = build(photos, folder / "b", server, behaviors=[close.upper() + " ?"], attempts=1)
    kept = [example.id for example in read_examples(built.path)]
    assert kept == [key for key in keys if key != keys[2]] and built.rejected == {"contaminated by a behaviour": 1}


def test_equal_pictures_are_paid_for_once_and_damaged_ones_are_named(photos, folder):
    (photos / "copy.png").write_bytes((photos / "photo 0.png").read_bytes())
    (photos / "bad.png").write_bytes(b"no picture")
    with StubServer(well) as server:
        built = build(photos, folder / "out", server)
    assert len(server.requests) == 2 * COUNT and built.rejected == {"corrupt picture": 1} and not built.left
    assert [failure["image"] for failure in read_jsonl(folder / "out" / "failures.jsonl")] == ["bad.png"]


def test_a_limit_is_a_seeded_sample(photos, folder):
    with StubServer(well) as server:
        ids = [
            [e.id for e in read_examples(build(photos, folder / f"{n}", server, limit=3, seed=seed).path)]
            for n, seed in enumerate([0, 0, 1])
        ]
    assert len(ids[0]) == 3 and ids[0] == ids[1] != ids[2]


def test_another_template_is_another_set(photos, folder):
    with StubServer(well) as server:
        build(photos, folder / "out", server)
        with pytest.raises(UserError, match=r"another run's results, different in: recipe\.template "):
            build(photos, folder / "out", server, template="Other: {description}")


def test_the_template_needs_its_slot():
    with pytest.raises(UserError, match=r"must hold \{description\}"):
        PairRecipe("a", "b", "no slot")


def test_a_model_on_this_machine_describes_in_order(photos):
    files = sorted(photos.rglob("*.png"))
    pictures = [(str(n), file) for n, file in enumerate(files)]
    bad = photos / "bad.png"
    bad.write_bytes(b"x")
    described = dict(describe_by_model(tiny_llava(), [*pictures, ("bad", bad)], max_tokens=4))
    assert isinstance(described.pop("bad"), EndpointFailure)
    alone = dict(describe_by_model(tiny_llava(), pictures[2:3], max_tokens=4))
    assert list(described) == [key for key, _ in pictures] and described["2"] == alone["2"]


def test_braces_in_front_of_the_pair_do_not_hide_it():
    pair = json.dumps({"query": "a", "completion": "b"})
    for talk in ("The set {x, y}: ", '{"note": 1} ', "{{{ "):
        assert parse_pair(talk + pair) == GeneratedPair("a", "b")


def test_what_is_no_character_is_no_pair():
    """Training would refuse the file that it stands in."""
    for text in ('{"query": "a \\ud83d", "completion": "b"}', '{"query": "a", "completion": "b\\u0000"}'):
        assert parse_pair(text) == "holds what is no character"


TEXT = st.text(min_size=1).filter(lambda text: text.strip() and "<image>" not in text and "\0" not in text)


@given(TEXT, TEXT, st.sampled_from(["{}", "```json\n{}\n```", "Here it is:\n{}\nI hope it helps {{ }}"]), st.booleans())
@settings(max_examples=60, deadline=None)
def test_a_pair_survives_fences_and_talk(query, completion, around, plain):
    text = around.format(json.dumps({"query": query, "completion": completion, "note": 1}, ensure_ascii=plain))
    assert parse_pair(text) == GeneratedPair(query.strip(), completion.strip())


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("", "empty answer"),
        (" \n", "empty answer"),
        ("I cannot do that.", "no JSON object"),
        ('{"query": "a", "comp', "no JSON object"),
        ("[1]", "no JSON object"),
        ('{"query": "a"}', "query or completion missing"),
        ('{"query": "a", "completion": ""}', "query or completion missing"),
        ('{"query": 3, "completion": "b"}', "query or completion missing"),
        ('{"query": "a <image>", "completion": "b"}', "holds the image placeholder"),
        ("{" * 100_000, "no JSON object"),
    ],
)
def test_other_answers_say_what_is_wrong(text, reason):
    assert parse_pair(text) == reason


def test_a_describer_without_eyes_is_refused(photos, folder, capsys):
    (folder / "t.txt").write_text(TEMPLATE)
    model = save_text_model(folder / "text", "gpt2")
    words = ["--template", "t.txt", "--describer", str(model), "--generator", "g", "--generator-url", "http://h/v1"]
    assert cli.run(["data", "build", "pairs", "--images", "photos", "--out", "out", *words]) == 2
    assert "is a model of text alone" in capsys.readouterr().err and not (folder / "out").exists()


def test_the_command_builds_resumes_and_says_what_is_missing(photos, folder, capsys):
    (folder / "t.txt").write_text(TEMPLATE)

    def arguments(server):
        servers = ["--describer", "d", "--describer-url", server.url, "--generator", "g", "--generator-url", server.url]
        return ["data", "build", "pairs", "--images", "photos", "--template", "t.txt", "--out", "out", *servers]

    def picky(request, number):
        return error(400, "filtered") if number == 0 else well(request, number)

    with StubServer(picky) as server:
        assert cli.run(arguments(server)) == 2
    output = capsys.readouterr()
    assert (
        f"pairs: {COUNT - 1}" in output.out
        and "1 of 6 pictures have no answer yet (1 description: refused" in output.err
    )
    with StubServer(well) as server:
        assert cli.run(arguments(server)) == 0 and len(server.requests) == 2
    assert f"pairs: {COUNT}" in capsys.readouterr().out


def test_a_build_of_nothing_is_no_success(photos, folder, capsys):
    (folder / "t.txt").write_text(TEMPLATE)

    def useless(request, number):
        return "no pair" if "image_url" not in json.dumps(request) else well(request, number)

    with StubServer(useless) as server:
        servers = ["--describer", "d", "--describer-url", server.url, "--generator", "g", "--generator-url", server.url]
        words = ["--images", "photos", "--template", "t.txt", "--out", "out", "--attempts", "1", *servers]
        assert cli.run(["data", "build", "pairs", *words]) == 2
    said = capsys.readouterr()
    assert f"nothing was built of {COUNT} pictures" in said.err and "not used:" in said.out
