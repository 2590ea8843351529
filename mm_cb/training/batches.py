"""The order of a run's rows, fixed beforehand, and how they become batches."""

from collections.abc import Hashable, Iterator, Mapping, Sequence
from itertools import islice
from typing import TYPE_CHECKING, Literal, NamedTuple, TypedDict, get_args

import torch
from torch import Tensor
from torch.utils.data import Dataset

from mm_cb.core.errors import UserError
from mm_cb.data.examples import SETS, Example, Modality, OnUnreadable, SetName, kinds_of, opened, rows_of
from mm_cb.models import ChatModel, ModelInputs
from mm_cb.training.masks import MaskName, loss_mask, without_ends
from mm_cb.training.openings import Openings

if TYPE_CHECKING:
    from mm_cb.training.rr_config import RRConfig

Batches = Literal["alternate", "text", "multimodal"]
HELD_OUT = 8
"""Pairs of each modality that are held out where nobody says how many, and rows are enough."""


class RowPair(NamedTuple):
    """One row of each set, both of the same modality."""

    circuit_breaker: Example
    retain: Example


class MissingRows(ValueError):
    """The data holds no row of a set and modality that the run needs."""


class PairedExamples(Dataset[RowPair]):
    """All rows of a run in the order they are used: ``batch_size`` pairs per optimiser step, all of one modality.

    With ``alternate``, even steps are text and odd steps multimodal. The examples of each set and modality are shuffled
    by the seed, and again whenever they have all been used. Read in order, a run can stop and go on anywhere: row i
    depends on nothing but i.

    Attributes:
        on_unreadable: Told of examples that others stand in for; None = such an example is an error when it is encoded.
    """

    def __init__(
        self,
        examples: Sequence[Example],
        *,
        steps: int,
        batch_size: int,
        batches: Batches,
        seed: int,
        among: Sequence[int] | None = None,
        on_unreadable: OnUnreadable | None = None,
    ) -> None:
        """Draw the order; examples are read when their turn comes.

        Args:
            examples: What to draw from, perhaps a mixture that lies on disk.
            steps: Optimiser steps of the run.
            batch_size: Pairs per step.
            batches: The modalities, in turn or one alone.
            seed: Decides the order.
            among: Indices of the examples that may be drawn; None = all.
            on_unreadable: Told of examples whose picture cannot be read; the next one of the order stands in for each.
                None = such an example is an error when it is encoded.

        Raises:
            MissingRows: If a set has no example of a modality that the run needs.
        """
        self.batch_size = batch_size
        self._modalities = _modalities(batches)
        rows = -(-steps // len(self._modalities)) * batch_size
        generator = torch.Generator().manual_seed(seed)
        kinds = kinds_of(examples)
        indices = range(len(examples)) if among is None else among
        self._examples = examples
        self._rows = {
            (name, modality): _draw([i for i in indices if kinds[i] == (name, modality)], rows, generator)
            for name in get_args(SetName)
            for modality in self._modalities
        }
        for (name, kind), drawn in self._rows.items():
            if not drawn:
                both = [one for one in get_args(Modality) if all((side, one) in kinds for side in get_args(SetName))]
                instead = f", or set `batches={both[0]}`, the kind that both sets have" if both else ""
                raise MissingRows(
                    f"The data must hold {kind} examples of the {name} set, it holds none: add some{instead}."
                )
        self._length = steps * batch_size
        self.on_unreadable = on_unreadable

    def drawn(self) -> Iterator[Example]:
        """Every example of the order, once."""
        yield from (self._examples[index] for index in sorted({i for rows in self._rows.values() for i in rows}))

    def __len__(self) -> int:
        """Pairs in the whole run."""
        return self._length

    def __getitem__(self, index: int) -> RowPair:
        """The pair at a place in the run."""
        step, place = divmod(index, self.batch_size)
        modality = self._modalities[step % len(self._modalities)]
        row = step // len(self._modalities) * self.batch_size + place
        return RowPair(*(self._readable(self._rows[name, modality], row) for name in get_args(SetName)))

    def first_of_each_modality(self, count: int) -> list[list[RowPair]]:
        """The first ``count`` pairs of each modality that the run has, at most a step's."""
        turns = range(min(len(self._modalities), self._length // self.batch_size))
        return [
            [self[turn * self.batch_size + place] for place in range(min(count, self.batch_size))] for turn in turns
        ]

    def _readable(self, drawn: Sequence[int], row: int) -> Example:
        """The example at a place of an order, or the next one whose pictures can be read."""
        if self.on_unreadable is None:
            return self._examples[drawn[row]]
        for index in dict.fromkeys([*drawn[row:], *drawn[:row]]):
            example = opened(self._examples[index], self.on_unreadable)
            if example is not None:
                return example
        raise UserError("not one picture of the rows to train on can be read; `mm-cb data check` names them.")


def drawn(
    examples: Sequence[Example], settings: "RRConfig", on_unreadable: OnUnreadable | None = None
) -> tuple[PairedExamples, list[RowPair]]:
    """The rows of a run in their order, and the pairs that are held out.

    Raises:
        MissingRows: If a set has no example of a modality that the run needs.
        UserError: If too many rows were to be held out, or none can be that the run needs.
    """
    among, held_out = hold_out(examples, settings.held_out, settings.seed, settings.batches, on_unreadable)
    if settings.stop_at_cosine is not None and not held_out:
        raise UserError(
            "`training.stop_at_cosine` needs held-out rows, and these are too few: give 2 or more of each set."
        )
    rows = PairedExamples(
        examples,
        steps=settings.max_steps,
        batch_size=settings.batch_size,
        batches=settings.batches,
        seed=settings.seed,
        among=among,
        on_unreadable=on_unreadable,
    )
    return rows, held_out


class SetRows(TypedDict):
    """The rows of one set in a batch, padded to the longest of them."""

    inputs: ModelInputs
    mask: Tensor
    """1 for tokens that count in the loss, ``(B, T)``."""
    ids: list[str]
    """Of the examples."""
    lengths: list[int]
    """Real tokens of each row."""
    counted: list[int]
    """Those of them that count in the loss."""


class Batch(TypedDict, total=False):
    """What the trainer's loss takes: rows of both sets, or a part of them of one."""

    modality: Modality
    circuit_breaker: SetRows
    retain: SetRows


class PairCollator:
    """Collator of pairs, for the trainer's loss.

    Attributes:
        openings: How retain rows begin, if that is left out of what is rerouted.
    """

    def __init__(
        self,
        model: ChatModel,
        masks: Mapping[Modality, MaskName],
        openings: Openings | None = None,
        *,
        count_ends: bool = True,
    ) -> None:
        """Encode for a model.

        Args:
            model: The model.
            masks: Which tokens count in rows of each modality.
            openings: How retain rows begin, which is not to be rerouted; None = it is (paper).
            count_ends: Whether the tokens that end answers count in circuit-breaker rows.
        """
        self._model = model
        self._masks = masks
        self.openings = openings
        self._count_ends = count_ends

    def __call__(self, pairs: Sequence[RowPair]) -> Batch:
        """Encode the pairs of one (micro-)batch, on the CPU.

        Raises:
            UserError: If an example cannot be encoded, or none of its tokens would count.
        """
        modality = pairs[0].circuit_breaker.modality
        sets = {name: self._rows(name, [getattr(pair, name) for pair in pairs], modality) for name in SETS}
        return {"modality": modality, "circuit_breaker": sets["circuit_breaker"], "retain": sets["retain"]}

    def _rows(self, name: SetName, examples: Sequence[Example], modality: Modality) -> SetRows:
        images = [example.open_images() for example in examples]
        ids = [example.id for example in examples]
        try:
            chats, tools = ([getattr(example, name) for example in examples] for name in ("messages", "tools"))
            inputs = self._model.encode_chats(chats, images, padding_side="right", tools=tools, device="cpu")
            mask, lengths = loss_mask(inputs, self._masks[modality]), inputs.attention_mask.sum(-1).tolist()
        except (UserError, ValueError) as error:
            places = ", ".join(str(example.place or example.id) for example in examples)
            raise UserError(f"cannot train on the {name} examples at {places}: {error}") from error
        if name == "circuit_breaker" and not self._count_ends:
            mask = self._without_ends(inputs, mask, ids)
        if name == "circuit_breaker" and self.openings is not None:
            mask = self.openings.leave_out(inputs, mask)
        return {"inputs": inputs, "mask": mask, "ids": ids, "lengths": lengths, "counted": mask.sum(-1).tolist()}

    def _without_ends(self, inputs: ModelInputs, mask: Tensor, ids: Sequence[str]) -> Tensor:
        if (end := self._model.dialect.end_of_turn) is None:
            return mask
        left = without_ends(inputs, mask, self._model.processor.tokenizer.convert_tokens_to_ids(end))
        if empty := [id_ for id_, row in zip(ids, left, strict=True) if not row.any()]:
            raise UserError(
                f"of the circuit_breaker example {empty[0]} nothing but the end of an answer would count; give it an "
                "answer, or set `circuit_breaker.answer_ends` to counted."
            )
        return left


def split_batch(batch: Batch, tokens_per_pass: int) -> list[Batch]:
    """Cut what the collator makes into parts of one set and at most ``tokens_per_pass`` real tokens, or one row."""
    parts: list[Batch] = []
    for name in SETS:
        rows = batch[name]
        lengths = rows["lengths"]
        start = 0
        while start < len(lengths):
            stop = start + 1
            while stop < len(lengths) and sum(lengths[start : stop + 1]) <= tokens_per_pass:
                stop += 1
            part: Batch = {}
            part[name] = {
                "inputs": rows["inputs"].rows(start, stop),
                "mask": rows["mask"][start:stop],
                "ids": rows["ids"][start:stop],
                "lengths": lengths[start:stop],
                "counted": rows["counted"][start:stop],
            }
            parts.append(part)
            start = stop
    return parts


def hold_out(
    examples: Sequence[Example],
    pairs: int | None,
    seed: int,
    batches: Batches,
    on_unreadable: OnUnreadable | None = None,
) -> tuple[list[int], list[RowPair]]:
    """Set rows aside that are never trained on, with every copy that a mixture makes of them.

    Args:
        examples: All.
        pairs: How many pairs of each modality; None = `HELD_OUT`, or half of the rows where that is less.
        seed: Decides which.
        batches: The modalities of the run.
        on_unreadable: Told of examples whose picture cannot be read; others are set aside. None = they are set aside,
            too.

    Returns:
        Indices of the examples of other rows, and ``pairs`` pairs of each modality (fewer if pictures are unreadable).

    Raises:
        UserError: If that is more than half of the rows of a set and modality.
    """
    if pairs == 0:
        return list(range(len(examples))), []
    generator = torch.Generator().manual_seed(seed)
    rows = rows_of(examples)
    first: dict[Hashable, int] = {}
    for index, row in enumerate(rows):
        first.setdefault(row, index)
    kinds, aside = kinds_of(examples), list[tuple[int, ...]]()
    for modality in _modalities(batches):
        pools = [[i for i in first.values() if kinds[i] == (name, modality)] for name in get_args(SetName)]
        wanted = _held_out(pairs, modality, pools)
        orders = [[pool[i] for i in torch.randperm(len(pool), generator=generator).tolist()] for pool in pools]
        usable = [(i for i in order if on_unreadable is None or opened(examples[i], on_unreadable)) for order in orders]
        aside += zip(*(list(islice(one, wanted)) for one in usable), strict=False)
    kept_back = {rows[index] for pair in aside for index in pair}
    others = [index for index, row in enumerate(rows) if row not in kept_back]
    return others, [RowPair(*(examples[index] for index in pair)) for pair in aside]


def _held_out(pairs: int | None, modality: Modality, pools: Sequence[Sequence[int]]) -> int:
    """How many pairs are set aside, never most of what there is to train on; that there is nothing, others say."""
    if pairs is None:
        return min(HELD_OUT, *(len(pool) // 2 for pool in pools))
    for name, pool in zip(get_args(SetName), pools, strict=True):
        if pool and 2 * pairs > len(pool):
            raise UserError(
                f"`training.held_out` must be at most half of the rows, got {pairs} of {len(pool)} {modality} rows of "
                f"the {name} set; lower it, or set it to 0 (none) or null (what fits)."
            )
    return pairs


def _modalities(batches: Batches) -> list[Modality]:
    """The modalities of a run's steps, in turn."""
    return list(get_args(Modality)) if batches == "alternate" else [batches]


def _draw(pool: Sequence[int], rows: int, generator: torch.Generator) -> list[int]:
    """``rows`` of the pool's indices in shuffled rounds; none of none."""
    order: list[int] = []
    while pool and len(order) < rows:
        order += torch.randperm(len(pool), generator=generator).tolist()
    return [pool[i] for i in order[:rows]]
