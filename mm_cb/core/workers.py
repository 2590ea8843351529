"""Work on many pieces by whoever holds a model: this process, or the processes that Ray keeps, one a GPU.

With Ray every process holds one model. One of them leads: it runs the same code as a single process, and hands out the
pieces that this comes to. What the pieces leave is written as ever, so that a run goes on with or without Ray.
"""

from __future__ import annotations

import importlib
import logging
import os
import threading
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property
from typing import Any, Generic, Protocol, TypeVar

from mm_cb.core.errors import UserError, one_line
from mm_cb.core.user_code import users_fault

T = TypeVar("T")
Held = TypeVar("Held", covariant=True)
R = TypeVar("R")

EXTRA = "pip install -e '.[ray]'"
AUTO = "auto"
"""As many processes as Ray has GPUs, or on a CPU cores."""
_TRIES = 3
_GONE = "; what is finished is kept, the same command goes on"


class Workers(Protocol[Held]):
    """Who works on pieces."""

    @property
    def held(self) -> Held:
        """What each of them holds, here."""

    def map(self, work: Callable[..., R], pieces: Iterable[tuple[Any, ...]]) -> Iterator[R]:
        """``work(held, *piece)`` of every piece, in order."""


class Here(Generic[T]):
    """This process alone."""

    def __init__(self, held: T) -> None:
        """Work with ``held``."""
        self.held = held

    def map(self, work: Callable[..., R], pieces: Iterable[tuple[Any, ...]]) -> Iterator[R]:
        """One piece after another."""
        return (work(self.held, *piece) for piece in pieces)


def _refuse(asked: str, device: str) -> None:
    """Refuse what stands behind ``--ray``, or beside it, before anything is started."""
    if asked != AUTO and not (asked.isascii() and asked.isdecimal() and int(asked)):
        raise UserError(f"`--ray` must be a number of processes from 1, or nothing, got `{asked}`.")
    if device not in ("cpu", "cuda"):
        raise UserError(
            f"`--ray` gives every process a GPU of its own: `--device` must be cuda, or cpu, got `{device}`."
        )
    _imported()


def lead_on_ray(asked: str, device: str, load: Callable[[], T], work: Callable[[Workers[T]], R]) -> R:
    """Let one of Ray's processes do ``work`` with the help of all.

    A process that dies is started again, and its piece is given to the next that is free. If the one that leads dies,
    all are started again.

    Args:
        asked: How many processes, or `AUTO`.
        device: ``cuda``: a GPU for each; ``cpu``: a core for each.
        load: Makes what each holds, in each.
        work: What the leading one does; it goes on where it was stopped.

    Raises:
        UserError: If Ray is not installed or has fewer GPUs or cores than were asked for, ``asked`` is no number, the
            device is one of several, or Ray's processes died again and again.
    """
    _refuse(asked, device)
    with _connected() as ray:
        kind = "GPU" if device == "cuda" else "CPU"
        count = _count(asked, kind, int(ray.cluster_resources().get(kind, 0)))
        remote = ray.remote(concurrency_groups={"lead": 1})(_worker_class(ray))
        make = remote.options(num_cpus=1, num_gpus=int(kind == "GPU"), max_restarts=-1)
        died = ""
        for _ in range(_TRIES):
            workers = [make.remote(os.getcwd(), load) for _ in range(count)]
            try:
                return _result(ray, workers[0].lead.remote(work, workers))
            except ray.exceptions.RayError as error:
                died = one_line(str(error))
            finally:
                for worker in workers:
                    ray.kill(worker)
        raise UserError(f"the leading process of `--ray` died {_TRIES} times, the last time so: {died:.300}{_GONE}.")


def _count(asked: str, kind: str, there: int) -> int:
    count = there if asked == AUTO else int(asked)
    if not 1 <= count <= there:
        wanted = "a" if asked == AUTO else asked
        raise UserError(
            f"`--ray` needs {wanted} {kind}{'s' * (count > 1)}, Ray has {there}: ask for no more, take another "
            "`--device`, or set RAY_ADDRESS to a cluster that has them."
        )
    return count


def _imported() -> Any:
    try:
        return importlib.import_module("ray")
    except ImportError as error:
        raise UserError(f"`--ray` needs the `ray` extra: {EXTRA}.") from error


@contextmanager
def _connected() -> Iterator[Any]:
    """Ray, connected to the cluster of RAY_ADDRESS, or started on this machine; nothing is reported to anybody.

    Until then Ray says only what is an error; from then on it warns, as of processes that died.
    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    ray = _imported()
    given = os.environ.get("RAY_ADDRESS")
    try:
        place = {"address": "auto"} if given else {"address": "local", "include_dashboard": False}
        ray.init(**place, logging_level=logging.ERROR)
    except (OSError, RuntimeError, ValueError) as error:
        where = f"the cluster of RAY_ADDRESS (`{given}`)" if given else "a Ray of its own on this machine"
        raise UserError(f"`--ray` must reach {where}: {one_line(str(error)):.300}") from error
    logging.getLogger("ray").setLevel(logging.WARNING)
    try:
        yield ray
    finally:
        ray.shutdown()


def _result(ray: Any, reference: Any) -> Any:
    """What a call came to, or the error that it ended with over there."""
    try:
        return ray.get(reference)
    except ray.exceptions.RayTaskError as error:
        raise error.cause from error


def _worker_class(ray: Any) -> type[_Worker]:
    """The class as Ray takes it: leading is done beside one's own pieces, and a roll call waits for a restart."""
    _Worker.lead = ray.method(concurrency_group="lead")(_Worker.lead)  # type: ignore[method-assign]
    _Worker.here = ray.method(max_task_retries=-1)(_Worker.here)  # type: ignore[method-assign]
    return _Worker


@contextmanager
def _told() -> Iterator[None]:
    """Say here what is wrong in a file of the user's: over there nobody sees any more where an error comes from."""
    try:
        yield
    except Exception as error:
        if (fault := users_fault(error)) is not None:
            raise UserError(fault) from error
        raise


class _Worker:
    """One of Ray's processes."""

    def __init__(self, folder: str, load: Callable[[], Any]) -> None:
        os.chdir(folder)
        self._load = load
        self._loading = threading.Lock()

    @cached_property
    def _loaded(self) -> Any:
        return self._load()

    def held(self) -> Any:
        with self._loading:
            return self._loaded

    def here(self) -> None:
        self.held()

    def do(self, work: Callable[..., R], *piece: Any) -> R:
        with _told():
            return work(self.held(), *piece)

    def lead(self, work: Callable[[Workers[Any]], R], workers: Sequence[Any]) -> R:
        with _told():
            return work(_Led(self, workers))


class _Led:
    """All of Ray's processes, in the one that leads, which is one of them."""

    def __init__(self, own: _Worker, workers: Sequence[Any]) -> None:
        self._own, self._workers = own, workers

    @cached_property
    def held(self) -> Any:
        for worker in self._workers:
            worker.here.remote()  # they load while this one does
        return self._own.held()

    def map(self, work: Callable[..., R], pieces: Iterable[tuple[Any, ...]]) -> Iterator[R]:
        ray = _imported()
        given, results, deaths = list(pieces), dict[int, R](), Counter[int]()
        waiting, free, first = deque(range(len(given))), list(self._workers), 0
        running: dict[Any, tuple[Any, int | None]] = {}
        while first < len(given):
            while waiting and free:
                worker, number = free.pop(), waiting.popleft()
                running[worker.do.remote(work, *given[number])] = worker, number
            if not running:
                raise UserError(f"no process of `--ray` is left{_GONE}.")
            (reference,), _ = ray.wait([*running], num_returns=1)
            worker, done = running.pop(reference)
            try:
                result = _result(ray, reference)
            except ray.exceptions.RayError as error:
                if done is None:
                    continue  # nothing will start it again
                deaths[done] += 1
                if deaths[done] == _TRIES:
                    raise UserError(
                        f"{_TRIES} processes of `--ray` died on one piece of work, the last so: "
                        f"{one_line(str(error)):.300}{_GONE}, perhaps with a smaller `--batch`."
                    ) from error
                waiting.appendleft(done)
                running[worker.here.remote()] = worker, None
                continue
            free.append(worker)
            if done is not None:
                results[done] = result
            while first in results:
                yield results.pop(first)
                first += 1
