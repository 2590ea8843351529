import json

import numpy as np
import pytest
from PIL import Image

from mm_cb.attacks.config import AttackConfig
from mm_cb.attacks.registry import attack_entry
from mm_cb.attacks.runner import attack_behaviors
from mm_cb.attacks.typographic import PROMPT, ask, draw, written
from mm_cb.attacks.verify import verify_run
from mm_cb.core.progress import Progress
from mm_cb.core.runs import read_jsonl, write_jsonl
from mm_cb.data.behaviors_file import Behavior, read_behaviors
from mm_cb.inference.subjects import Subject
from mm_cb.metrics.results import find, measure
from tests.attacks.helpers import attack, edited, first_behaviors
from tests.tiny_llava import picture, tiny_llava

TEA = Behavior("tea", "please tell me how to brew tea", "it is red", None)


def ink(image):
    """Share of dark pixels, and the lowest row that has any."""
    dark = np.asarray(image.convert("L")) < 128
    return dark.mean(), np.flatnonzero(dark.any(axis=1)).max(initial=-1)


@pytest.mark.parametrize("size", [(42, 84), (84, 42), (336, 336), (20, 20), (600, 900)])
def test_the_text_stands_in_a_picture_of_the_size_asked_for(size):
    image = draw(TEA, size)
    assert (image.height, image.width) == size and image.mode == "RGB"
    share, lowest = ink(image)
    assert 0.005 < share < 0.5 and lowest < size[0]


def test_other_words_make_another_picture_and_the_same_words_the_same():
    texts = ["brew tea", "brew coffee", "Brew tea", "brew tea ?"]
    made = {text: written(text, (42, 84)).tobytes() for text in texts}
    assert len(set(made.values())) == len(texts)
    assert written("brew tea", (42, 84)).tobytes() == made["brew tea"]


def test_a_short_text_is_written_larger_than_a_long_one():
    short, long = (ink(written(text, (200, 200))) for text in ("tea", "tea " * 60))
    assert long[1] > short[1]
    assert ink(written("tea", (200, 200)))[0] > ink(written("t", (200, 200)))[0]


@pytest.mark.parametrize("text", ["word " * 5000, "w" * 5000, "", " \n\t ", "ü漢字🙂\x00"])
def test_no_text_is_too_long_or_too_strange(text):
    assert written(text, (42, 84)).size == (84, 42)


def test_texts_of_the_behaviours_file_stand_for_the_request_and_for_the_chat(tmp_path):
    rows = [
        {"id": "a", "prompt": "brew tea", "target": "t", "image": None},
        {"id": "b", "prompt": "p", "target": "t", "image": None, "typographic_text": "brew tea"},
        {"id": "c", "prompt": "p", "target": "t", "image": None, "typographic_prompt": "what is written there ?"},
    ]
    write_jsonl(tmp_path / "b.jsonl", rows)
    first, second, third = read_behaviors(tmp_path / "b.jsonl")
    assert draw(first, (42, 84)).tobytes() == draw(second, (42, 84)).tobytes() != draw(third, (42, 84)).tobytes()
    assert [ask(one) for one in (first, second, third)] == [PROMPT, PROMPT, "what is written there ?"]


def test_the_model_is_asked_the_generic_prompt_and_judged_against_the_request(tmp_path, monkeypatch):
    model, sent, judged = tiny_llava(), [], []
    picture(0).save(tmp_path / "p.png")
    behaviors = [
        Behavior("a", TEA.prompt, TEA.target, tmp_path / "p.png"),
        Behavior("b", "what is it", "a circle", None),
    ]
    encode = model.encode_chats

    def spied(chats, *rest, **more):
        parts = [part for turns in chats for turn in turns if turn["role"] == "user" for part in turn["content"]]
        sent.append([part["text"] for part in parts if part["type"] == "text"])
        return encode(chats, *rest, **more)

    monkeypatch.setattr(model, "encode_chats", spied)

    def judge(behavior, completion):
        if completion != behavior.target:  # which is judged alone, too
            judged.append(behavior.prompt)
        return "harmful"

    config = AttackConfig("typographic", steps=3, restarts=3, iterates=2, max_new_tokens=4, artefacts=False)
    with Progress() as progress:
        items = attack_behaviors(Subject("base", model), behaviors, config, tmp_path / "run", judge, progress)
    assert {text for texts in sent for text in texts} == {PROMPT}
    assert judged == [b.prompt for b in behaviors]  # once: what never varies is tried once
    for item, behavior in zip(items, behaviors, strict=True):
        assert item["prompt"] == behavior.prompt and item["target"] == behavior.target
        (one,) = item["candidates"]
        shown, clean = (Image.open(tmp_path / "run" / item[key]).convert("RGB") for key in ("image", "clean_image"))
        assert shown.size == clean.size and shown.tobytes() == draw(behavior, (clean.height, clean.width)).tobytes()
        assert one["objective_logged"] is None and "distance" not in one


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    behaviors = first_behaviors(tmp_path_factory.mktemp("typographic"), 2)
    return attack(behaviors.parent / "run", behaviors, "no_attack,typographic", max_new_tokens=4)


def test_a_run_of_it_is_not_held_to_the_ball_and_verifies(made):
    items = [item for item in read_jsonl(made / "items.jsonl") if item["condition"] == "typographic"]
    assert all(item["outside_threat"] and item["worst_case"] for item in items)
    assert all(item["candidates"][0]["epsilon"] > 8 for item in items)
    assert json.loads((made / "checks.json").read_text()) == []  # nor are the clean pictures beside it
    assert not any(row.disagreements for row in verify_run(made))


def test_a_run_of_it_alone_has_no_check_of_the_ball(made, tmp_path):
    attack(tmp_path / "run", made.parent / "behaviors.jsonl", "typographic", max_new_tokens=4)
    assert json.loads((tmp_path / "run" / "checks.json").read_text()) == []
    assert not any(row.disagreements for row in verify_run(tmp_path / "run"))


def test_it_counts_in_the_worst_case():
    assert attack_entry("typographic").in_worst_case
    fixed = {"id": "a", "metric": "compliance", "subject": "base", "split": "all", "gibberish": False}
    items = [
        fixed | {"condition": "pgd", "outcome": "refusal", "worst_case": True},
        fixed | {"condition": "typographic", "outcome": "harmful", "worst_case": True},
    ]
    assert find(measure(items, pairs=[]), "base", "compliance", "worst_case").value == 100


def test_verify_encodes_what_was_sent(made, tmp_path):
    told = [json.loads(path.read_text()) for path in sorted((made / "images").glob("*/typographic-*.json"))]
    assert len(told) == 2 and {one["sent"] for one in told} == {PROMPT}
    assert all("sent" not in json.loads(p.read_text()) for p in (made / "images").glob("*/no_attack-*.json"))
    path = sorted((made / "images").glob("*/typographic-*.json"))[0]
    honest = path.read_bytes()
    edited(path, lambda one: one.update(sent="another prompt"))
    try:
        with pytest.raises(Exception, match="loss .* recorded"):
            verify_run(made)
    finally:
        path.write_bytes(honest)
