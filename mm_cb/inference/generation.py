"""Greedy completions from any engine, every request paid for once."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from PIL.Image import Image

from mm_cb.core.endpoint import REFUSED
from mm_cb.core.errors import UserError
from mm_cb.core.progress import Task
from mm_cb.core.runs import append_jsonl, read_jsonl
from mm_cb.inference.cached_chunks import chunks
from mm_cb.inference.subjects import Subject
from mm_cb.models import ChatModel
from mm_cb.models.chat import refuse_unwritable


class Picture(Protocol):
    """What a picture must do: a PIL image, or bytes that are decoded when their turn comes."""

    @property
    def size(self) -> tuple[int, int]:
        """Width and height."""

    def convert(self, mode: str) -> Image:
        """The decoded picture in a colour mode."""


@dataclass(frozen=True)
class Request:
    """One user's turn: the pictures, then the text."""

    key: str
    """Unique among the requests of a run."""
    text: str
    pictures: tuple[Picture, ...] = ()


class Failure(Protocol):
    """Why a request has no completion."""

    @property
    def kind(self) -> str:
        """``refused`` if this request would fail again and again; anything else may pass."""

    @property
    def reason(self) -> str:
        """One printable line."""


class Engine(Protocol):
    """Something that answers requests greedily."""

    def complete(self, requests: Sequence[Request], max_new_tokens: int) -> Iterator[tuple[str, str | Failure]]:
        """Key and completion of every request, each as soon as it is there, in any order."""


class LocalEngine:
    """A model in this process.

    Requests are sorted by length, longest first (memory runs out at once or not at all), and padded on the left. In
    float32 the completions do not depend on the batch size.

    Attributes:
        subject: Who answers.
        forward_passes: Calls of the model so far: per batch one for the prompt and one for each further token of the
            longest completion.
    """

    def __init__(self, subject: Subject, batch: int) -> None:
        """Answer as ``subject``, ``batch`` requests at a time."""
        self.subject = subject
        self._batch = batch
        self.forward_passes = 0

    def complete(self, requests: Sequence[Request], max_new_tokens: int) -> Iterator[tuple[str, str | Failure]]:
        """Completions batch by batch.

        Raises:
            UserError: If the accelerator's memory does not hold a batch.
        """
        import torch

        lengths = [prompt_tokens(self.subject.model, request) for request in requests]
        longest_first = sorted(range(len(requests)), key=lambda i: -lengths[i])
        hook = self.subject.model.base.register_forward_pre_hook(self._count)
        try:
            for group in chunks([requests[i] for i in longest_first], self._batch):
                completions = complete_batch(self.subject, group, max_new_tokens)
                yield from zip([request.key for request in group], completions, strict=True)
        except torch.OutOfMemoryError as e:
            raise UserError(
                f"the accelerator's memory does not hold {self._batch} of these requests at once; run the same command "
                "with a smaller `--batch`, finished answers are kept."
            ) from e
        finally:
            hook.remove()

    def _count(self, *_: Any) -> None:
        self.forward_passes += 1


def complete_batch(subject: Subject, requests: Sequence[Request], max_new_tokens: int) -> list[str]:
    """The subject's greedy completions of one batch, in order."""
    from mm_cb.models.chat import chat

    chats = [
        chat(request.text, images=len(request.pictures), system=system)
        for request, system in zip(requests, subject.systems(len(requests)), strict=True)
    ]
    pictures = [[picture.convert("RGB") for picture in request.pictures] for request in requests]
    with subject.active() as model:
        return model.generate(model.encode_chats(chats, pictures), max_new_tokens)


def prompt_tokens(model: ChatModel, request: Request) -> int:
    """Tokens of a request's text and pictures, without the template's; to sort by."""
    refuse_unwritable(request.text)
    tokens = len(model.processor.tokenizer(request.text, add_special_tokens=False)["input_ids"])
    if request.pictures:
        sizes = [(height, width) for width, height in (picture.size for picture in request.pictures)]
        tokens += sum(model.processor._get_num_multimodal_tokens(image_sizes=sizes)["num_image_tokens"])
    return tokens


def complete_all(
    engine: Engine, requests: Sequence[Request], store: Path, max_new_tokens: int, task: Task | None = None
) -> dict[str, str]:
    """Completions of all requests; those that ``store`` holds are not asked for again.

    Args:
        engine: Who answers.
        requests: With distinct keys.
        store: JSON lines, one per completion, written as they come; they survive a kill.
        max_new_tokens: Longest completion.
        task: Counts the requests.

    Returns:
        Key -> completion; the empty string for a request that the engine refuses (see `refusals`).

    Raises:
        UserError: If requests failed for a reason that may pass, or not one was answered; what was answered is kept.
    """
    done: dict[str, str] = {record["key"]: record["completion"] for record in read_jsonl(store)}
    failed: list[str] = []
    refused: dict[str, str] = {}
    for key, completion in engine.complete([r for r in requests if r.key not in done], max_new_tokens):
        if isinstance(completion, str):
            append_jsonl(store, {"key": key, "completion": completion})
            done[key] = completion
        elif completion.kind == REFUSED:
            refused[key] = completion.reason
        else:
            failed.append(completion.reason)
        if task is not None:
            task.advance()
    if failed:
        raise UserError(
            f"{len(failed)} of {len(requests)} requests failed, the first: {failed[0].rstrip('.')}. The other answers "
            "are kept: run the same command again."
        )
    if refused and not done:
        raise UserError(
            f"all {len(refused)} requests were refused, the first: {next(iter(refused.values())).rstrip('.')}; correct "
            "the settings or the server and run the same command again."
        )
    for key, reason in refused.items():  # last, so that a server that refuses everything leaves no answers behind
        append_jsonl(store, {"key": key, "completion": "", REFUSED: reason})
        done[key] = ""
    return {request.key: done[request.key] for request in requests}


def refusals(store: Path) -> list[str]:
    """Why requests were refused, one reason for each that counts as an empty answer."""
    return [record[REFUSED] for record in read_jsonl(store) if REFUSED in record]


def refusal_note(store: Path) -> str | None:
    """What to print about them, if there are any."""
    reasons = refusals(store)
    if not reasons:
        return None
    return f"CAUTION {len(reasons)} requests were refused and count as empty answers, the first: {reasons[0]}"
