"""Whether a model can take a row: its template writes it, and `max_length` leaves its pictures and what counts."""

from collections.abc import Mapping, Sequence
from typing import Any

from mm_cb.core.errors import UserError
from mm_cb.core.records import JsonObject
from mm_cb.data.examples import Example, Modality
from mm_cb.data.scan import texts_of
from mm_cb.data.sources import RowFault
from mm_cb.data.unknown import Words
from mm_cb.models import ChatModel, ModelInputs
from mm_cb.models.cache import model_folder
from mm_cb.models.chat import Message, control_token, render_chat
from mm_cb.models.decoding import learned_positions
from mm_cb.models.families import has_tokenizer, load_processor, read_config, skeleton
from mm_cb.models.inputs import pad_rows
from mm_cb.models.templates import check_template
from mm_cb.training.batches import Batches
from mm_cb.training.masks import MaskName, loss_mask


def fit_of(
    model: str, max_length: int, masks: Mapping[Modality, MaskName], batches: Batches, image_backend: str
) -> "Fit | None":
    """The judgement of a model's processor; None where it is not on this machine.

    Args:
        model: Its name.
        max_length: Tokens that are kept of a row, image tokens not counted.
        masks: Which tokens count in rows of each modality.
        batches: The modalities of the run; rows of no other are judged.
        image_backend: Of the image processor.

    Raises:
        UserError: If it is here and cannot be used.
    """
    try:
        folder = model_folder(model)
    except UserError:
        return None
    if not has_tokenizer(folder):
        return None
    config = read_config(model)
    shell = skeleton(config, model, load_processor(model, config, image_backend))
    check_template(shell, folder)
    return Fit(shell, max_length, {kind: mask for kind, mask in masks.items() if batches in ("alternate", kind)})


class Fit:
    """Judges rows as the collator will, by the same steps, but without the pictures, whose tokens do not count.

    All tokens of a picture are kept, so that only the texts in front of the last one decide whether it is cut off.
    """

    def __init__(self, model: ChatModel, max_length: int, masks: Mapping[Modality, MaskName]) -> None:
        """Judge for ``model``, of which the processor and the configuration are used."""
        self._model, self._max_length, self._masks = model, max_length, masks
        self._tokenizer = getattr(model.processor, "tokenizer", model.processor)
        self._words = Words(self._tokenizer)
        self._overheads: dict[Any, int] = {}
        limit = learned_positions(model.model)
        self._positions = None if limit is None or limit >= max_length else limit

    def __call__(self, example: Example) -> RowFault | None:
        """What is wrong with an example; None if the model can take it."""
        mask = self._masks.get(example.modality)
        controls = (control_token(text, self._tokenizer) for text in texts_of(example))
        if mask and (token := next(filter(None, controls), None)):
            told = "leave it out, or write it with a blank inside"
            return RowFault("control token", f"a text holds `{token}`, a control token of `{self._model.name}`; {told}")
        sure = self._positions is None and not example.tools
        if mask is None:
            return None
        surely = sure and self._surely(example.messages, mask)
        try:
            if surely:
                render_chat(self._model.processor, example.messages, dialect=self._model.dialect)
                return None
            tokens = self._encode(example.messages, mask, None, example.tools)
        except (UserError, ValueError) as error:
            return RowFault("broken row", f"`{self._model.name}` cannot take it: {str(error).rstrip('.')}")
        if tokens > self._max_length:
            try:
                tokens = self._encode(example.messages, mask, self._max_length, example.tools)
            except (UserError, ValueError) as error:
                return RowFault("too long", f"`max_length` is {self._max_length}: {str(error).rstrip('.')}")
        if self._positions is not None and tokens > self._positions:
            told = f"it has {tokens} tokens, `{self._model.name}` has {self._positions} positions"
            return RowFault("broken row", f"{told}; set `training.max_length={self._positions}`")
        return None

    def mostly_unknown(self, example: Example) -> str | None:
        """The token for what the tokenizer does not know, where at least half of a text of the example comes to it."""
        return self._words.mostly_unknown(texts_of(example)) if example.modality in self._masks else None

    def length(self, text: str) -> int:
        """Tokens of a text, with those that the tokenizer puts around it."""
        return self._words.length(text)

    def _encode(
        self, messages: Sequence[Message], mask: MaskName, max_length: int | None, tools: Sequence[JsonObject] = ()
    ) -> int:
        """Encode as the collator does; returns the tokens of the row."""
        self._model.max_length = max_length
        rendered = render_chat(self._model.processor, messages, dialect=self._model.dialect, tools=tools)
        inputs = ModelInputs(*pad_rows([self._model._tokenise(rendered)], 0, "right"))
        loss_mask(inputs, mask)
        return inputs.input_ids.shape[1]

    def _surely(self, messages: Sequence[Message], mask: MaskName) -> bool:
        """Whether so few bytes stand in front of what must stay that no tokenizer makes too many tokens of them."""
        parts = [(turn["role"], part) for turn in messages for part in _parts(turn)]
        kinds = [(role, part["type"]) for role, part in parts]
        texts = [part["text"] for _, part in parts if part["type"] == "text"]
        special = {self._model.dialect.image_token, self._model.dialect.soft_token} - {None}
        if any(str(token) in text for text in texts for token in special):
            return False
        kept = max((place for place, (_, kind) in enumerate(kinds) if kind == "image"), default=0)
        if mask == "completion":
            kept = max(kept, kinds.index(("assistant", "text")))  # of which the first token is enough
        before = [part["text"] for _, part in parts[:kept] if part["type"] == "text"]
        needed = sum(len(text.encode()) + 1 for text in before)
        return needed + self._overhead(messages, mask, tuple(kinds)) < self._max_length

    def _overhead(self, messages: Sequence[Message], mask: MaskName, kinds: Any) -> int:
        """Tokens of a row of this shape that says next to nothing; more than any `max_length` if there is none such."""
        key = mask, kinds
        if key not in self._overheads:
            short = [{**turn, "content": [_shortened(part) for part in _parts(turn)]} for turn in messages]
            try:
                self._overheads[key] = self._encode(short, mask, None)
            except (UserError, ValueError):
                self._overheads[key] = self._max_length
        return self._overheads[key]


def _parts(turn: Message) -> list[Message]:
    content = turn["content"]
    return [{"type": "text", "text": content}] if isinstance(content, str) else content


def _shortened(part: Message) -> Message:
    return part if part["type"] == "image" else {"type": "text", "text": "a"}
