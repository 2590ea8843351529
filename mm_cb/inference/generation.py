"""Greedy completions from any engine, every request paid for once."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from mm_cb.core.chat_replies import CUT, REFUSED
from mm_cb.core.checked import read_records
from mm_cb.core.endpoint import EndpointError, UnfitModelError
from mm_cb.core.errors import UserError
from mm_cb.core.progress import CountedWork
from mm_cb.core.records import Completion, JsonObject
from mm_cb.core.runs import append_jsonl
from mm_cb.core.thoughts import AnswerText, answer_in, ending_as
from mm_cb.core.workers import Here, Workers
from mm_cb.data.pictures import Picture, shown
from mm_cb.inference.cached_chunks import chunks
from mm_cb.inference.subjects import Subject
from mm_cb.inference.unanswered import go_on, unanswered
from mm_cb.models import ChatModel
from mm_cb.models.chat import refuse_text


@dataclass(frozen=True)
class Request:
    """One user's turn: the pictures, then the text."""

    key: str
    """Unique among the requests of a run."""
    text: str
    pictures: tuple[Picture, ...] = ()
    tools: tuple[JsonObject, ...] = ()
    """JSON schemas of functions; for a model in this process whose template takes them."""
    opening: str = ""
    """How the answer must begin, part of the completion then; for a model in this process."""
    published: bool = False
    """Whether it is of a data set that nobody here can mend: what the model cannot be sent is then left out."""


class UnaskableError(UserError):
    """A model in this process cannot be sent a request: too long, or it spells a token of the model's own."""

    kind = REFUSED

    def __init__(self, request: Request, why: str) -> None:
        """Say which and why."""
        self.request, self.reason = request, f"request `{request.key}` {why}"
        super().__init__(self.reason)
        self._why = why

    def __reduce__(self) -> tuple[type, tuple[Request, str]]:
        """As it is made again in another process."""
        return type(self), (self.request, self._why)


class Failure(Protocol):
    """Why a request has no completion."""

    @property
    def kind(self) -> str:
        """``refused`` or ``cut`` if this request alone has no answer; anything else ends the run, and may pass."""

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

    def __init__(self, subject: Subject, batch: int, workers: Workers[Subject] | None = None) -> None:
        """Answer as ``subject``, ``batch`` requests at a time; with ``workers`` several batches side by side."""
        self.subject = subject
        self.workers = workers or Here(subject)
        self._batch = batch
        self.forward_passes = 0

    def complete(self, requests: Sequence[Request], max_new_tokens: int) -> Iterator[tuple[str, str | Failure]]:
        """Completions batch by batch, those that cannot be asked first.

        Raises:
            UnaskableError: If a request cannot be asked that can be mended.
            UserError: If the accelerator's memory does not hold a batch.
        """
        import torch

        lengths: list[int] = []
        askable: list[Request] = []
        for request in requests:
            try:
                lengths.append(prompt_tokens(self.subject.model, request))
                askable.append(request)
            except UnaskableError as error:
                yield request.key, _left_out(error)
        longest_first = sorted(range(len(askable)), key=lambda i: -lengths[i])
        thinks = self.subject.model.thinking and self.subject.model.thinking_switch is not None
        groups = chunks([askable[i] for i in longest_first], self._batch)
        try:
            for answers, passes in self.workers.map(_answered, [(group, max_new_tokens, thinks) for group in groups]):
                self.forward_passes += passes
                yield from answers
        except torch.OutOfMemoryError as e:
            raise UserError(
                f"the accelerator's memory does not hold {self._batch} of these requests at once; run the same command "
                "with a smaller `--batch`, finished answers are kept."
            ) from e


def _answered(
    subject: Subject, requests: Sequence[Request], max_new_tokens: int, thinks: bool
) -> tuple[list[tuple[str, str | Failure]], int]:
    """Key and completion of one batch, those that cannot be asked first, and how often the model was called."""
    group, answers, passes = list(requests), list[tuple[str, str | Failure]](), 0

    def count(*_: Any) -> None:
        nonlocal passes
        passes += 1

    hook = subject.model.base.register_forward_pre_hook(count)
    try:
        while group:
            try:
                completions = complete_batch(subject, group, max_new_tokens)
            except UnaskableError as error:
                answers.append((error.request.key, _left_out(error)))
                group.remove(error.request)
                continue
            said = zip(group, completions, strict=True)
            answers += [(request.key, answer_in(text, opened=thinks)) for request, text in said]
            break
    finally:
        hook.remove()
    return answers, passes


def _left_out(error: UnaskableError) -> UnaskableError:
    """What stands for the answer to a published request that cannot be asked.

    Raises:
        UnaskableError: If whoever asks can mend it.
    """
    if not error.request.published:
        raise error
    return error


def complete_batch(subject: Subject, requests: Sequence[Request], max_new_tokens: int) -> list[str]:
    """The subject's greedy completions of one batch, in order.

    Raises:
        UnaskableError: If a request has more tokens than the model has positions.
    """
    from mm_cb.models.chat import chat

    chats = [
        chat(request.text, images=len(request.pictures), system=system)
        for request, system in zip(requests, subject.systems(len(requests)), strict=True)
    ]
    pictures = [[shown(picture) for picture in request.pictures] for request in requests]
    with subject.active() as model:
        tools, openings = [request.tools for request in requests], [request.opening for request in requests]
        inputs = model.encode_chats(chats, pictures, tools=tools, openings=openings)
        if found := model.overlong(inputs):
            row, told = found
            raise UnaskableError(requests[row], f"is {told} Shorten it, or leave it out.")
        said = model.generate(inputs, max_new_tokens)
    return [ending_as(opening + more, more) for opening, more in zip(openings, said, strict=True)]


def prompt_tokens(model: ChatModel, request: Request) -> int:
    """Tokens of a request's text and pictures, without the template's; to sort by.

    Raises:
        UnaskableError: If the text spells one of the model's own tokens, or is none.
    """
    try:
        for text in (request.text, *(json.dumps(tool, ensure_ascii=False) for tool in request.tools)):
            refuse_text(text, model.dialect, model.processor.tokenizer)
    except UserError as error:
        raise UnaskableError(request, f"cannot be asked: {error}") from error
    tokens = len(model.processor.tokenizer(request.text, add_special_tokens=False)["input_ids"])
    if request.pictures:
        sizes = [(height, width) for width, height in (picture.size for picture in request.pictures)]
        tokens += sum(model.processor._get_num_multimodal_tokens(image_sizes=sizes)["num_image_tokens"])
    return tokens


def complete_all(
    engine: Engine, requests: Sequence[Request], store: Path, max_new_tokens: int, task: CountedWork | None = None
) -> dict[str, AnswerText]:
    """Completions of all requests; those that ``store`` holds are not asked for again.

    Args:
        engine: Who answers.
        requests: With distinct keys.
        store: JSON lines, one per completion, written as they come; they survive a kill.
        max_new_tokens: Longest completion.
        task: Counts the requests.

    Returns:
        Key -> completion, without the thought in front of it, which `store` holds too; the empty string where there is
        none, see `unanswered`: it is not what the model said.

    Raises:
        UserError: If requests failed on the engine's side, or not one was answered; what was answered is kept, and the
            same command goes on.
    """
    done: dict[str, AnswerText] = {record["key"]: _kept(record) for record in read_records(store, Completion)}
    waiting = [request for request in requests if request.key not in done]
    failed: list[str] = []
    refused: dict[str, str] = {}
    try:
        for key, completion in engine.complete(waiting, max_new_tokens):
            if isinstance(completion, str) or completion.kind == CUT:
                done[key] = _keep(store, key, completion)
            elif completion.kind == REFUSED:
                refused[key] = completion.reason
            else:
                failed.append(completion.reason)
            if task is not None:
                task.advance()
    except UnfitModelError:
        raise
    except EndpointError as e:
        raise EndpointError(f"{str(e).rstrip('.')}. {go_on(store, len(requests), max_new_tokens)}") from e
    if failed:
        raise UserError(
            f"{len(failed)} of {len(requests)} requests failed, the first: {failed[0].rstrip('.')}. The other answers "
            "are kept: run the same command again."
        )
    lost = refused | {key: reason for key, (_, reason) in unanswered(store).items()}
    if requests and len(lost) == len(done | refused):
        raise UserError(
            f"all {len(lost)} requests are without an answer, the first: {next(iter(lost.values())).rstrip('.')}. "
            f"{go_on(store, len(requests), max_new_tokens)}"
        )
    for key, reason in refused.items():  # last, so that a server that refuses everything leaves nothing behind
        append_jsonl(store, {"key": key, "completion": "", REFUSED: reason})
        done[key] = AnswerText("")
    return {request.key: done[request.key] for request in requests}


def _keep(store: Path, key: str, completion: str | Failure) -> AnswerText:
    """Write what a request came to, its thought beside it; an answer that had not begun is none."""
    reason = "" if isinstance(completion, str) else completion.reason
    answer = AnswerText("") if not isinstance(completion, str) else completion
    answer = answer if isinstance(answer, AnswerText) else answer_in(answer)
    if answer.cut:
        reason = "the answer ends in the middle of a thought, or at the limit of tokens right behind one."
        answer = AnswerText("", answer.thought)
    more: dict[str, str | bool] = {"thought": answer.thought} if answer.thought else {}
    more |= {"refusal": True} if answer.refusal else {}
    more |= {"served": answer.served} if answer.served else {}
    more |= {"at_limit": True} if answer.at_limit else {}
    append_jsonl(store, {"key": key, "completion": answer} | more | ({CUT: reason} if reason else {}))
    return answer


def _kept(record: Completion) -> AnswerText:
    answer = answer_in(record["completion"], beside=record.get("thought", ""))
    refusal, served, cut = record.get("refusal", False), record.get("served", ""), record.get("at_limit", False)
    return AnswerText(answer, answer.thought, refusal=refusal, served=served, at_limit=cut)
