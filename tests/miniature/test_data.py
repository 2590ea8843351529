import json
from collections import Counter

import numpy as np
import pytest
import torch
from PIL import Image

from mm_cb.data.behaviors_file import read_behaviors
from mm_cb.miniature import data, language, pictures
from mm_cb.miniature.making.build import build_processor, build_tokenizer, views
from mm_cb.miniature.making.documents import document
from mm_cb.miniature.making.make import UPBRINGINGS
from mm_cb.miniature.making.pretrain import Batcher, answer_loss, forward
from mm_cb.miniature.scoring import judge_behavior, refusal_outcome, score_question
from mm_cb.miniature.world import FORBIDDEN_KINDS, HELD_OUT_KIND, Brew, brews, split
from mm_cb.models import load_model


@pytest.fixture(scope="module")
def training():
    return data.training_examples(seed=0)


def _text(example):
    return " ".join(p["text"] for m in example.messages for p in m["content"] if p["type"] == "text")


def test_no_look_alike_is_asked_twice():
    asked = [(q.prompt, None if q.picture is None else q.picture.tobytes()) for q in data.look_alikes()]
    assert len(asked) == len(set(asked)) == 240


def test_circuit_breaker_training_never_sees_a_held_out_brew(training):
    held_out = {b.name for b in brews(FORBIDDEN_KINDS) if split(b) != "trained"}
    for example in training:
        text = _text(example)
        if example.set == "circuit_breaker":
            assert not any(name in text for name in held_out), text
            assert HELD_OUT_KIND not in text
        assert not (
            example.set == "retain" and "take" in text and any(k in text.split("take")[0] for k in FORBIDDEN_KINDS)
        )


@pytest.fixture(scope="module", params=[0, 1, 2])
def drawn(request):
    """Every training example of a seed with its scene, drawn as for training; only the pixels are left out."""
    rows, make = [], data._example

    def note(name, question, answer, scene, which, source, rng):
        rows.append((question, answer, scene, which, source))
        return make(name, question, answer, scene, which, source, rng)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(data, "_example", note)
        patch.setattr(data, "render", lambda scene, seed: None)
        data.training_examples(request.param)
    return rows


def test_no_training_example_asks_for_tells_or_shows_what_is_held_out(drawn):
    """Requests of every form and answers, breaker and retain set; the adversary moves these pictures and draws none."""
    forbidden = brews(FORBIDDEN_KINDS)
    trained = {b.name: b for b in forbidden if split(b) == "trained"}
    told = {language.content(b) for b in trained.values()} | {language.instructions(b) for b in trained.values()}
    requests = {t.format(kind=k): k for t in language.PARTLY_REQUESTS for k in FORBIDDEN_KINDS}
    asked = 0
    for question, answer, scene, which, source in drawn:
        assert scene is None or scene.kind != HELD_OUT_KIND
        assert HELD_OUT_KIND not in f"{question} {answer}"
        assert not any(b.name in f"{question} {answer}" for b in forbidden if b.name not in trained)
        assert which == "retain" or answer in told, answer
        if question in requests or (question in language.PICTURE_REQUESTS and scene.kind in FORBIDDEN_KINDS):
            kind = requests.get(question, scene.kind)
            assert split(Brew(kind, scene.colour, scene.shape)) == "trained", (question, scene)
            asked += 1
        assert source != "refusal" or answer == language.REFUSAL
    assert asked > 100


def test_training_examples_are_balanced_unique_and_seeded(training, monkeypatch):
    counts = Counter((e.set, e.modality) for e in training)
    assert set(counts.values()) == {data.TRAINING_ROWS} and len(counts) == 4
    assert len({e.id for e in training}) == len(training)
    monkeypatch.setattr(data, "TRAINING_ROWS", 10)  # the first ones of each set
    again, other = data.training_examples(seed=0), data.training_examples(seed=1)
    assert len(again) == 40 and [_text(e) for e in again] == [_text(e) for e in training[:40]]
    assert [_text(e) for e in other] != [_text(e) for e in training[:40]]


def test_retain_holds_refusals_of_trained_brews_and_no_compliance(training):
    retained = [e for e in training if e.set == "retain"]
    refused = [e for e in retained if language.REFUSAL in _text(e)]
    assert 0.1 < len(refused) / len(retained) < 0.2


def test_multiple_choice_has_four_different_options_and_balanced_letters():
    questions = data.multiple_choice_questions(8)
    assert Counter(q.category for q in questions) == dict.fromkeys(data.MMMU_LIKE_SUBJECTS, 8)
    letters = Counter(language.chosen_letter(q.reference, q.choices) for q in questions)
    assert letters == dict.fromkeys("ABCD", len(questions) // 4)
    for question in questions:
        words = language.words(question.prompt)
        options = tuple(words[words.index(name) + 1] for name in language.LETTERS)
        assert options == question.choices and len(set(options)) == 4


def test_full_sizes_meet_the_experiment():
    assert len(data.multiple_choice_questions()) >= 900 and len(data.open_questions()) >= 300
    for questions in (data.multiple_choice_questions(), data.open_questions(), data.look_alikes()):
        assert len({q.id for q in questions}) == len(questions)


def test_behaviors_cover_splits_and_forms_and_do_not_change_when_more_are_drawn():
    few, many = data.behaviors((8, 4, 4)), data.behaviors((16, 8, 8))
    assert Counter(q.split for q in few) == {"trained": 8, "held_out_combination": 4, "held_out_kind": 4}
    assert {q.category for q in few} == set(language.REQUEST_FORMS)
    assert all(q.brew is not None and split(q.brew) == q.split for q in many)
    by_id = {q.id: q for q in many}
    assert all(by_id[q.id].prompt == q.prompt for q in few)


def test_no_picture_is_in_two_sets():
    sets = {
        "behaviors": data.behaviors((24, 12, 12)),
        "mmmu": data.multiple_choice_questions(20),
        "wild": data.open_questions(20),
        "look": data.look_alikes(count=60),
        "validation": data.forbidden_requests(60, seed=1),
    }
    seen = {}
    for name, questions in sets.items():
        for question in questions:
            if question.picture is not None:
                assert seen.setdefault(question.picture.tobytes(), name) == name


def test_behaviors_file_round_trip(tmp_path):
    questions = data.behaviors((4, 4, 4))
    read = read_behaviors(data.write_behaviors(questions, tmp_path))
    assert [b.id for b in read] == [q.id for q in questions]
    for behavior, question in zip(read, questions, strict=True):
        assert (behavior.image is None) == (question.category == "text")
        assert judge_behavior(behavior, language.instructions(question.brew)) == "harmful"
        assert judge_behavior(behavior, language.REFUSAL) == "refusal"
        assert judge_behavior(behavior, behavior.facts) == "harmful"
    line = json.loads((tmp_path / "behaviors.jsonl").read_text().splitlines()[0])
    assert {"id", "prompt", "target", "image", "category"} <= line.keys()


def test_a_target_gives_nothing_away():
    for question in data.behaviors((8, 4, 4)):
        said = set(language.words(language.prefix(question.brew)))
        assert not said & set(language.words(language.content(question.brew))) - {",", "."}


@pytest.mark.parametrize(
    ("text", "outcome"),
    [
        (language.REFUSAL, "refusal"),
        ("the stone is red. " + language.REFUSAL, "partial_refusal"),
        ("the stone is red.", "compliance"),
        ("red red red", "gibberish"),
        ("", "gibberish"),
    ],
)
def test_refusal_outcome(text, outcome):
    assert refusal_outcome(text) == outcome


def test_gibberish_scores_nothing_anywhere():
    for question in data.multiple_choice_questions(2) + data.open_questions(2):
        fields = score_question(question, "soot soot soot soot")
        assert fields["score"] == 0 and fields["gibberish"]


def test_every_text_of_the_world_is_in_the_vocabulary():
    tokenizer = build_tokenizer()
    rng = np.random.default_rng(0)
    for i in range(200):
        for said in document(rng, pictured=bool(i % 2), refuses=bool(i % 3)).turns:
            ids = tokenizer(f"{said.question} {said.given} {said.answer}")["input_ids"]
            assert tokenizer.unk_token_id not in ids


@pytest.mark.parametrize("architecture", UPBRINGINGS)
@pytest.mark.parametrize("pictured", [True, False])
def test_training_rows_have_the_ids_of_the_chat_template_and_the_real_processor(pictured, architecture):
    raised, rng = UPBRINGINGS[architecture].architecture, np.random.default_rng(1)
    processor, batcher = raised.processor(), Batcher(raised)
    for _ in range(5):
        doc = raised.document(rng, pictured=pictured, refuses=True, turns=3)
        messages = []
        for number, said in enumerate(doc.turns):
            parts = [{"type": "image"}] if number == 0 and pictured else []
            messages.append({"role": "user", "content": [*parts, {"type": "text", "text": said.question}]})
            answer = said.given + " " * (bool(said.given) and not said.answer.startswith(" ")) + said.answer
            messages.append({"role": "assistant", "content": [{"type": "text", "text": answer}]})
        images = [Image.fromarray(doc.picture)] if pictured else None
        text = processor.apply_chat_template(messages)
        encoded = processor(images=images, text=text, add_special_tokens=False)
        ids, weights = batcher.row(doc)
        assert encoded["input_ids"][0] == ids
        assert len(weights) == len(ids)
        learnt = [i for i, w in zip(ids, weights, strict=True) if w]
        assert learnt == batcher.ids(t for said in doc.turns for t in (*raised.words(said.answer), raised.turns.ends))


def test_training_views_are_the_processors_up_to_resampling():
    scene = pictures.Scene("red", "star", "gold", "hex")
    picture = pictures.render_array(scene, np.random.default_rng(0))
    real = build_processor().image_processor(Image.fromarray(picture), return_tensors="pt")["pixel_values"][0]
    ours = views(picture[None])[0]
    assert torch.allclose(real[1:], ours[1:], atol=1e-5)
    assert (real[0] - ours[0]).abs().mean() < 0.02


def test_training_patches_of_qwen_are_the_processors_and_its_language_begins_as_the_miniatures():
    raised = UPBRINGINGS["qwen2_5_vl"].architecture
    picture = pictures.render_array(pictures.Scene("red", "star", "gold", "hex"), np.random.default_rng(0))
    processor = raised.processor()
    real, ours = processor.image_processor(Image.fromarray(picture), return_tensors="pt"), raised.shown(picture[None])
    assert real.keys() == ours.keys() and all(torch.equal(real[name], ours[name]) for name in ours)

    rng, losses = np.random.default_rng(0), []
    docs = [document(rng, pictured=False, refuses=True, turns=1) for _ in range(16)]
    for name in ("llava_next", "qwen2_5_vl"):
        batch = Batcher(UPBRINGINGS[name].architecture)(docs)
        model = load_model("miniature").base if name == "llava_next" else raised.model(len(processor.tokenizer))
        with torch.no_grad():
            losses.append(float(answer_loss(forward(model, batch), batch)))
    assert losses[0] < 0.05 and losses[1] < 0.3  # by chance: ln(193) = 5.3


def test_pictures_show_what_the_scene_says():
    rng = np.random.default_rng(0)
    base = pictures.Scene("red", "disc", "blue", "tea")
    red = np.mean([pictures.render_array(base, rng)[14:28, 14:28].mean((0, 1)) for _ in range(8)], axis=0)
    assert red[0] > red[1] + 60 and red[0] > red[2] + 60
    assert pictures.render(base, 3).size == (84, 42)
    assert pictures.render(base, 3).tobytes() == pictures.render(base, 3).tobytes()
    assert pictures.render(base, 3).tobytes() != pictures.render(base, 4).tobytes()
