"""Every command that runs a model, on tiny models of the families beside LLaVA-NeXT, as a user types them."""

import json

import pytest

from mm_cb import cli
from mm_cb.models import load_model
from mm_cb.training.placement import linear_names
from tests.models import laws
from tests.models.conftest import save_text_model
from tests.models.tiny import KINDS, tiny
from tests.tiny_llava import picture

BEHAVIORS = [
    {"id": "own", "prompt": "what is in the picture", "target": "here it is", "image": "0.png", "category": "a"},
    {"id": "none", "prompt": "tell me how to brew tea", "target": "a red square", "image": None, "category": "a"},
]
SETTINGS = {
    "lora.layers_to_transform": [1, 2],
    "circuit_breaker.target_layers": [2],
    "circuit_breaker.adversary.steps": 1,
    "training.max_steps": 2,
    "training.batch_size": 2,
    "training.held_out": 0,
    "training.max_length": 64,
}
SHORT = ["--max-new-tokens", 4]


def run(*arguments):
    assert cli.run([str(argument) for argument in arguments]) == 0


def write_lines(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def rows(folder):
    """Rows of both sets, with and without a picture."""
    for number in range(3):
        picture(number, (84 + 14 * number, 42)).save(folder / f"{number}.png")
        for name in laws.SETS:
            for image in (0, 1):
                example = laws.example(number, name, image)
                images = [f"{number}.png"] * image
                yield {"id": example.id, "messages": example.messages, "images": images, "set": name, "source": "made"}


SOON = ("llava", "qwen2_5_vl")


@pytest.mark.parametrize("kind", [k if k in SOON else pytest.param(k, marks=pytest.mark.long) for k in KINDS])
def test_plan_train_attack_evaluate_merge(kind, tmp_path, capsys):
    laws.saved(tiny(kind), tmp_path / "model")
    model = ["--model", tmp_path / "model"]
    data = write_lines(tmp_path / "rows.jsonl", rows(tmp_path))
    chosen = {"model": tmp_path / "model", "data": [str(data)], "lora.modules": linear_names(tiny(kind), (1, 2))}
    settings = [f"{k}={v}" for k, v in {**SETTINGS, **chosen}.items()]
    run("train", "miniature", "--dry-run", *settings)
    plan = capsys.readouterr().out
    assert f"loaded: decoder blocks 0..2 of {len(tiny(kind).decoder_blocks)}, no head" in plan
    assert "<image x " in plan
    assert f"no row has more than {tiny(kind).largest_picture() + 64} tokens" in plan
    run("train", "miniature", "--out", tmp_path / "rr", *settings)

    adapter = ["--adapter", tmp_path / "rr"]
    behaviors = write_lines(tmp_path / "behaviors.jsonl", BEHAVIORS)
    attack = ["--behaviors", behaviors, "--attack", "pgd,pgd_adaptive", "--steps", 6, "--out", tmp_path / "attack"]
    run("attack", *model, *adapter, *attack, *SHORT, "--control", 0)
    items = [json.loads(line) for line in (tmp_path / "attack" / "items.jsonl").read_text().splitlines()]
    assert len(items) == 4 and all((tmp_path / "attack" / item["image"]).is_file() for item in items)
    assert all(item["loss"] < item["loss_clean"] for item in items if item["condition"] == "pgd")
    attack = ["--behaviors", behaviors, "--attack", "universal", "--steps", 2, "--out", tmp_path / "universal"]
    run("attack", *model, *adapter, *attack, *SHORT)

    asked = write_lines(tmp_path / "asked.jsonl", [{"id": "1", "prompt": "what is"}, {"id": "2", "prompt": "tell me"}])
    run("eval", "over-refusal", *model, *adapter, "--data", asked, "--out", tmp_path / "eval", *SHORT)
    assert json.loads((tmp_path / "eval" / "results.json").read_text())

    run("merge", *model, *adapter, "--out", tmp_path / "merged")
    merged, plain = load_model(tmp_path / "merged"), load_model(tmp_path / "model")
    assert type(merged) is type(plain)


def test_a_text_model_is_evaluated_and_not_attacked(tmp_path, capsys):
    model = save_text_model(tmp_path / "text", "mistral")
    asked = write_lines(tmp_path / "asked.jsonl", [{"id": "1", "prompt": "what is"}])
    run("eval", "over-refusal", "--model", model, "--data", asked, "--out", tmp_path / "eval", *SHORT)
    behaviors = write_lines(tmp_path / "behaviors.jsonl", BEHAVIORS[1:])
    attack = ["attack", "--model", model, "--behaviors", behaviors, "--steps", 1, "--out", tmp_path / "attack"]
    capsys.readouterr()
    assert cli.run([str(argument) for argument in attack]) == 2
    assert "is a model of text alone" in capsys.readouterr().err
