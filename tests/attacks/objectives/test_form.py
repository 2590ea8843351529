from dataclasses import replace
from pathlib import Path

import pytest
import torch

from mm_cb.attacks.objectives.form import FormObjective
from mm_cb.attacks.objectives.homotopy import FLOOR
from mm_cb.attacks.refusals import refuse_form
from mm_cb.core.errors import UserError
from mm_cb.data.behaviors_file import GAP, read_behaviors
from mm_cb.miniature.language import FORM
from mm_cb.miniature.world import Brew, recipe
from tests.attacks.objectives.conftest import pixels_of

ROOT = Path(__file__).resolve().parents[3]
BEHAVIORS = read_behaviors(ROOT / "data" / "miniature" / "behaviors.jsonl")[:5:4]  # both without a picture
LONGER = [BEHAVIORS[0], replace(BEHAVIORS[1], extra={"form": {"text": f"{GAP} and {GAP}.", "words": ["soot", "lye"]}})]


@pytest.mark.parametrize("behaviors", [BEHAVIORS, LONGER])
def test_it_is_the_loss_of_form_and_of_any_word_with_the_models_own_words_before(breaker, canvases, behaviors):
    objective, pixels = FormObjective(breaker, behaviors, canvases), pixels_of(canvases)
    with torch.no_grad():
        values = objective.preprocess(pixels)
        found, _ = objective.terms(values)
        inputs = objective._passes(values).inputs
        with breaker.active() as model:
            logs = model.forward(inputs, pixel_values=values).logits.log_softmax(-1)
    tokenizer = breaker.model.processor.tokenizer
    for row, behavior in enumerate(behaviors):
        words = {tokenizer.convert_tokens_to_ids(word) for word in behavior.form.words}
        places = [i for i in range(inputs.input_ids.shape[1]) if inputs.labels[row, i] != -100]
        said = tokenizer.decode(inputs.input_ids[row, places])
        assert said.replace(" ", "").startswith(behavior.target.replace(" ", "")), said
        losses, gaps = [], 0
        for i in places:
            log, token = logs[row, i - 1], int(inputs.input_ids[row, i])
            if token in words:
                gaps += 1
                assert max(words, key=lambda word: float(log[word])) == token, (
                    "filled from left to right, each by the likeliest"
                )
                losses.append(-float(log[sorted(words)].logsumexp(-1)))
            else:
                losses.append(-float(log[token]))
        assert gaps == behavior.form.text.count(GAP)
        assert float(found[row]) == pytest.approx(sum(max(FLOOR, loss) for loss in losses) / len(losses), abs=1e-4)


def test_no_word_is_told_apart_their_order_changes_nothing(breaker, canvases):
    turned = [replace(b, extra={"form": {"text": b.form.text, "words": b.form.words[::-1]}}) for b in BEHAVIORS]
    with torch.no_grad():
        first, second = (FormObjective(breaker, told, canvases)(pixels_of(canvases)) for told in (BEHAVIORS, turned))
    assert torch.equal(first, second)


def test_rows_do_not_mix_and_every_row_has_a_gradient(breaker, canvases):
    pixels = pixels_of(canvases).requires_grad_()
    losses = FormObjective(breaker, LONGER, canvases)(pixels)
    (gradient,) = torch.autograd.grad(losses[0], pixels, retain_graph=True)
    assert bool(gradient[0].any()) and not bool(gradient[1].any()) and bool(gradient.isfinite().all())
    alone = FormObjective(breaker, LONGER[1:], canvases[1:])
    assert alone(pixels[1:]).item() == pytest.approx(losses[1].item(), abs=1e-4)


def test_the_miniatures_own_form_holds_no_true_word_and_its_words_are_the_same_for_all():
    for behavior in BEHAVIORS:
        true = {*recipe(Brew(*behavior.extra["brew"])).values()}
        assert not true & {*FORM.split()} and true < {*behavior.form.words} and len(behavior.form.words) == 32


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["soot", "xylograph"], "does not know `xylograph` of the `words` of its form, it reads `<unk>`"),
        (["xylograph", "quux"], "does not know `xylograph`"),
        (["soot tar", "soot  tar"], "`soot tar` and `soot tar` of the `words` of its form are the same tokens"),
        (
            ["soot", "soot tar"],
            "equally many tokens of the model: with `soot` in its gaps .* with `soot tar`",
        ),
    ],
)
def test_words_that_the_model_cannot_tell_apart_are_refused_by_name(breaker, words, message):
    told = replace(BEHAVIORS[0], extra={"form": {"text": f"take {GAP}.", "words": words}})
    with pytest.raises(UserError, match=message) as caught:
        refuse_form(breaker, told)
    assert repr(told.id) in str(caught.value)


@pytest.mark.parametrize("text", [f"take {GAP} of xylograph.", f"xylograph {GAP}.", f"take {GAP}, xylograph, {GAP}."])
def test_a_form_whose_own_text_the_model_does_not_know_is_refused_by_name(breaker, text):
    told = replace(BEHAVIORS[0], where="f:2", extra={"form": {"text": text, "words": ["soot", "lye"]}})
    with pytest.raises(UserError, match="f:2: .* does not know `xylograph[,.]?` of the text of its form"):
        refuse_form(breaker, told)
    refuse_form(breaker, replace(told, extra={"form": {"text": text.replace("xylograph", "tar"), "words": ["soot"]}}))
