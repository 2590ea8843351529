"""What cannot be attacked: behaviours, prompts and targets that a model cannot be shown, or cannot write."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

from PIL.Image import Image

from mm_cb.attacks.best_of_n import varied
from mm_cb.attacks.config import AttackConfig
from mm_cb.attacks.objectives.form import filled_tokens
from mm_cb.attacks.objectives.target import encode
from mm_cb.attacks.registry import attack_entry, attacks, refuse_blind
from mm_cb.attacks.texts import ask
from mm_cb.core.closing import say
from mm_cb.core.embedded import embedded
from mm_cb.core.errors import UserError
from mm_cb.data.behaviors_file import (
    FACTS,
    FORM,
    GAP,
    HARMLESS,
    Behavior,
    grey_canvas,
    read_behaviors,
    refuse_too_large,
)
from mm_cb.data.corpus import read_corpus
from mm_cb.data.pictures import open_picture
from mm_cb.data.prompts_file import ImportedPrompt
from mm_cb.data.unknown import Words, note_of_unknown
from mm_cb.inference.subjects import Subject
from mm_cb.metrics.observations import starts_with
from mm_cb.models import ChatModel, VisionModel
from mm_cb.models.chat import refuse_control_tokens
from mm_cb.models.families import sees
from mm_cb.models.low_rank import changes_of
from mm_cb.training.model_laws import refuse_broken

_TOLD = {
    FACTS: " (the answer's bare facts, docs/formats.md), and which broke most of the breakers that it was tried on",
    FORM: " (how an answer is said, docs/formats.md)",
    HARMLESS: " (requests that the model answers in the same form, docs/formats.md)",
}
_FIRST_DRAWS = 8
"""Variations that are looked at before the first is asked."""
_FEW_WORDS = 1000
"""A vocabulary of at most so many words is too small for texts that somebody writes without having seen it."""


def fitting(model: str, names: Sequence[str], behaviors: Path, *, probed: bool) -> list[str]:
    """What ``all`` comes to: on a model of text alone, every attack that needs neither picture nor a file.

    On others what the behaviours' lines hold all that is needed for; what is left out for want of it is said.
    """
    if sees(model):
        asked = read_behaviors(behaviors)
        left_out = {
            name: f"{name}, for which {untold} of {len(asked)} lines lack `{field}`{_TOLD.get(field, '')}"
            for name in names
            for field in attack_entry(name).fields
            if (untold := sum(field not in one.extra for one in asked))
        }
        if left_out:
            say(f"left out of `all` for want of fields in `{behaviors.name}`: {'; '.join(left_out.values())}.")
        return [name for name in names if name not in left_out]
    texts = [entry for entry in attacks() if not entry.needs_picture and not entry.imported]
    return [entry.name for entry in texts if not (entry.relaxation if probed else entry.needs_probe)]


def refuse_unseen(model: str, names: Sequence[str], behaviors: Sequence[Behavior], file: Path) -> None:
    """Refuse what a model of text alone cannot be shown, and an attack without its text, before a model is loaded.

    Raises:
        UserError: If an attack or a behaviour needs a picture, or an attack a text that a behaviour does not have.
    """
    for attack, field in ((entry.name, field) for entry in map(attack_entry, names) for field in entry.fields):
        if untold := [b.id for b in behaviors if field not in b.extra]:
            raise UserError(
                f"`--attack {attack}` reads each behaviour's `{field}` (docs/formats.md), `{file}` gives none to "
                f"{len(untold)} of {len(behaviors)}, such as `{untold[0]}`; write them, or leave the attack out."
            )
    if sees(model):
        if blind := [name for name in names if attack_entry(name).search == "suffix"]:
            raise UserError(
                f"`--attack {blind[0]}` is for models of text alone, `{model}` sees pictures; leave it out."
            )
        return
    refuse_blind(model, names)
    if pictured := [b.id for b in behaviors if b.image is not None]:
        raise UserError(
            f"`{file}` gives {len(pictured)} of {len(behaviors)} behaviours a picture, such as `{pictured[0]}`, and "
            f"`{model}` is a model of text alone; give it behaviours with `image` null."
        )


def refuse_unfit(subject: Subject, behaviors: Sequence[Behavior], *configs: AttackConfig) -> None:
    """Refuse behaviours that cannot be attacked, or not with what is given beside them, before the first batch is.

    Raises:
        UserError: If a text holds the image placeholder, a harmless target or a form cannot be written, a picture is
            too large for memory or for the norm, none of its variations changes it, a chat is too long, or the model
            breaks a law of its family.
    """
    config = configs[0]
    corpus = [] if config.corpus is None else read_corpus(config.corpus)
    if config.surrogate is not None:
        changes_of(subject.model, config.surrogate)
    refuse_placeholders([*behaviors, *corpus], subject.model)
    refuse_unsayable(behaviors, subject.model)
    refuse_unsayable(corpus, subject.model, "lines of the corpus")
    if any(FORM in one.entry.fields for one in configs):
        for b in behaviors:
            refuse_form(subject, b)
    for one in configs:
        if one.entry.search == "vary":
            refuse_still(subject.model, behaviors, one)
    if not isinstance(subject.model, VisionModel):
        for b in behaviors:
            encode(subject, [b], [None], [b.target])
        return
    if embedded(subject.model.name) is None:
        refuse_broken(subject.model)
    canvas = subject.model.canvas
    refuse_too_large(behaviors, config.batch)
    for b in behaviors:
        blank = b.image is None or config.entry.universal
        picture: Image = grey_canvas(canvas) if blank or b.image is None else open_picture(b.image)
        try:
            config.threat.allowed((picture.height, picture.width))
        except ValueError as error:
            flag = {"patch": "--patch-size", "border": "--border-width", "l2": "--epsilon"}.get(
                config.threat.norm, "--norm"
            )
            raise UserError(
                f"`{flag}` {config.threat.size:g} does not fit the picture of {b.named}, {picture.width} x "
                f"{picture.height} pixels: {error}"
            ) from error
        if not config.entry.universal:  # which encodes every behaviour before it begins
            encode(subject, [b], [picture], [b.target])


def refuse_form(subject: Subject, behavior: Behavior) -> None:
    """Refuse a form that the model does not know all of, or whose gaps are not the same for all words.

    Raises:
        UserError: If words are not equally many tokens, the same for two of them, or unknown, or its text is.
    """
    form, words = behavior.form, Words(subject.model.processor.tokenizer)
    assert form is not None
    unk = subject.model.processor.tokenizer.unk_token
    for word in form.words:
        if words.partly_unknown(word):
            raise UserError(
                f"{behavior.named}: `{subject.model.name}` does not know `{word}` of the `words` of its form, it reads "
                f"`{unk}`; leave it out, or take words that the model has."
            )
    if lost := next((piece for piece in form.text.replace(GAP, " ").split() if words.partly_unknown(piece)), None):
        raise UserError(
            f"{behavior.named}: `{subject.model.name}` does not know `{lost}` of the text of its form, it reads "
            f"`{unk}`; write the form in words that the model has."
        )
    filled_tokens(subject, behavior)


def refuse_still(model: ChatModel, behaviors: Sequence[Behavior], config: AttackConfig) -> None:
    """Refuse variations so small that the first draws of every behaviour leave its picture, or its text, as it is.

    Raises:
        UserError: Saying which of them.
    """
    draws = range(min(config.draws, _FIRST_DRAWS))
    for what, place in (("picture", 0), ("text", 1)):
        if config.vary in (what, "both") and not any(
            _changed(model, b, replace(config, vary=what), draw)[place] for b in behaviors for draw in draws
        ):
            raise UserError(
                f"`--strength {config.strength:g}` changes no {what} in the first {len(draws)} draws of "
                f"{len(behaviors)} behaviours, all of which would be one and the same try; give more."
            )


def _changed(model: ChatModel, behavior: Behavior, config: AttackConfig, draw: int) -> tuple[bool, bool]:
    """Whether one variation changes the picture, and the prompt."""
    canvas = cast("VisionModel", model).canvas
    clean = grey_canvas(canvas) if behavior.image is None else open_picture(behavior.image)
    picture, prompt = varied(behavior, clean, vary=config.vary, strength=config.strength, seed=config.seed, draw=draw)
    return picture.tobytes() != clean.tobytes(), prompt != behavior.prompt


def refuse_unsendable(
    subject: Subject, behaviors: Sequence[Behavior], prompts: Mapping[str, Sequence[ImportedPrompt]]
) -> None:
    """Refuse imported prompts that the model's template cannot write, or that are too long, before the first is sent.

    Raises:
        UserError: Naming the prompt's file and line, and the behaviour.
    """
    for b in behaviors:
        for number, prompt in enumerate(prompts.get(b.id, ())):
            asked = ask(subject, [b], prompts, number)
            try:
                encode(subject, asked.prompts, asked.pictures, [b.target])
            except UserError as error:
                told = str(error).removeprefix(f"{b.named} is ")
                raise UserError(f"{prompt.where}: the prompt of {b.id!r} cannot be sent: {told}") from error


def refuse_placeholders(behaviors: Sequence[Behavior], model: ChatModel) -> None:
    """Refuse texts that hold the model's image placeholder or another control token; targets that are calls may."""
    picture, tokenizer = model.processor.image_token, model.processor.tokenizer
    for behavior in behaviors:
        form = [] if behavior.form is None else [behavior.form.text, *behavior.form.words]
        said = [behavior.target] if behavior.call is None else []
        texts = behavior.prompt, *said, *_own_texts(behavior), *form
        if picture is not None and any(picture in text for text in texts):
            raise UserError(
                f"{behavior.named} must not hold the model's image placeholder `{picture}` in its texts; "
                "the picture is put in front of the prompt by itself."
            )
        for text in texts:
            try:
                refuse_control_tokens(text, tokenizer)
            except UserError as error:
                raise UserError(f"{behavior.named} cannot be asked: {error}") from error


def _own_texts(behavior: Behavior) -> list[str]:
    """What attacks read of a behaviour beside its prompt, target and form."""
    told = [str(behavior.extra[key]) for key in ("typographic_prompt", FACTS) if behavior.extra.get(key)]
    return [*told, *behavior.harmless]


def refuse_unsayable(behaviors: Sequence[Behavior], model: ChatModel, what: str = "behaviours") -> None:
    """Refuse texts that the model knows no part of, and harmless targets that it has no words for.

    No answer would ever be seen to start with the latter. Texts of which it knows less than half are said.
    """
    tokenizer = model.processor.tokenizer
    for behavior in behaviors:
        for name, text in (("target", behavior.target), ("prompt", behavior.prompt)):
            if not behavior.extra.get("benign_target") and _is_unknown(text, tokenizer):
                raise UserError(
                    f"{behavior.named}: `{model.name}` knows no part of its {name} {text!r:.80}, which is "
                    f"nothing but `{tokenizer.unk_token}` to it; write it in the model's language{_words(tokenizer)}, "
                    "or give another model."
                )
        if not behavior.extra.get("benign_target"):
            continue
        tokens = tokenizer(behavior.target, add_special_tokens=False).input_ids
        written = tokenizer.decode(tokens, skip_special_tokens=True)
        if not starts_with(written, behavior.target):
            raise UserError(
                f"{behavior.named}: `{model.name}` cannot write its target {behavior.target!r}, only "
                f"{written!r}; give targets in the model's own words: `mm-cb data build benign --targets FILE`."
            )
    given = ((b.named, (b.prompt, b.target, *_own_texts(b))) for b in behaviors)
    if told := note_of_unknown(tokenizer, given, what):
        say(told)


def _words(tokenizer: Any) -> str:
    """Of a model that knows few words, some of them from all over its vocabulary: its user cannot guess them."""
    words = sorted(word for word in tokenizer.get_vocab() if word.isalpha() and len(word) > 1)
    if not 8 <= len(words) <= _FEW_WORDS:
        return ""
    return f" ({len(words)} words, among them {', '.join(words[:: len(words) // 8])})"


def _is_unknown(text: str, tokenizer: Any) -> bool:
    """Whether a text is unknown tokens alone, perhaps behind the blank that some tokenizers begin with."""
    tokens = tokenizer(text, add_special_tokens=False).input_ids
    unknown = tokenizer.unk_token_id
    return unknown in tokens and all(token == unknown or not tokenizer.decode([token]).strip() for token in tokens)
