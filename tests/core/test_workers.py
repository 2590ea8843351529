"""Pieces of work by several processes: in order, and those of a process that dies come back."""

import logging
import sys
from types import SimpleNamespace

import pytest

from mm_cb.core import workers as module
from mm_cb.core.errors import UserError
from mm_cb.core.workers import Here, lead_on_ray


class Died(Exception):
    pass


class TaskError(Exception):
    def __init__(self, cause):
        super().__init__(str(cause))
        self.cause = cause


class Process:
    """A stand-in for one of Ray's: dies of the pieces that it is told, and may come back."""

    def __init__(self, dies_of=(), comes_back=True):
        self.dies_of, self.comes_back, self.dead, self.done = list(dies_of), comes_back, False, []
        self.do, self.here = SimpleNamespace(remote=self._do), SimpleNamespace(remote=self._here)

    def _do(self, work, piece):
        def answer():
            assert not self.dead
            if piece in self.dies_of:
                self.dies_of.remove(piece)
                self.dead = True
                raise Died(f"killed at {piece}")
            self.done.append(piece)
            try:
                return work("held", piece)
            except Exception as error:
                raise TaskError(error) from error

        return answer

    def _here(self):
        def answer():
            if not self.comes_back:
                raise Died("gone for good")
            self.dead = False

        return answer


@pytest.fixture
def mapped(monkeypatch):
    exceptions = SimpleNamespace(RayError=Died, RayTaskError=TaskError)
    ray = SimpleNamespace(
        exceptions=exceptions,
        wait=lambda references, num_returns: (references[-1:], references[:-1]),  # the last given is the first done
        get=lambda reference: reference(),
    )
    monkeypatch.setattr(module, "_imported", lambda: ray)

    def run(processes, count, work=lambda held, piece: (held, piece)):
        return list(module._Led(None, processes).map(work, [(number,) for number in range(count)]))

    return run


WHOLE = [("held", number) for number in range(7)]


def test_pieces_come_in_order_whoever_is_first(mapped):
    one, two = Process(), Process()
    assert mapped([one, two], 7) == WHOLE == list(Here("held").map(lambda *given: given, [(n,) for n in range(7)]))
    assert sorted(one.done + two.done) == list(range(7)) and one.done and two.done
    assert mapped([one, two], 0) == []


def test_what_a_dead_process_had_comes_back_with_it_and_without_it(mapped):
    assert mapped([Process(), Process(dies_of=[0, 3])], 7) == WHOLE
    assert mapped([Process(), Process(dies_of=[0], comes_back=False)], 7) == WHOLE


def test_a_piece_that_ends_every_process_is_not_tried_for_ever(mapped):
    with pytest.raises(UserError, match="3 processes of `--ray` died on one piece .* killed at 2; .* the same command"):
        mapped([Process(dies_of=[2] * 3), Process(dies_of=[2] * 3)], 7)
    with pytest.raises(UserError, match="no process of `--ray` is left"):
        mapped([Process(dies_of=[0], comes_back=False)], 7)


def test_an_error_over_there_is_the_error_here(mapped):
    def work(held, piece):
        raise UserError("`this` must be that.")

    with pytest.raises(UserError, match="^`this` must be that.$"):
        mapped([Process()], 1, work)


@pytest.mark.parametrize("count", ["0", "-1", "four", "1.5", "²"])
def test_a_count_that_is_none_is_refused(count):
    with pytest.raises(UserError, match=f"`--ray` must be a number of processes from 1, or nothing, got `{count}`"):
        lead_on_ray(count, "cpu", lambda: None, lambda workers: None)


def test_one_gpu_of_several_and_absence_are_refused(monkeypatch):
    with pytest.raises(UserError, match="a GPU of its own: `--device` must be cuda, or cpu, got `cuda:1`"):
        lead_on_ray("2", "cuda:1", lambda: None, lambda workers: None)
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(UserError, match=r"^`--ray` needs the `ray` extra: pip install -e '\.\[ray\]'\.$"):
        lead_on_ray("2", "cpu", lambda: None, lambda workers: None)


@pytest.mark.parametrize(
    ("asked", "kind", "there", "told"),
    [("64", "GPU", 8, "needs 64 GPUs, Ray has 8"), ("auto", "GPU", 0, "needs a GPU, Ray has 0"), ("3", "CPU", 2, "3")],
)
def test_more_than_there_is_is_refused(asked, kind, there, told):
    with pytest.raises(UserError, match=f"{told}.*RAY_ADDRESS"):
        module._count(asked, kind, there)
    assert module._count("auto", kind, 5) == 5 and module._count("2", kind, 5) == 2


@pytest.mark.parametrize(
    ("cluster", "place"), [(None, {"address": "local", "include_dashboard": False}), ("auto", {"address": "auto"})]
)
def test_ray_starts_without_a_word_and_warns_when_it_runs(monkeypatch, cluster, place):
    given, log = {}, logging.getLogger("ray")

    def init(**settings):
        given.update(settings)
        log.setLevel(settings["logging_level"])

    monkeypatch.setattr(log, "level", logging.NOTSET)
    monkeypatch.setattr(module, "_imported", lambda: SimpleNamespace(init=init, shutdown=lambda: None))
    monkeypatch.setenv("RAY_USAGE_STATS_ENABLED", "0")
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    if cluster:
        monkeypatch.setenv("RAY_ADDRESS", cluster)
    with module._connected():
        assert log.level == logging.WARNING
    assert given == {**place, "logging_level": logging.ERROR}
