import copy
import json
from dataclasses import replace

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch.nn import functional
from transformers import TrainingArguments

from mm_cb.models import TokenRole
from mm_cb.training.adapter import add_adapter
from mm_cb.training.batches import PairCollator, PairedExamples
from mm_cb.training.hidden_states import hidden_states
from mm_cb.training.placement import KeptBlocks, check_targets, lora_paths
from mm_cb.training.trainer import Rerouting, ReroutingTrainer
from tests.reference.released_trainer import cut_language_model, released_loss
from tests.tiny_llava import tiny_llava

MASKS = {"text": "user_and_assistant", "multimodal": "after_image"}
TOKENWISE = ("input_ids", "attention_mask", "position_ids")
ALL_TOKENS = {"text": "all", "multimodal": "all"}
PROJECTIONS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


@pytest.fixture
def build(tmp_path, examples, randomise_b):
    """A trainer on a tiny model with a random LoRA (fresh: ``scale=0``); ``at`` puts it at a step of a run."""

    def make(
        *, blocks=(1, 2), targets=(2,), kept=None, dropout=0.0, masks=MASKS, batches="alternate", steps=6, batch_size=4,
        accumulation=1, learning_rate=1e-3, scale=0.3, at=None, metrics=None, **rerouting,
    ):  # fmt: skip
        model = tiny_llava(blocks=4)
        kept = kept or check_targets(targets, blocks, 4, "all")
        torch.manual_seed(0)
        paths = lora_paths(model, blocks, PROJECTIONS)
        model = add_adapter(model, paths, kept, r=4, lora_alpha=4, dropout=dropout)
        if scale:
            randomise_b(model.model, scale=scale)
        trainer = ReroutingTrainer(
            model,
            TrainingArguments(
                output_dir=str(tmp_path / "checkpoints"),
                max_steps=steps,
                per_device_train_batch_size=batch_size // accumulation,
                gradient_accumulation_steps=accumulation,
                learning_rate=learning_rate,
                lr_scheduler_type="constant",
                weight_decay=0.0,
                logging_steps=1,
                save_strategy="no",
                report_to="none",
                disable_tqdm=True,
                remove_unused_columns=False,
                use_cpu=True,
                dataloader_pin_memory=False,
                seed=0,
            ),
            Rerouting(5.0, targets, **rerouting),
            PairedExamples(examples, steps=steps, batch_size=batch_size, batches=batches, seed=0),
            PairCollator(model, masks),
            metrics=metrics,
        )
        if at is not None:
            trainer.state.global_step, trainer.state.max_steps = at
        return trainer

    return make


def batch_of(trainer, rows):
    return trainer.data_collator([trainer.train_dataset[i] for i in rows])


def gradients(trainer):
    return {name: p.grad for name, p in trainer.model.named_parameters() if p.requires_grad}


def model_kwargs(inputs):
    return {
        "input_ids": inputs.input_ids,
        "attention_mask": inputs.attention_mask,
        "position_ids": inputs.text_positions,
        **({} if inputs.pixel_values is None else {"pixel_values": inputs.pixel_values}),
        **inputs.beside,
    }


def padded_as_released(batch, name):
    """Rows of 1024: retain rows padded on the left; of the others a request of 512 so, and an answer on the right."""
    inputs = batch[name]["inputs"]
    kwargs, rows = model_kwargs(inputs), []
    for row, real in enumerate(inputs.attention_mask.bool()):
        answer = int((inputs.roles[row, real] == TokenRole.COMPLETION).sum())
        right = 512 - answer if name == "circuit_breaker" else 0
        sides = (1024 - int(real.sum()) - right, right)
        rows.append([functional.pad(kwargs[key][row, real], sides) for key in TOKENWISE])
    return kwargs | dict(zip(TOKENWISE, map(torch.stack, zip(*rows, strict=True)), strict=True))


@pytest.mark.parametrize(
    ("modality", "blocks", "targets"),
    [("text", (0, 1, 2), (2,)), ("multimodal", (0, 1), (1,)), ("multimodal", (1, 2), (2,))],
)
def test_the_loss_and_its_gradients_are_the_released_trainers_at_its_own_padding(
    build, randomise_b, modality, blocks, targets
):
    ours = build(
        blocks=blocks, targets=targets, masks=ALL_TOKENS, batches=modality, at=(2, 5), retain_average="official"
    )
    batch = batch_of(ours, range(2))
    loss = ours.compute_loss(ours.model, batch)
    loss.backward()

    released = tiny_llava(blocks=4)
    cut_language_model(released.base, targets)
    paths = lora_paths(released, blocks, PROJECTIONS)
    peft_model = get_peft_model(released.base, LoraConfig(target_modules=paths, r=4, lora_alpha=4)).eval()
    randomise_b(peft_model)
    expected = released_loss(
        peft_model,
        padded_as_released(batch, "circuit_breaker"),
        padded_as_released(batch, "retain"),
        targets,
        5 * (1 - 2 / 10),
        5 * 2 / 10,
    )
    expected.backward()

    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    theirs = {name: p.grad for name, p in peft_model.named_parameters() if p.requires_grad}
    assert theirs.keys() == gradients(ours).keys()
    for name, gradient in gradients(ours).items():
        assert torch.linalg.vector_norm(gradient - theirs[name]) <= 1e-4 * torch.linalg.vector_norm(theirs[name]), name


def test_the_paper_average_differs_from_the_released_one_by_the_fill_of_its_padding(build):
    parts = {}
    for average in ("tokens", "official"):
        trainer = build(masks=ALL_TOKENS, batches="text", at=(2, 5), retain_average=average)
        batch = batch_of(trainer, range(4))
        parts[average] = trainer.compute_loss(trainer.model, batch, return_outputs=True)[1]["retain_loss"].item()
    fill = batch["retain"]["mask"].sum().item() / (4 * 1024)
    assert parts["official"] == pytest.approx(parts["tokens"] * fill, rel=1e-5)


def test_averaging_over_frozen_states_weakens_the_retain_loss(build):
    """States 0 and 1 are the same in both passes: with targets (2,) and states 0..3 kept, only 2 and 3 contribute."""
    parts = {}
    for layers in ("all", "targets"):
        trainer = build(at=(2, 5), retain_layers=layers)
        batch = batch_of(trainer, range(4))
        parts[layers] = trainer.compute_loss(trainer.model, batch, return_outputs=True)[1]
    reference, adapted = hidden_states(trainer._encoder, trainer._objective.rows(batch["retain"]), 1, 3)
    counted = batch["retain"]["mask"][batch["retain"]["inputs"].attention_mask.bool()] == 1
    distances = [(a - r).norm(dim=-1)[counted].mean()
                 for a, r in zip(adapted, reference, strict=True)]  # fmt: skip
    assert parts["all"]["reroute_loss"] == parts["targets"]["reroute_loss"]
    assert parts["targets"]["retain_loss"].item() == pytest.approx(distances[0].item(), rel=1e-5)
    assert parts["all"]["retain_loss"].item() == pytest.approx(sum(distances).item() / 4, rel=1e-5)


@pytest.mark.parametrize("modality", ["text", "multimodal"])
def test_the_kl_of_logits_is_that_of_the_plain_model_on_padded_rows(build, modality, monkeypatch):
    """Ours: rows laid end to end, some tokens' logits at a time. The reference: two whole forward passes."""
    monkeypatch.setattr("mm_cb.training.objective.LOGITS_OF", 5)
    kept = check_targets((2,), (1, 2), 4, "all", "kl")
    trainer = build(kept=kept, batches=modality, at=(2, 5), retain="kl")
    rows = batch_of(trainer, range(3))["retain"]
    ours = trainer._objective.retain(rows, rows["mask"].sum())
    ours.backward()
    got = {name: gradient.clone() for name, gradient in gradients(trainer).items()}

    model = trainer._encoder
    kwargs = {k: v for k, v in model_kwargs(rows["inputs"]).items() if k != "position_ids"}
    trainer.model.zero_grad()
    adapted = trainer.model(**kwargs).logits
    with torch.no_grad(), trainer.model.disable_adapter():
        reference = trainer.model(**kwargs).logits
    counted = rows["mask"].bool()
    expected = functional.kl_div(
        adapted[counted].log_softmax(-1), reference[counted].softmax(-1), reduction="batchmean"
    )
    expected.backward()
    assert adapted.shape[-1] == len(model.processor.tokenizer)
    assert ours.item() == pytest.approx(expected.item(), rel=1e-4) and ours.item() > 1e-3
    for name, gradient in gradients(trainer).items():
        assert torch.linalg.vector_norm(gradient - got[name]) <= 1e-3 * torch.linalg.vector_norm(gradient), name


def test_a_fresh_adapter_starts_at_reroute_one_and_retain_zero_without_nan(build):
    trainer = build(scale=0, at=(3, 6))
    loss, parts = trainer.compute_loss(trainer.model, batch_of(trainer, range(4)), return_outputs=True)
    loss.backward()
    assert parts["reroute_loss"].item() == pytest.approx(1, abs=1e-5)
    assert parts["retain_loss"].item() == 0
    assert all(g.isfinite().all() and g.abs().max() < 1e-4 for g in gradients(trainer).values())


def run(trainer):
    trainer.train()
    return {name: p.detach().clone() for name, p in trainer.model.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("average", ["tokens", "official"])
def test_splitting_a_batch_changes_neither_loss_nor_gradient_nor_schedule(build, tmp_path, average):
    records = {}
    for accumulation in (1, 2, 4):
        path = tmp_path / f"{accumulation}.jsonl"
        trainer = build(accumulation=accumulation, steps=3, metrics=path, masks=MASKS, retain_average=average)
        run(trainer)
        records[accumulation] = [json.loads(line) for line in path.read_text().splitlines()]
    for accumulation in (2, 4):
        for split, whole in zip(records[accumulation], records[1], strict=True):
            assert split["modality"] == whole["modality"]
            for key in ("step", "reroute_loss", "retain_loss", "reroute_coeff", "retain_coeff", "grad_norm"):
                assert split[key] == pytest.approx(whole[key], rel=2e-3, abs=1e-6), key
    first = [records[n][0] for n in (1, 2, 4)]
    for split in first[1:]:
        assert split["grad_norm"] == pytest.approx(first[0]["grad_norm"], rel=1e-4)


def test_every_step_is_logged_with_the_weights_that_it_used(build, tmp_path):
    trainer = build(steps=4, metrics=tmp_path / "metrics.jsonl", scale=0, dropout=0.05)
    run(trainer)
    records = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [r["step"] for r in records] == [0, 1, 2, 3]
    assert [r["modality"] for r in records] == ["text", "multimodal"] * 2
    assert [r["reroute_coeff"] for r in records] == pytest.approx([5, 4.375, 3.75, 3.125])
    assert [r["retain_coeff"] for r in records] == pytest.approx([0, 0.625, 1.25, 1.875])
    assert records[0]["reroute_loss"] == pytest.approx(1, abs=1e-5) and records[0]["retain_loss"] == 0
    assert records[0]["grad_norm"] < 1e-4 < records[3]["grad_norm"]
    assert {r["learning_rate"] for r in records} == {1e-3}


def test_training_turns_circuit_breaker_states_away_and_changes_nothing_but_the_adapter(build, tmp_path):
    trainer = build(steps=40, batches="text", metrics=tmp_path / "metrics.jsonl", scale=0.1, learning_rate=1e-2)
    before = copy.deepcopy(trainer.model.state_dict())
    run(trainer)
    records = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert max(r["reroute_loss"] for r in records[-2:]) < 0.5
    changed = {name for name, value in trainer.model.state_dict().items() if not torch.equal(value, before[name])}
    assert changed and all("lora_" in name for name in changed)


def test_a_gradient_that_is_not_finite_stops_the_run(build):
    trainer = build(steps=2)
    with torch.no_grad():
        next(p for n, p in trainer.model.named_parameters() if "lora_B" in n).fill_(float("nan"))
    with pytest.raises(FloatingPointError, match="must be finite"):
        trainer.train()


@pytest.mark.parametrize("targets", [(2,), (2, 3)])
def test_a_loss_that_never_looks_at_the_mask_is_given_the_tokens_that_count(build, targets):
    losses, trainer = [], build(targets=targets, at=(2, 5), batches="multimodal")
    batch = batch_of(trainer, range(4))
    counted = int(batch["circuit_breaker"]["mask"].sum())
    assert counted < batch["circuit_breaker"]["inputs"].attention_mask.sum()

    def unmasked(adapted, reference, mask, *, count=None):
        assert adapted.shape == reference.shape == (len(targets), counted, adapted.shape[-1]) and mask.all()
        return torch.cosine_similarity(adapted, reference, dim=-1).relu().sum() / (len(targets) * count)

    for function in (trainer._objective.loss.function, unmasked):
        trainer._objective.loss = replace(trainer._objective.loss, function=function)
        losses.append(trainer.compute_loss(trainer.model, batch, return_outputs=True)[1]["reroute_loss"].item())
    assert losses[0] == pytest.approx(losses[1], rel=1e-6) and losses[0] > 0


def test_kept_blocks_do_not_change_the_targets(build):
    """The reroute loss looks at the output of a block as it is, whether or not more of the tower is kept."""
    losses = []
    for kept in (KeptBlocks(3, True), KeptBlocks(4, True)):
        trainer = build(kept=kept, at=(2, 5))
        batch = batch_of(trainer, range(4))
        losses.append(trainer.compute_loss(trainer.model, batch, return_outputs=True)[1]["reroute_loss"].item())
    assert losses[0] == losses[1]
