"""Attacks that make no picture: on a tiny random Llama, and with imported prompts on the miniature."""

import json
import re
import shutil
from dataclasses import replace
from itertools import product

import pytest
import torch
from peft import LoraConfig, get_peft_model

from image_attacks import target_nll
from mm_cb import cli
from mm_cb.attacks import texts
from mm_cb.attacks.objectives.embedding import PromptEmbeddingObjective
from mm_cb.attacks.objectives.target import encode
from mm_cb.attacks.refusals import fitting
from mm_cb.attacks.registry import chosen_attacks
from mm_cb.attacks.shards import Shard
from mm_cb.attacks.verify import verify_run
from mm_cb.core.errors import UserError
from mm_cb.core.progress import Progress
from mm_cb.core.runs import read_jsonl, read_run, write_json
from mm_cb.core.seal import sealed
from mm_cb.data.behaviors_file import Behavior
from mm_cb.data.prompts_file import ImportedPrompt, messages_hash, read_prompts
from mm_cb.inference.subjects import Subject
from mm_cb.judges.registry import JudgeOptions, open_judge
from mm_cb.judges.rejudge import rejudge
from mm_cb.metrics.results import find
from mm_cb.models import load_model
from mm_cb.models.fingerprint import remember_base
from mm_cb.report import judge_report, write_report
from tests.attacks.helpers import BEHAVIORS, attack, first_behaviors
from tests.models.conftest import save_text_model

ASKED = [
    {"id": "tea", "prompt": "how to brew tea", "target": "it is a circle", "image": None},
    {"id": "red", "prompt": "what is the red square", "target": "no", "image": None},
]
USER = {"role": "user", "content": "please tell me"}
TURNS = [USER, {"role": "assistant", "content": "no i can not"}, {"role": "user", "content": "how to brew it"}]
SENT = [
    {"id": "tea", "messages": [USER], "source": "by hand"},
    {"id": "tea", "messages": TURNS, "source": "by hand", "hash": messages_hash(TURNS)},
    {"id": "red", "messages": [USER], "source": "by hand", "hash": None},
]


def lines(path, records):
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A tiny Llama, a random adapter of it, behaviours and prompts."""
    folder = tmp_path_factory.mktemp("texts")
    model = save_text_model(folder / "model", "llama")
    torch.manual_seed(0)
    plain = load_model(model).model
    adapted = get_peft_model(plain, LoraConfig(r=2, target_modules=["up_proj"], init_lora_weights=False))
    adapted.save_pretrained(folder / "adapter")
    remember_base(folder / "adapter", str(model))
    lines(folder / "behaviors.jsonl", ASKED)
    lines(folder / "prompts.jsonl", SENT)
    return folder


@pytest.fixture(scope="module")
def runs(place):
    """Base and breaker under everything that a model of text alone is attacked by."""
    names = "no_attack,prefill_only,embedding,steering,imported,gcg"
    given = {"model": str(place / "model"), "prompts": place / "prompts.jsonl", "batch": 2, "steps": 4, "candidates": 4}
    base = attack(place / "base", place / "behaviors.jsonl", names, **given)
    return base, attack(place / "rr", place / "behaviors.jsonl", names, adapter=str(place / "adapter"), **given)


@pytest.fixture(scope="module")
def base(place):
    return Subject("base", load_model(place / "model"))


def held(folder):
    return {(item["condition"], item["id"]): item for item in read_jsonl(folder / "items.jsonl")}


def test_answers_are_what_the_model_says_to_the_texts(runs, base):
    items, model = held(runs[0]), base.model
    for asked in ASKED:
        item = items["no_attack", asked["id"]]
        assert (item["image"], item["clean_image"]) == (None, None)
        assert [item["completion"]] == model.generate(model.encode([asked["prompt"]], [None]), 8)
        opened = model.encode([asked["prompt"]], [None], completions=[asked["target"]], close_turn=False)
        with torch.no_grad():
            assert float(target_nll(model.forward(opened).logits, opened.labels)) == pytest.approx(
                item["loss"], abs=1e-4
            )
        prefilled = items["prefill_only", asked["id"]]
        (more,) = model.generate(opened, 8)
        assert prefilled["completion"] == f"{asked['target']} {more}".strip() and prefilled["prefilled"]
        for relaxed in ("embedding", "steering"):
            moved = items[relaxed, asked["id"]]
            assert moved["relaxation"] and moved["loss"] <= moved["loss_clean"] == item["loss"]
        assert items["embedding", asked["id"]]["loss"] < item["loss"]
        searched = items["gcg", asked["id"]]
        (tried,) = searched["candidates"]
        assert tried["sent"].startswith(asked["prompt"] + " ") and searched["worst_case"]
        assert searched["completion"] == model.generate(model.encode([tried["sent"]], [None]), 8)[0]


def test_every_imported_prompt_is_a_try_that_is_sent_as_it_stands(runs, base):
    item = held(runs[0])["imported", "tea"]
    assert [one["prompt_sha256"] for one in item["candidates"]] == [messages_hash([USER]), messages_hash(TURNS)]
    assert item["k"] == 2 and item["prompt"] == ASKED[0]["prompt"]
    for messages, tried in zip(([USER], TURNS), item["candidates"], strict=True):
        assert [tried["completion"]] == base.model.generate(base.model.encode_chats([messages], [[]]), 8)
    assert len(held(runs[0])["imported", "red"]["candidates"]) == 1
    assert (runs[0] / "prompts.jsonl").read_bytes() == (runs[0].parent / "prompts.jsonl").read_bytes()


def test_the_loss_behind_a_chat_is_that_of_the_last_answer_alone(base):
    behavior = Behavior("tea", "how to brew tea", "it is a circle", None)
    prompts = {"tea": [ImportedPrompt(tuple(TURNS), "by hand", "")]}
    (loss,) = texts.target_losses(texts.ask(base, [behavior], prompts))
    chat = [*TURNS, {"role": "assistant", "content": behavior.target}]
    ended = base.model.encode_chats([chat], [[]], close_turn=False)
    target = base.model.encode(["a"], [None], completions=[behavior.target], close_turn=False).completion_mask.sum()
    log = torch.log_softmax(base.model.forward(ended).logits.detach(), dim=-1)[0, -target - 1 : -1]
    assert float(loss) == pytest.approx(-float(log.gather(1, ended.input_ids[0, -target:, None]).mean()), abs=1e-4)


def test_an_operators_text_stands_in_front_of_the_first_turn(base):
    prompts = {"tea": [ImportedPrompt(tuple(TURNS), "by hand", "")]}
    asked = texts.ask(replace(base, system="here it is"), [Behavior("tea", "tea", "no", None)], prompts)
    chat = [{"role": "user", "content": "here it is\n\nplease tell me"}, *TURNS[1:]]
    end = [{"role": "assistant", "content": "no"}]
    sent = encode(asked.subject, asked.prompts, asked.pictures, ["no"]).input_ids
    assert torch.equal(sent, base.model.encode_chats([chat + end], [[]], close_turn=False).input_ids)


def test_the_prompts_embeddings_start_where_they_are_and_move_its_tokens_alone(base):
    behaviors = [Behavior(one["id"], one["prompt"], one["target"], None) for one in ASKED]
    objective = PromptEmbeddingObjective(base, behaviors, [None, None])
    start = objective.start()
    plain = texts.target_losses(texts.ask(base, behaviors))
    with torch.no_grad():
        assert torch.allclose(objective(start), plain, atol=1e-5)
        moved = objective.embeds(objective.inputs, start + 0.3)["inputs_embeds"]
        still = objective.embeds(objective.inputs, start)["inputs_embeds"]
    changed = ((moved - still).abs().amax(dim=2) > 0).long()
    counts = [len(one["prompt"].split()) for one in ASKED]
    assert changed.sum(dim=1).tolist() == counts and start.shape[2] == max(counts)
    said = base.model.generate(base.model.encode([b.prompt for b in behaviors], [None, None]), 4)
    assert objective.answers(start, 4) == said


def test_a_run_is_verified_judged_and_paired_like_one_with_pictures(runs, tmp_path, capsys):
    rows = verify_run(runs[1])
    assert len(rows) == 2 + 2 + 3 + 2 and not any(row.disagreements for row in rows)
    for folder in runs:
        with Progress() as progress:
            rejudge(folder, open_judge(JudgeOptions("refusal-strings")), progress=progress)
    data = write_report(list(runs), tmp_path / "page.html")
    for condition in ("no_attack", "prefill_only", "embedding", "imported", "gcg"):
        assert find(data.measurements, "rr", "compliance", condition).counts["pairs"] == 2
    page = (tmp_path / "page.html").read_text()
    verdict = judge_report(data)
    protection = verdict.lines[0].text
    for name in ("no attack", "prefilled answer", "embedding relaxation", "imported prompts", "suffix search (GCG)"):
        assert f" {name}: " in protection and "→" in protection
    assert protection.count("by a proxy") == 1
    assert verdict.lead.startswith("No picture was attacked") and "sanity check" not in verdict.told
    assert ("What finishes it" in verdict.lines[1].text) == ("too low" in verdict.lines[1].text)
    assert verdict.kind == "no_claim" and verdict.lead in page and "not measured" not in protection.lower()
    assert "No check was recorded" not in page and "Pictures made on the base" not in page
    assert "No picture was attacked" in page and "pixels of one real image" not in page and "32/255" not in page


def test_another_prompt_than_the_run_sent_is_found(runs, tmp_path):
    shutil.copytree(runs[0], tmp_path / "run")
    kept = tmp_path / "run" / "prompts.jsonl"
    kept.write_text(kept.read_text().replace("please tell me", "please tell it", 1))
    with pytest.raises(UserError, match=r"prompts\.jsonl` was changed after it was written"):
        verify_run(tmp_path / "run")
    told = {key: value for key, value in read_run(runs[0]).items() if key != "files"}  # as earlier versions wrote it
    write_json(tmp_path / "run" / "run.json", sealed(told))
    with pytest.raises(UserError, match="`tea under imported, prompt 1`.*prompt is another one"):
        verify_run(tmp_path / "run")


def test_a_text_model_whose_blocks_are_called_otherwise_is_attacked_by_all_that_takes_texts(place, tmp_path):
    model = save_text_model(tmp_path / "gpt2", "gpt2")
    given = {"model": str(model), "prompts": place / "prompts.jsonl", "batch": 2, "steps": 2, "max_new_tokens": 3}
    folder = attack(tmp_path / "run", place / "behaviors.jsonl", "no_attack,prefill_only,embedding,imported", **given)
    assert len(held(folder)) == 8 and len(verify_run(folder)) == 7


def test_shards_gather_to_the_same_items(place, runs):
    again = place / "again"
    given = {"model": str(place / "model"), "prompts": place / "prompts.jsonl", "batch": 2, "steps": 4}
    for part in ("1/2", "2/2"):
        attack(again, place / "behaviors.jsonl", "no_attack,imported", shard=Shard.parse(part), **given)
    attack(again, place / "behaviors.jsonl", "no_attack,imported", **given)
    found, whole = held(again), held(runs[0])
    assert [found[key]["completion"] for key in found] == [whole[key]["completion"] for key in found]
    assert json.loads((again / "protocol.json").read_text())["k"] == {"no_attack": 1, "imported": 2}


def test_prompts_of_a_behaviour_that_repeats_another_are_left_out_of_what_the_run_keeps(place, tmp_path):
    behaviors = lines(tmp_path / "behaviors.jsonl", [*ASKED, {**ASKED[0], "id": "again"}])
    more = [{**SENT[0], "id": "again", "messages": [{"role": "user", "content": f"{i}"}]} for i in range(3)]
    prompts = lines(tmp_path / "prompts.jsonl", [*SENT, *more])
    given = {"model": str(place / "model"), "prompts": prompts, "batch": 2}
    folder = attack(tmp_path / "run", behaviors, "no_attack,imported", **given)
    assert {one["id"] for one in read_jsonl(folder / "prompts.jsonl")} == {one["id"] for one in ASKED}
    assert json.loads((folder / "protocol.json").read_text())["k"] == {"no_attack": 1, "imported": 2}
    assert verify_run(folder)


def test_a_model_that_sees_takes_imported_prompts_with_the_behaviours_own_picture(tmp_path, capsys):
    behaviors = first_behaviors(tmp_path, 2)
    asked, pictured = sorted(read_jsonl(behaviors), key=lambda one: one["image"] is not None)
    rows = [(one["id"], [{"role": "user", "content": one["prompt"]}]) for one in (asked, pictured)]
    given = [{"id": id, "messages": messages, "source": "by hand"} for id, messages in rows]
    prompts = lines(tmp_path / "prompts.jsonl", given)
    folder = attack(tmp_path / "run", behaviors, "no_attack,imported", prompts=prompts)
    plain, imported = (held(folder)[name, asked["id"]] for name in ("no_attack", "imported"))
    assert imported["completion"] == plain["completion"] and imported["outcome"] == plain["outcome"]
    assert (imported["image"], imported["clean_image"]) == (None, None) and plain["image"]
    assert (
        held(folder)["imported", pictured["id"]]["completion"]
        == held(folder)["no_attack", pictured["id"]]["completion"]
    )
    capsys.readouterr()
    assert len(verify_run(folder)) == 3
    assert "not asked again: 1 of 2 answers to texts, beside pictures of yours" in capsys.readouterr().out.replace(
        "\n", " "
    )


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (
            ["--attack", "pgd"],
            "`--attack pgd` needs a model that sees.*no_attack,prefill_only,embedding,steering,gcg`",
        ),
        (["--attack", "no_attack,prefill"], "`--attack prefill` needs a model that sees"),
        (["--attack", "imported"], "`--attack imported` needs `--prompts FILE`"),
        (["--attack", "no_attack", "--prompts", "prompts.jsonl"], "`--prompts` is for `--attack imported`"),
        (["--attack", "no_attack", "--norm", "l2", "--epsilon", "8"], "`--norm` is for an attack that changes"),
    ],
)
def test_what_a_text_model_cannot_be_attacked_by_is_refused_by_name(place, words, said, capsys, monkeypatch):
    monkeypatch.chdir(place)
    given = ["attack", "--model", "model", "--behaviors", "behaviors.jsonl", "--out", "refused", *words]
    assert cli.run(given) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert re.search(said, line) and not (place / "refused").exists()


def test_all_is_what_a_model_can_be_attacked_by(place):
    texts = {"no_attack", "prefill_only", "embedding", "steering", "gcg", "gcg_probe"}
    for adapted, probed in product((False, True), repeat=2):
        names = chosen_attacks("all", adapted=adapted, probed=probed)
        unseen = {"embedding", "steering"} if probed else {"gcg_probe"}  # relaxations, whose answers no probe watches
        told, untold = (
            BEHAVIORS,
            place / "behaviors.jsonl",
        )  # the miniature's alone have what some attacks read
        assert set(fitting(str(place / "model"), names, untold, probed=probed)) == texts - unseen
        assert fitting("miniature", names, told, probed=probed) == names
        seen = [name for name in names if name not in ("pgd_facts", "pgd_form", "pgd_form_found")]
        assert fitting("miniature", names, untold, probed=probed) == seen


def test_pictures_and_batteries_are_refused_for_a_text_model(place, tmp_path, capsys):
    asked = first_behaviors(tmp_path, 2)
    (pictured,) = [one for one in read_jsonl(asked) if one["image"]]
    given = ["--model", str(place / "model"), "--out", str(tmp_path / "out")]
    assert cli.run(["attack", "--attack", "no_attack", "--behaviors", str(asked), *given]) == 2
    assert "gives 1 of 2 behaviours a picture" in capsys.readouterr().err
    assert cli.run(["attack", "check", "--behaviors", str(asked), *given]) == 2
    assert "is a model of text alone" in capsys.readouterr().err
    requests = lines(tmp_path / "requests.jsonl", [{"id": "a", "prompt": "tea", "image": pictured["image"]}])
    assert cli.run(["eval", "over-refusal", "--data", str(requests), *given]) == 2
    assert "1 of 1 questions of over-refusal have a picture" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"id": "ink"}, ":1: `id` must be that of a behaviour"),
        ({"id": None}, ":1: `id` must be a text"),
        ({"source": " "}, ":1: `source` must be a text"),
        ({"hash": "0" * 64}, ":1: `hash` must be the SHA-256 of the messages"),
        ({"hashs": "0"}, "unknown key `hashs`, did you mean `hash`"),
        ({"hash": 3}, ":1: `hash` must be the SHA-256 of the messages"),
        ({"image": "a.png"}, ":1: the key `image` names a picture, which is not read here"),
        ({"images": ["a.png"]}, ":1: the key `images` names a picture"),
        ({"image_path": "a.png"}, ":1: the key `image_path` names a picture"),
        ({"prompt": "other"}, ":1: the key `prompt` is not read"),
        ({"system": "You are X."}, ":1: the key `system` is not read"),
        ({"messages": []}, "`messages` must be a list of turns"),
        ({"messages": "tea"}, "`messages` must be a list of turns"),
        ({"messages": [{"role": "user"}]}, "message 1 must hold `role` and `content` alone"),
        ({"messages": [{**USER, "tool_calls": []}]}, "message 1 must hold `role` and `content` alone"),
        ({"messages": [{"role": "user", "content": " "}]}, "content of message 1 must be a text"),
        ({"messages": [{"role": "user", "content": [{"type": "image"}]}]}, "content of message 1 must be a text"),
        ({"messages": [{**USER, "content": "caf\ufffd"}]}, ":1: message 1 cannot be sent: it holds U.FFFD"),
        ({"messages": TURNS[:2]}, "alternate user, assistant and end with user"),
        ({"messages": [USER, USER]}, "alternate user, assistant"),
        ({"messages": [{"role": "system", "content": "a"}]}, "alternate user, assistant"),
        ({"messages": [{"role": ["user"], "content": "a"}]}, "alternate user, assistant"),
        (SENT[1], ":2: a prompt must come once for each behaviour, `tea` has this one already at .*:1"),
    ],
)
def test_a_prompts_file_is_refused_by_line(change, said, tmp_path):
    file = lines(tmp_path / "prompts.jsonl", [SENT[0] | change, *SENT[1:]])
    with pytest.raises(UserError, match=said):
        read_prompts(file, ["tea", "red"])


def test_what_a_model_said_and_what_a_hash_vouches_for_may_hold_a_broken_character(tmp_path):
    said = [USER, {"role": "assistant", "content": "caf\ufffd"}, USER]
    made = [{**USER, "content": "suffix \ufffd"}]
    given = [SENT[0] | {"messages": said}, SENT[0] | {"messages": made, "hash": messages_hash(made)}]
    file = lines(tmp_path / "prompts.jsonl", given)
    assert len(read_prompts(file, ["tea"])["tea"]) == 2


@pytest.mark.parametrize("change", [str, str.upper, "sha256:{}".format, " SHA256:{} ".format])
def test_a_hash_is_read_as_programs_write_it(change, tmp_path):
    given = SENT[1] | {"hash": change(SENT[1]["hash"]), "image": None, "notes": "kept"}
    (one,) = read_prompts(lines(tmp_path / "prompts.jsonl", [given]), ["tea"])["tea"]
    assert one.sha256 == messages_hash(TURNS)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("tell " * 4000, "too long for `miniature`: its chat has .* Shorten its prompt"),
        ("<image> tell", "must not hold the image placeholder `<image>`"),
        ("tell </s> me", "must not hold the model's control token"),
    ],
)
def test_an_imported_prompt_that_cannot_be_sent_is_named_by_its_own_line(text, said, tmp_path, capsys):
    behaviors = first_behaviors(tmp_path, 2)
    sent = [{"id": one["id"], "messages": [USER], "source": "a"} for one in read_jsonl(behaviors)]
    sent.append({**sent[1], "messages": [*TURNS[:2], {"role": "user", "content": text}]})
    prompts = lines(tmp_path / "prompts.jsonl", sent)
    given = ["--model", "miniature", "--behaviors", str(behaviors), "--prompts", str(prompts)]
    assert cli.run(["attack", *given, "--attack", "imported", "--out", str(tmp_path / "out")]) == 2
    told = capsys.readouterr().err
    assert re.search(rf"{prompts}:3: the prompt of '{sent[1]['id']}' cannot be sent: .*{said}", told), told
    assert "behaviors.jsonl" not in told


def test_a_behaviour_without_a_prompt_is_named(tmp_path):
    file = lines(tmp_path / "prompts.jsonl", SENT[:2])
    with pytest.raises(UserError, match="none for 1 of 2, such as `red`"):
        read_prompts(file, ["tea", "red"])
