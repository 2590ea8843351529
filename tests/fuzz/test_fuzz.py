"""A damaged file is read, or refused in one line with nothing written: in time, and without a storm of warnings."""

from __future__ import annotations

import contextlib
import signal
import tempfile
import warnings
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from random import Random

import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from tests.fuzz.mutate import CHANGES
from tests.fuzz.readers import READERS, Reader

SECONDS, WAITED = 10.0, 120.0
"""Of the processor for one input, and of the clock, which also counts what other programs take."""
WARNINGS, LETTERS = 6, 1500
"""At most so many different warnings from one input, and so long a line."""

MEMORY = "/dev/shm" if Path("/dev/shm").is_dir() else None
"""Where files cost no disk."""

SEEDS = st.integers(0, 2**32 - 1)
MOST = 3
"""Changes of one input."""
QUIET = [HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
FAST, LONG = (  # a failing input is not made smaller: it is three changes at most
    settings(max_examples=n, deadline=None, derandomize=True, phases=[Phase.generate], suppress_health_check=QUIET)
    for n in (50, 500)
)


class TooLong(BaseException):
    """Not to be caught by a reader's ``except Exception``."""


@contextlib.contextmanager
def limited() -> Iterator[None]:
    """Stop what takes longer."""

    def stop(*_: object) -> None:
        raise TooLong(f"more than {SECONDS:g} s of the processor, or {WAITED:g} s")

    timers = ((signal.SIGPROF, signal.ITIMER_PROF, SECONDS), (signal.SIGALRM, signal.ITIMER_REAL, WAITED))
    before = [(number, signal.signal(number, stop)) for number, _, _ in timers]
    for _, timer, seconds in timers:
        signal.setitimer(timer, seconds)
    try:
        yield
    finally:
        for _, timer, _ in timers:
            signal.setitimer(timer, 0)
        for number, handler in before:
            signal.signal(number, handler)


@cache
def sample(reader: Reader) -> dict[str, bytes]:
    """The reader's valid input, made once."""
    return dict(reader.files())


def damaged(reader: Reader, seed: int) -> dict[str, bytes]:
    """The reader's sample with up to `MOST` changes to one of its files."""
    files, rng = dict(sample(reader)), Random(seed)
    name = rng.choice(reader.damaged.split() or sorted(files))
    for change in rng.choices(CHANGES[Path(name).suffix], k=rng.randint(1, MOST)):
        files[name] = change(files[name], rng)
    return files


def attempt(reader: Reader, files: dict[str, bytes]) -> str | None:
    """Let a reader read; what it refused with, or None."""
    with tempfile.TemporaryDirectory(dir=MEMORY) as name:
        folder = Path(name)
        for path, content in files.items():
            (folder / path).parent.mkdir(parents=True, exist_ok=True)
            (folder / path).write_bytes(content)
        with limited(), warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always")
            try:
                reader.read(folder)
                said = None
            except reader.refuses as error:
                said = str(error)
        notes = {str(one.message)[:200] for one in told if not issubclass(one.category, ResourceWarning)}
        assert len(notes) <= WARNINGS, notes
        if said is not None:
            assert 0 < len(said) - said.count(name) * len(name) <= LETTERS, said
            there = (path for path in folder.rglob("*") if path.is_file() and path.name != ".lock")
            new = {str(path.relative_to(folder)) for path in there} - files.keys()
            assert not new, (new, said)
        return said


@pytest.mark.parametrize("reader", READERS, ids=lambda reader: reader.name)
def test_the_sample_itself_is_read(reader):
    assert attempt(reader, sample(reader)) is None


@pytest.mark.parametrize("reader", READERS, ids=lambda reader: reader.name)
@given(seed=SEEDS)
@FAST
def test_a_damaged_file_is_read_or_refused(reader, seed):
    attempt(reader, damaged(reader, seed))


@pytest.mark.parametrize(
    ("name", "seed"),
    [
        ("data card", 2246765427),
        ("judge's card", 974592320),
        ("judge", 3371986719),
        ("attack verify", 1388643700),
        ("model, description", 2508617055),
    ],
)
def test_inputs_that_once_ended_in_a_traceback(name, seed):
    (reader,) = (one for one in READERS if one.name == name)
    attempt(reader, damaged(reader, seed))


@pytest.mark.slow
@pytest.mark.long
@pytest.mark.parametrize("reader", READERS, ids=lambda reader: reader.name)
@given(seed=SEEDS)
@LONG
def test_many_more(reader, seed):
    attempt(reader, damaged(reader, seed))
