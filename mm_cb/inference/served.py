"""Requests to a model that somebody else serves, and the choice between it and one in this process."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from mm_cb.core.endpoint import Endpoint, user_message
from mm_cb.core.errors import UserError
from mm_cb.core.workers import Workers
from mm_cb.data.pictures import shown
from mm_cb.inference.generation import Engine, Failure, LocalEngine, Request
from mm_cb.inference.source import ModelSource
from mm_cb.inference.subjects import Subject, load_subject


class EndpointEngine:
    """A model behind an OpenAI-compatible address, pictures included; many requests are under way at a time."""

    def __init__(self, endpoint: Endpoint) -> None:
        """Answer from ``endpoint``."""
        self._endpoint = endpoint

    def complete(self, requests: Sequence[Request], max_new_tokens: int) -> Iterator[tuple[str, str | Failure]]:
        """Greedy completions in the order in which they come; pictures are decoded when their turn comes.

        Raises:
            UserError: If a request has tools or an opening, which are for a model in this process alone.
        """
        if any(request.opening for request in requests):
            raise UserError("a served model cannot be made to begin an answer; leave that out, or drop `--endpoint`.")
        if any(request.tools for request in requests):
            raise UserError(
                "a served model is asked without tools; write them into the questions, or drop `--endpoint`."
            )
        asked = (
            (request.key, [user_message(request.text, [shown(picture) for picture in request.pictures])])
            for request in requests
        )
        return self._endpoint.map(asked, max_tokens=max_new_tokens, temperature=0.0)


def open_engine(source: ModelSource, name: str, batch: int, workers: Workers[Subject] | None = None) -> Engine:
    """Load the model, or take the one that ``workers`` hold, or point at the server that has it.

    Raises:
        UserError: If an adapter or a safety prompt should be put on a model that is not here.
    """
    if source.endpoint is None:
        return LocalEngine(load_subject(source, name) if workers is None else workers.held, batch, workers)
    if source.adapter is not None:
        raise UserError("`--adapter` is put on a model in this process: serve the merged model, or drop `--endpoint`.")
    if source.probe is not None:
        raise UserError("`--probe` looks into a model in this process: drop it, or `--endpoint`.")
    if source.system is not None:
        raise UserError("`--system` is put in front of requests to a model in this process; drop it or `--endpoint`.")
    if source.thinking:
        raise UserError("`--thinking` opens a chat template in this process: switch it on where the model is served.")
    return EndpointEngine(Endpoint(source.endpoint, source.model, concurrency=batch))
