import csv
import pickle
import re
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest

from mm_cb.core.embedded import guests
from mm_cb.core.errors import UserError
from mm_cb.data.cards import card
from mm_cb.data.check import Limits, check_sources
from mm_cb.data.examples import kinds_of
from mm_cb.data.mixture import load_examples, without_request
from mm_cb.data.records import as_examples
from mm_cb.data.refusals import Refusals
from mm_cb.data.sources import OpenSource, Rules, Source
from mm_cb.training.batches import PairedExamples, hold_out
from tests.data.conftest import breaker_row, llava_row, own_row
from tests.tiny_llava import picture


def texts(example):
    return [
        m["content"] if isinstance(m["content"], str) else "".join(p.get("text", "") for p in m["content"])
        for m in example.messages
    ]


@pytest.fixture
def breakers(save):
    return save("circuit_breakers_train.json", [breaker_row(i) for i in range(20)], array=True)


def write_xstest(path):
    with open(path, "w", newline="") as file:
        writer = csv.DictWriter(file, ["id", "prompt", "completion", "final_label"])
        writer.writeheader()
        for number, label in enumerate(["1_full_compliance", "2_full_refusal", "3_partial_refusal"] * 2):
            row = {"id": number, "prompt": f"how to\ncook {number}", "completion": f"so {number}", "final_label": label}
            writer.writerow(row)
    return path


def test_the_set_decides_which_column_answers(breakers):
    rerouted, kept = (load_examples([Source(str(breakers), set=s)], 0) for s in ("circuit_breaker", "retain"))
    assert texts(rerouted[3]) == ["how to brew tea number 3", "brew it like so 3"]
    assert texts(kept[3]) == ["how to brew tea number 3", "i can not tell"]
    assert {e.set for e in rerouted} == {"circuit_breaker"} and {e.set for e in kept} == {"retain"}
    default = load_examples([Source(str(breakers))], 0)
    assert [texts(e) for e in default] == [texts(e) for e in rerouted]


def test_xstest_keeps_full_compliance_and_refusals_when_asked(folder):
    path = str(write_xstest(folder / "x.csv"))
    kept = load_examples([Source(path)], 0)
    assert [texts(e)[1] for e in kept] == ["so 0", "so 3"] and kept.skipped == {"x:retain": {"not full compliance": 4}}
    assert [texts(e)[1] for e in load_examples([Source(path, refusals=True)], 0)] == ["so 0", "so 1", "so 3", "so 4"]


TURNS = [{"role": role, "content": f"{role} {i}"} for i, role in enumerate(["user", "assistant"] * 2 + ["user"])]
TOLD = [{"from": "human" if turn["role"] == "user" else "gpt", "value": turn["content"]} for turn in TURNS]


@pytest.mark.parametrize("length", [1, 3, 5])
@pytest.mark.parametrize(("key", "turns"), [("messages", TURNS), ("conversations", TOLD)])
def test_a_last_turn_that_nothing_answers_is_refused(save, key, turns, length):
    path = save("chats.jsonl", [{key: turns[:4]}, {key: turns[:length]}])
    with pytest.raises(UserError, match=r"chats\.jsonl:2: .*the user's turn is the last"):
        load_examples([Source(str(path))], 0)
    assert check_sources([Source(str(path))], Limits()).problems.keys() == {"unanswered turn"}


def test_a_prompt_that_is_not_the_first_turn_is_refused(save):
    rows = [{"messages": TURNS[:2], "prompt": said} for said in ("user 0", " user 0\n", None, [TURNS[0]], "other")]
    path = save("chats.jsonl", rows)
    with pytest.raises(UserError, match=r"chats\.jsonl:5: `prompt` .*'other'.*'user 0'"):
        load_examples([Source(str(path))], 0)
    assert check_sources([Source(str(path))], Limits()).problems.keys() == {"other prompt", "duplicate"}


def test_rows_of_a_published_set_that_nobody_can_mend_are_left_out_counted_and_told(folder):
    import datasets

    (folder / "datasets").mkdir()
    chats = [TURNS[:2], TURNS[:4], TURNS, TURNS[:1]]
    rows = [{"messages": chat, "prompt": "user 0"} for chat in chats] + [{"messages": TURNS[:2], "prompt": "other"}]
    datasets.Dataset.from_list(rows).save_to_disk(folder / "datasets" / "ultrachat_200k")
    with pytest.warns(UserWarning, match="2 with unanswered turn, 1 with other prompt"):
        kept = load_examples([Source("ultrachat_200k")], 0)
    assert [len(e.messages) for e in kept] == [2, 4]
    report = check_sources([Source("ultrachat_200k")], Limits())
    assert report.skipped == {"ultrachat_200k:retain": {"unanswered turn": 2, "other prompt": 1}}


@pytest.mark.parametrize("key", ["system", "system_prompt"])
@pytest.mark.parametrize("row", [llava_row(0) | {"image": "a.png"}, {"messages": TURNS[:2]}, breaker_row(0)])
def test_an_operators_text_beside_the_turns_is_refused(save, key, row):
    path = save("chats.jsonl", [row | {key: ""}, row | {key: "You are X."}])
    picture().save(path.parent / "a.png")
    with pytest.raises(UserError, match=rf"chats\.jsonl:2: .*`{key}` is not read"):
        load_examples([Source(str(path))], 0)


def test_llava_opens_its_pictures_when_asked_and_not_before(save, pictures):
    rows = [llava_row(i) for i in range(3)]
    del rows[2]["image"]
    rows[2]["conversations"][0]["value"] = "no picture here"
    mixture = load_examples([Source(str(save("l.json", rows, array=True)), images=pictures)], 0)
    assert [e.modality for e in mixture] == ["multimodal", "multimodal", "text"]
    assert [part["type"] for part in mixture[1].messages[0]["content"]] == ["text", "image"]
    assert mixture[1].open_images()[0].tobytes() == picture(1).tobytes()
    (pictures / "000000000001.png").write_bytes(b"damaged later")
    with pytest.raises(UserError, match=r"l\.json:24: cannot read the picture `.*000000000001\.png` of example"):
        mixture[1].open_images()
    assert (pictures.parent / "l.json").read_text().split("\n")[23] == " {"


def test_a_text_that_speaks_of_the_placeholder_is_left_out(save):
    chat = [{"role": "user", "content": "what does <image> mean"}, {"role": "assistant", "content": "a tag"}]
    path = save("chats.jsonl", [{"messages": chat}, {"messages": [{**turn, "content": "so"} for turn in chat]}])
    mixture = load_examples([Source(str(path))], 0)
    assert len(mixture) == 1 and mixture.skipped["chats:retain"] == {"a text that holds <image>": 1}


@pytest.mark.parametrize("place", ["train2017/{}", "COCO_train2014_{}"])
def test_coco_pictures_are_found_in_either_layout(save, folder, place):
    file = folder / "coco" / place.format("000000000000.png")
    file.parent.mkdir(parents=True)
    picture().save(file)
    path = save("l.json", [llava_row(0)], array=True)
    assert load_examples([Source(str(path), images=folder / "coco")], 0)[0].images == [file]


@pytest.mark.parametrize("key", ["image", "images"])
@pytest.mark.parametrize(
    ("one", "other", "clash"),
    [
        ("vg/000000000000.png", "gqa/000000000000.png", True),
        ("000000000000.png", "gqa/000000000000.png", True),
        ("gqa/000000000000.png", "000000000000.png", True),
        ("gqa/000000000000.png", "gqa/./000000000000.png", False),
        ("gqa/000000000000.png", "gqa/000000000001.png", False),
        ("gqa/000000000000.png", "vg/000000000001.png", False),
    ],
)
def test_two_names_of_pictures_that_end_at_one_file_are_refused(save, pictures, key, one, other, clash):
    rows = []
    for number, name in enumerate((one, one, other)):
        row = llava_row(number)
        del row["image"]
        rows.append(row | {key: name if key == "image" else [name]})
    source = Source(str(save("l.jsonl", rows)), images=pictures)
    if not clash:
        assert len(load_examples([source], 0)) == 3
        return
    with pytest.raises(UserError, match=rf"l\.jsonl:3: .*'{one}' and '{other}', end at one file"):
        load_examples([source], 0)
    assert check_sources([source], Limits()).has_errors
    for name in (one, other):  # each at its own path
        (pictures / name).parent.mkdir(exist_ok=True)
        picture(2).save(pictures / name)
    assert len(load_examples([source], 0)) == 3


ADDRESSES = ["http://a.org/b.png", "HTTPS://a.org/b.png", "data:image/png;base64,AAAA" + "A/" * 400, "file:///b.png"]
WINDOWS = ["pictures\\a.png", "C:\\pictures\\a.png", "C:/pictures/a.png"]


@pytest.mark.parametrize(("name", "said"), [(n, "an address") for n in ADDRESSES] + [(n, "Windows") for n in WINDOWS])
@pytest.mark.parametrize("own", [True, False])
def test_a_name_that_is_no_path_is_said_to_be_none(save, pictures, name, said, own):
    row = own_row(0, images=[name]) if own else llava_row(0) | {"image": name}
    source = Source(str(save("l.jsonl", [row])), images=None if own else pictures)
    for rules in (Rules(), Rules(skip_missing_images=True)):
        with pytest.raises(UserError, match=rf"l\.jsonl:1: a picture must be the path of a file, .*{said}") as caught:
            load_examples([source], 0, rules)
        assert "skip_missing" not in str(caught.value) and len(str(caught.value)) < 400


def test_a_file_is_found_whatever_its_name(save):
    path = save("l.jsonl", [own_row(0, images=["a\\b.png"])])
    picture().save(path.parent / "a\\b.png")
    assert len(load_examples([Source(str(path))], 0)) == 1


def test_hub_data_sets_on_disk_keep_pictures_encoded(folder):
    import datasets

    picture(3).save(folder / "a.png")
    turn = {"role": "user", "content": "<image>what is it"}
    rows = {"messages": [[turn, {"role": "assistant", "content": "a square"}]], "images": [[str(folder / "a.png")]]}
    features = datasets.Features(
        {
            "messages": datasets.List({"role": datasets.Value("string"), "content": datasets.Value("string")}),
            "images": datasets.List(datasets.Image()),
        }
    )
    datasets.Dataset.from_dict(rows, features=features).save_to_disk(folder / "saved")
    (folder / "a.png").unlink()
    (example,) = load_examples([Source(str(folder / "saved"))], 0)
    assert example.modality == "multimodal" and example.open_images()[0].tobytes() == picture(3).tobytes()


def test_hub_text_without_labels_is_read_from_its_cache_folder(folder, monkeypatch):
    import datasets

    (folder / "datasets").mkdir()
    chat = [{"role": "user", "content": "hello"}, {"role": "assistant", "content": "you"}]
    datasets.Dataset.from_dict({"messages": [chat] * 3}).save_to_disk(folder / "datasets" / "ultrachat_200k")
    assert len(load_examples([Source("ultrachat_200k")], 0)) == 3
    assert load_examples([Source("ultrachat_200k")], 0)[2].id == "ultrachat_200k:retain-000002"


def test_weight_is_how_often_a_row_comes(breakers):
    def counts(weight, seed=0):
        return Counter(texts(e)[0] for e in load_examples([Source(str(breakers), weight=weight)], seed))

    assert set(counts(3.0).values()) == {3} and len(counts(3.0)) == 20
    assert sorted(counts(1.5).values()) == [1] * 10 + [2] * 10
    assert sorted(counts(0.25).values()) == [1] * 5
    assert counts(0.25) == counts(0.25) != counts(0.25, seed=1)


@pytest.mark.parametrize("weight", [1e-9, 0.01, 0.024, 0.026])
def test_a_source_of_small_weight_gives_at_least_one_row(breakers, folder, weight):
    sources = [Source(str(breakers), weight=weight), Source(str(write_xstest(folder / "x.csv")))]
    assert Counter(e.set for e in load_examples(sources, 0)) == {"circuit_breaker": 1, "retain": 2}


def test_a_limit_is_a_seeded_sample_in_file_order(breakers):
    def numbers(seed):
        return [int(texts(e)[0].split()[-1]) for e in load_examples([Source(str(breakers), limit=7)], seed)]

    assert len(numbers(0)) == 7 and numbers(0) == sorted(numbers(0)) == numbers(0) != numbers(1)
    assert len(load_examples([Source(str(breakers), limit=99)], 0)) == 20


def test_an_example_depends_on_its_place_alone(breakers, save, pictures):
    sources = [
        Source(str(breakers), weight=2.5, remove_request=0.5),
        Source(str(save("l.json", [llava_row(i) for i in range(3)], array=True)), images=pictures, remove_request=0.5),
    ]
    mixture = load_examples(sources, 4)
    forward = [(e.id, texts(e)) for e in mixture]
    copy = pickle.loads(pickle.dumps(load_examples(sources, 4)))  # as a data-loader worker gets it
    assert [(copy[i].id, texts(copy[i])) for i in reversed(range(len(copy)))] == forward[::-1]
    assert len(forward) == 53 and forward != [(e.id, texts(e)) for e in load_examples(sources, 5)]


def test_requests_are_removed_from_the_asked_share_and_differ_between_repetitions(breakers):
    examples = list(load_examples([Source(str(breakers), weight=50, remove_request=0.5)], 0))
    emptied = [example.messages[0]["content"] == "" for example in examples]
    assert abs(sum(emptied) / 1000 - 0.5) < 0.08  # 5 standard deviations
    assert 0 < sum(emptied[:20]) < 20 and emptied[:20] != emptied[20:40]
    assert all(example.id.endswith(":no-request") == gone for example, gone in zip(examples, emptied, strict=True))


def test_a_removed_request_leaves_the_picture_and_the_first_answer(save, pictures):
    (example,) = load_examples([Source(str(save("l.json", [llava_row(0)], array=True)), images=pictures)], 0)
    bare = without_request(example)
    assert bare.messages[0]["content"] == [{"type": "image"}, {"type": "text", "text": ""}]
    assert len(bare.messages) == 2 and bare.messages[1] == example.messages[1] and bare.images == example.images


def test_a_picture_shown_later_keeps_the_request(save, pictures):
    row = llava_row(0)
    for turn, value in zip(row["conversations"][::2], ["first", "<image> then"], strict=True):
        turn["value"] = value
    (example,) = load_examples([Source(str(save("l.json", [row], array=True)), images=pictures)], 0)
    assert without_request(example) == example


def test_kinds_are_those_of_the_examples_and_read_nothing(breakers, save, pictures):
    sources = [
        Source(str(breakers), weight=1.25, limit=9),
        Source(str(save("coco/own.jsonl", [own_row(0, images=["000000000000.png"]), own_row(1)])), weight=2),
    ]
    mixture = load_examples(sources, 3)
    expected = [(e.set, e.modality) for e in mixture]
    for file in mixture.inputs:
        file.unlink()
    assert list(mixture.kinds()) == expected and set(expected) >= {("retain", "multimodal"), ("retain", "text")}


def test_recipes_can_list_sources_with_their_fields():
    from pydantic import TypeAdapter, ValidationError

    parse = TypeAdapter(list[str | Source]).validate_python
    fields = {"name": "xstest", "weight": 50, "images": "coco"}
    assert parse(["a.jsonl", fields]) == ["a.jsonl", Source("xstest", 50.0, images=Path("coco"))]
    with pytest.raises(ValidationError, match="wieght"):
        parse([{"name": "xstest", "wieght": 50}])
    with pytest.raises(UserError, match="`weight`"):
        parse([{"name": "xstest", "weight": -1}])


def test_a_removed_request_trains_through_the_chat_template(save, pictures):
    from mm_cb.training.masks import loss_mask
    from tests.tiny_llava import tiny_llava

    (example,) = load_examples([Source(str(save("l.json", [llava_row(0)], array=True)), images=pictures)], 0)
    bare = without_request(example)
    inputs = tiny_llava().encode_chats([bare.messages], [bare.open_images()], padding_side="right")
    assert loss_mask(inputs, "after_image").sum() > 0


def test_own_files_say_their_set_and_a_source_can_choose_one(save, pictures):
    path = save("coco/own.jsonl", [own_row(0, "retain", ["000000000000.png"]), own_row(1, "circuit_breaker")])
    both = load_examples([Source(str(path))], 0)
    assert [(e.id, e.set, e.modality) for e in both] == [
        ("own-0", "retain", "multimodal"),
        ("own-1", "circuit_breaker", "text"),
    ]
    assert [e.id for e in load_examples([Source(str(path), set="retain")], 0)] == ["own-0"]


def test_files_of_one_name_in_two_folders_are_two_sources(save):
    paths = [save(f"{name}/train.jsonl", [own_row(i)]) for i, name in enumerate("ab")]
    assert list(load_examples([Source(str(p)) for p in paths], 0).skipped) == ["train", "train#2"]


def test_a_missing_picture_is_named_or_left_out_and_counted(save, pictures):
    source = Source(str(save("l.json", [llava_row(i) for i in range(5)], array=True)), images=pictures)
    with pytest.raises(UserError, match=r"l\.json:\d+: the picture `.*000000000003\.png` is not there.*skip_missing"):
        load_examples([source], 0)
    with pytest.warns(UserWarning, match="2 with missing image"):
        mixture = load_examples([source], 0, Rules(skip_missing_images=True))
    assert len(mixture) == 3 and mixture.skipped["l:retain"] == {"missing image": 2}


@pytest.mark.parametrize("column", ["image", "images"])
def test_several_pictures_of_a_row_are_read_in_order(save, pictures, column):
    names = [f"{number:012}.png" for number in (2, 0)]
    turns = [("human", "<image> and <image> differ?"), ("gpt", "no"), ("human", "and <image>?"), ("gpt", "yes")]
    chat = [{"from": role, "value": text} for role, text in turns]
    rows = [{column: [*names, names[1]], "conversations": chat}, {column: names[:1], "conversations": chat[:2]}]
    with pytest.raises(UserError, match=":2: the turns name 2 pictures, the row has 1"):
        load_examples([Source(str(save("a.jsonl", rows)), images=pictures)], 0)
    (example,) = load_examples([Source(str(save("a.jsonl", rows[:1])), images=pictures)], 0)
    assert [image.name for image in example.images] == [*names, names[1]]
    assert [[part["type"] for part in turn["content"]] for turn in example.messages[::2]] == [
        ["image", "text", "image", "text"],
        ["text", "image", "text"],
    ]


def test_bytes_are_named_by_their_number_and_never_printed(folder, capsys):
    import datasets

    content = b"\x89PNG\r\n" + b"secret" * 50
    chat = [{"from": "human", "value": "<image> what"}, {"from": "gpt", "value": "a"}]
    for name, image in (("one", content), ("list", [content])):
        datasets.Dataset.from_list([{"image": image, "conversations": chat}]).save_to_disk(folder / name)
        with pytest.raises(UserError, match="damaged|no picture|not a picture|306") as error:
            load_examples([Source(str(folder / name))], 0)[0].open_images()
        assert "secret" not in str(error.value)


def test_labels_are_read_without_case_and_unknown_ones_refused(folder):
    table = folder / "x.csv"
    table.write_text("ID,Prompt,Final_Label,completion\n1,a,1_FULL_compliance ,so\n2,b,3_partial_refusal,so\n")
    with pytest.raises(UserError, match="columns"):
        load_examples([Source(str(table))], 0)
    table.write_text(table.read_text().replace("Prompt", "prompt").replace("Final_Label", "final_label"))
    assert len(load_examples([Source(str(table))], 0)) == 1
    table.write_text(table.read_text().replace("3_partial_refusal", "partial"))
    with pytest.raises(UserError, match=r"x\.csv:3: `final_label` must be one of .*got 'partial'"):
        load_examples([Source(str(table))], 0)


@pytest.mark.parametrize(
    ("content", "match"),
    [
        ("prompt,output\nTell me, please,sure\n", "x.csv:2: the header has 2 columns, the row 3"),
        ("prompt,output\nTell me\n", "x.csv:2: the header has 2 columns, the row 1"),
        ('prompt,output\na,"b\nc,d\n', "x.csv:2: a double quote is never closed"),
    ],
)
def test_a_training_table_is_read_strictly(folder, content, match):
    (folder / "x.csv").write_text(content)
    with pytest.raises(UserError, match=match):
        load_examples([Source(str(folder / "x.csv"))], 0)


def chat_of(content):
    return [{"role": "user", "content": content}, {"role": "assistant", "content": "a"}]


@pytest.mark.parametrize(
    ("rows", "match"),
    [
        (["{broken"], r"a\.jsonl:1: expected a JSON object, got broken"),
        ([breaker_row(0), "{broken"], r"a\.jsonl:2: expected a JSON object, got broken"),
        ([breaker_row(0), {"prompt": "p"}], ":2: the row lacks `output`"),
        ([breaker_row(0), breaker_row(0) | {"output": 3}], ":2: a text was expected, got int"),
        ([{"question": "q"}], r"must have the columns of one of these formats .*it has \['question'\]"),
        ([{"messages": [{"role": "assistant", "content": "a"}] * 2}], ":1: the roles must alternate"),
        ([{"messages": "text"}], ":1: `messages` must be a list of turns, got 'text'"),
        ([{"messages": ["text"]}], ":1: turn 1 of `messages` must be an object with `role` and `content`, got 'text'"),
        ([{"messages": [{"role": "user"}]}], ":1: turn 1 of `messages` must be an object with `role` and `content`"),
        ([{"messages": chat_of(None)}], ":1: the content of a turn must be a text or a list of parts, got None"),
        ([{"messages": chat_of([{"type": "video"}])}], ":1: a part of a turn must hold `text`, .*'video'"),
        ([{"messages": chat_of([{"type": "text", "text": None}])}], ":1: a text was expected, got NoneType"),
        ([{"conversations": [{"from": "human"}]}], ":1: turn 1 of `conversations` must be an object with `from` and"),
        ([own_row(0), own_row(0)], r":2: the id `own-0` was used at .*a\.jsonl:1"),
        ([llava_row(0) | {"image": "../../etc/passwd"}], ":1: picture names must be relative"),
        ([llava_row(0) | {"image": "a\ud83d.png"}], ":1: .*half of a surrogate pair"),
        ([breaker_row(0), breaker_row(1) | {"prompt": "what \ud83d"}], ":2: .*half of a surrogate pair"),
        ([breaker_row(0), breaker_row(1) | {"output": "\0"}], ":2: .*NUL"),
        (['{"prompt": "a", "output": "b", "prompt": "c"}'], ":1: .*the key `prompt` twice"),
        (
            [{"id": "a", "messages": own_row(0)["messages"], "set": "circuit_breaker"}],
            r":1: .*must have the columns .*lacks \['images'\]",
        ),
        ([own_row(0), own_row(0, "circuit_breaker") | {"id": "x"}], ":2: the same as .*a\\.jsonl:1.*retain set"),
        ([llava_row(0) | {"image": None}], ":1: the turns name 1 pictures, the row has 0"),
        ([{"messages": []}], "holds no example .1 fewer than two turns"),
    ],
)
def test_broken_rows_name_file_and_line(save, rows, match):
    with pytest.raises(UserError, match=match):
        load_examples([Source(str(save("a.jsonl", rows)))], 0)


def test_what_is_not_there_says_how_to_get_it(folder):
    with pytest.raises(UserError, match=r"`circuit-breakers-train` is not here: download data/circuit_breakers_train"):
        load_examples([Source("circuit-breakers-train")], 0)
    with pytest.raises(UserError, match="unknown data set `xstst`, did you mean `xstest`"):
        load_examples([Source("xstst")], 0)
    with pytest.raises(UserError, match=r"data file `my/rows\.jsonl` is not there"):
        load_examples([Source("my/rows.jsonl")], 0)
    with pytest.raises(UserError, match="the data set `nobody/nothing` is not .*`hf download nobody/nothing "):
        load_examples([Source("hub:nobody/nothing")], 0)


def test_a_data_set_is_found_in_the_data_home(save, monkeypatch, folder):
    save("home/xstest/ignored.txt", ["x"])
    write_xstest(folder / "home" / "xstest" / card("xstest").files[0])
    monkeypatch.setenv("MM_CB_DATA", str(folder / "home"))
    assert load_examples([Source("xstest")], 0)[0].id == "xstest:retain-000000"


@pytest.mark.parametrize(
    ("fields", "match"),
    [
        ({"weight": 0}, "`weight`"),
        ({"limit": 0}, "`limit`"),
        ({"set": "harmful"}, "`set`"),
        ({"remove_request": 2}, "`remove_request`"),
        ({"name": ""}, "`name`"),
    ],
)
def test_a_source_out_of_range(fields, match):
    with pytest.raises(UserError, match=match):
        Source(**{"name": "xstest"} | fields)


def test_one_source_twice_and_no_source(breakers):
    with pytest.raises(UserError, match="named twice"):
        load_examples([Source(str(breakers)), Source(str(breakers))], 0)
    with pytest.raises(UserError, match="at least one"):
        load_examples([], 0)


def test_a_run_over_a_repeated_source_reads_a_row_only_when_its_turn_comes(breakers, monkeypatch, folder):
    weighted = [
        Source(str(breakers)),
        Source(str(write_xstest(folder / "xstest.csv")), weight=50),
        Source(str(breakers), set="retain", weight=1.5),
    ]
    mixture = load_examples(weighted, 0)
    assert len(mixture) == 20 + 50 * 2 + 30
    in_order = [(example.set, example.modality) for example in (mixture[i] for i in range(len(mixture)))]
    assert kinds_of(mixture) == in_order

    read = []
    real = OpenSource.read
    monkeypatch.setattr(OpenSource, "read", lambda self, row: read.append((self.key, row)) or real(self, row))
    others, held_out = hold_out(mixture, 2, 0, "text")
    assert len(read) == 2 * len(held_out) == 4  # those set aside, nothing else
    aside = {(e.source, *texts(e)) for pair in held_out for e in pair}
    run = PairedExamples(mixture, steps=65, batch_size=2, batches="text", seed=0, among=others)
    assert len(read) == 4
    pairs = [run[i] for i in range(len(run))]
    assert len(read) == 4 + 2 * len(pairs)
    assert aside.isdisjoint((e.source, *texts(e)) for pair in pairs for e in pair)


@pytest.mark.parametrize("remove_request", [0.0, 0.5])
def test_no_copy_of_a_held_out_row_is_trained_on(breakers, save, remove_request):
    """A row that a mixture repeats, with its request or without, is on one side only."""
    retain = save("retain.json", [{**breaker_row(i), "llama3_output": f"no {i}"} for i in range(8)], array=True)
    mixture = load_examples(
        [
            Source(str(breakers), weight=2, remove_request=remove_request),
            Source(str(retain), set="retain", weight=2.5, remove_request=remove_request),
        ],
        0,
    )
    others, held_out = hold_out(mixture, 4, 0, "text")
    answers = {texts(example)[1] for pair in held_out for example in pair}
    trained = [texts(mixture[i])[1] for i in others]
    assert len(answers) == 8 and answers.isdisjoint(trained)
    counts = Counter(Counter(trained).values())
    assert sum(counts.values()) == 16 + 4 and counts[2] >= 16 and counts.keys() <= {2, 3}  # and no other row is lost


def test_a_row_that_its_set_holds_already_is_said(save):
    own = [own_row(0), own_row(1), own_row(1) | {"id": "again"}]
    with pytest.warns(UserWarning, match=r"^1 rows say what an earlier row .*own\.jsonl:3, the same as .*own\.jsonl:2"):
        assert len(load_examples([Source(str(save("own.jsonl", own)))], 0)) == 3


REFUSALS = ["I'm sorry, I can't help with that.", "I cannot help with this.", "**Sorry**, no.", "I can’t tell you."]


@pytest.mark.parametrize("many", [3, 4])
def test_circuit_breaker_answers_that_are_mostly_refusals_are_refused(save, many):
    """They would be rerouted: the breaker would unlearn to refuse. Swapped columns look like this."""
    answers = REFUSALS[:many] + ["so and so"] * (4 - many)
    rows = [breaker_row(i) | {"output": answer, "llama3_output": "so"} for i, answer in enumerate(answers)]
    source = Source(str(save("cb.json", rows, array=True)))
    said = rf"cb\.json:2: the answers of {many} of 4 circuit-breaker rows are refusals .*`output`"
    with pytest.raises(UserError, match=said):
        load_examples([source], 0)
    report = check_sources([source], Limits())
    assert report.has_errors and re.search(said, report.problems["refusals"].first[0])
    assert len(load_examples([replace(source, set="retain")], 0)) == 4  # where refusals belong


@pytest.mark.parametrize("begins", ["As an old hand", "I would advise you to", "I'm an expert,", "As an aide"])
def test_answers_that_comply_are_no_refusals_whatever_a_proxy_says(begins, save):
    rows = [breaker_row(i) | {"output": f"{begins} so and so {i}"} for i in range(4)]
    assert len(load_examples([Source(str(save("cb.json", rows, array=True)))], 0)) == 4


def test_a_few_refusals_among_circuit_breaker_answers_are_named(save):
    def answered(number, answer, **fields):
        content = [{"role": "user", "content": f"q {number}"}, {"role": "assistant", "content": answer}]
        return own_row(number, "circuit_breaker") | {"messages": content} | fields

    rows = [answered(0, "so"), answered(1, "it is so"), answered(2, "so, I'm sorry to say"), answered(3, REFUSALS[0])]
    rows += [answered(n, REFUSALS[0], set="retain") for n in range(4, 9)]
    rows[1]["messages"] = [*answered(1, REFUSALS[1])["messages"], *answered(11, "it is so")["messages"]]
    source = Source(str(save("own.jsonl", rows)))
    said = r"own\.jsonl:4: the answers of 1 of 4 circuit-breaker rows are refusals"
    with pytest.warns(UserWarning, match=said):
        assert len(load_examples([source], 0)) == 9
    report = check_sources([source], Limits())
    assert not report.has_errors and re.search(said, report.problems["some refusals"].first[0])
    with pytest.warns(UserWarning, match=r"rows\[3\]: the answers of 1 of 4"):
        as_examples(rows)
    with pytest.raises(ValueError, match=r"rows\[0\]: the answers of 1 of 1"):
        as_examples(rows[3:])


def test_the_miniatures_circuit_breaker_answers_hold_no_refusal():
    for guest in guests():
        counted = Refusals()
        for example in guest.training_examples(0):
            counted.count(example)
        assert counted.fault() is None and counted.warning() is None
