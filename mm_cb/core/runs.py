"""Run directories: one writer at a time, resumed by the same command, never mixed with another run's results."""

import contextlib
import datetime
import fcntl
import json
import os
import re
import shutil
import warnings
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from mm_cb.core.checked import checked
from mm_cb.core.compatibility import with_added_fields
from mm_cb.core.errors import UserError
from mm_cb.core.files import (
    TEMPORARY_SUFFIX,
    append_jsonl,
    dumps,
    file_errors,
    file_sha256,
    read_jsonl,
    refuse_broken_link,
    write_bytes,
    write_json,
    write_jsonl,
    write_text,
)
from mm_cb.core.folders import but_is
from mm_cb.core.hub import Repository
from mm_cb.core.paths import safe_id
from mm_cb.core.places import refuse_inside_run, same_inputs, same_place, written_here
from mm_cb.core.reading import TextFault, decode, file_bytes, loads
from mm_cb.core.records import Code, RecipeFields, RecipeParts, Resumption, Run
from mm_cb.core.seal import changed, refuse_changed, seal_of, sealed

__all__ = [
    "RunDirectory",
    "append_jsonl",
    "file_errors",
    "file_sha256",
    "finished_run",
    "flatten",
    "hash_inputs",
    "held",
    "identity_of",
    "read_jsonl",
    "read_run",
    "unwritten",
    "write_bytes",
    "write_json",
    "write_jsonl",
    "write_text",
]

SCHEMA, SEALED, UNSEALED = 3, 2, 1
"""Of run.json: now, before results.json named its run, and before it was sealed."""
_LOCK = ".lock"
_RUN = "run.json"
_SHOWN_DIFFERENCES = 6
_ABSENT = object()
_HASH = re.compile("[0-9a-f]{40}|[0-9a-f]{64}")


def read_run(path: Path) -> Run:
    """The content of a run directory's run.json.

    Raises:
        UserError: If there is no run.json, it is damaged, was changed by hand, or does not hold what every run's does;
            or another file was changed that the finished run holds the hash of. One that is gone is no matter here.
    """
    file = Path(path) / _RUN
    try:
        content = loads(decode(file_bytes(file)), any_text=True)
    except (FileNotFoundError, NotADirectoryError) as e:
        refuse_broken_link(file)
        inside = next(iter(sorted(Path(path).glob(f"*/{_RUN}"))), None)
        hint = (
            "what `--out` of mm-cb attack, eval, score or demo named"
            if inside is None
            else f"a run, such as `{inside.parent}`"
        )
        there = Path(path).exists()
        came = f"it holds no {_RUN}" if Path(path).is_dir() else "it is a file" if there else "there is none"
        raise UserError(f"`{path}` must be a run directory, but {came}{but_is(path)}; give {hint}.") from e
    except (TextFault, OSError) as e:
        refuse_broken_link(file)
        place = f":{e.line}" if isinstance(e, TextFault) else ""
        raise UserError(f"`{file}{place}` cannot be read ({e}); delete it and start the run in a new directory.") from e
    run = checked(content, Run, f"`{file}`")
    checked(run["recipe"], RecipeParts, f"`{file}`: `recipe`")
    if (schema := run.get("schema", UNSEALED)) not in (UNSEALED, SEALED, SCHEMA):
        raise UserError(
            f"`{file}` must have schema {SCHEMA}, got {schema!s:.20}: open it with the version of mm-cb that made it."
        )
    refuse_changed(run, f"`{file}`", needed=schema != UNSEALED)
    run.pop("seal", None)
    for name, digest in run.get("files", {}).items():
        if (other := file.parent / name).is_file() and file_sha256(other) != digest:
            raise changed(f"`{other}`")
    return run


def identity_of(run: Mapping[str, Any]) -> str:
    """What no other run has: the hash of its settings and of what its inputs hold, wherever these lie.

    Runs of the same end with the same bytes.
    """
    settings = {k: v for k, v in flatten(run.get("recipe")).items() if not (isinstance(v, str) and os.path.isabs(v))}
    inputs = sorted((run.get("inputs") or {}).values())
    return seal_of({"command": run.get("command"), "seed": run.get("seed"), "recipe": settings, "inputs": inputs})


class RunDirectory:
    """The folder of one run: knows what run it belongs to, resumes it, refuses another one.

    Use it as a context manager, or call `open` and, at the end, `close`::

        with RunDirectory(out, "attack", recipe, seed=0, inputs=[behaviors]) as run:
            if not run.finished:
                ...
                run.finish()

    Attributes:
        path: The folder.
    """

    def __init__(
        self,
        path: Path,
        command: str,
        recipe: RecipeFields,
        seed: int,
        *,
        inputs: Iterable[Path | Repository] | Mapping[str, str] = (),
    ) -> None:
        """Describe the run; nothing is touched before `open`.

        Args:
            path: The run's folder; made when it is not there.
            command: The command that writes into it, for example ``"attack"``.
            recipe: Everything that decides the results, as plain nested values (no times, no output path).
            seed: The run's seed.
            inputs: What decides the results by its content: files, whose hashes are kept and compared, and the hub's
                repositories, by their commits; or what `hash_inputs` found of them.
        """
        self.path = Path(path)
        self._inputs = dict(inputs) if isinstance(inputs, Mapping) else list(inputs)
        self._identity = {"command": command, "recipe": recipe, "seed": seed}
        self._content: Run | None = None
        self._lock: int | None = None
        self._made = False

    def open(self) -> Self:
        """Create the folder or resume the run it holds, and lock it for this process.

        Raises:
            UserError: If the folder cannot be written, lies inside another run, is in use by another process, holds
                files but no run.json, or holds the results of another run (the message names the keys that differ).
        """
        if self._lock is not None:
            return self
        with file_errors(self.path):
            if self.path.exists() and not self.path.is_dir():
                raise UserError(f"`--out` must be a directory, got the file `{self.path}`; give another path.")
            refuse_inside_run(self.path)
            self._refuse_foreign_files()
            self._made = self._made or not self.path.exists()
            self.path.mkdir(parents=True, exist_ok=True)
            try:
                if isinstance(self._inputs, list):  # before the lock: a model's weights take longer than others wait
                    self._inputs = hash_inputs(self._inputs)
                self._lock = _take_lock(self.path)
            except BaseException:
                if self._made:
                    with contextlib.suppress(OSError):  # where another process is by now
                        self.path.rmdir()
                raise
        try:
            self._resume_or_create()
        except BaseException:
            self.close()
            raise
        written_here.add(os.path.realpath(self.path))
        return self

    def close(self) -> None:
        """Release the lock; safe to call twice."""
        if self._lock is not None:
            _release(self._lock)
            self._lock = None
            written_here.discard(os.path.realpath(self.path))

    def finish(self, *, left_out: Mapping[str, int] | None = None, files: Iterable[str] = ()) -> None:
        """Write the end time: from now on the directory counts as complete.

        Args:
            left_out: Why rows of the data were not used → how many.
            files: What was written here and never is again, by name; their hashes are kept, see `read_run`.
        """
        assert self._lock is not None and self._content, "finish() belongs between open() and close()"
        if left_out:
            self._content["left_out"] = dict(left_out)
        if hashes := {name: file_sha256(self.path / name) for name in files}:
            self._content["files"] = hashes
        self._content["ended"] = _now()
        write_json(self.path / _RUN, sealed(self._content))

    def abandon(self) -> None:
        """Give the directory up if nothing was made in it, so that a corrected command may take it; a new one goes."""
        assert self._lock is not None, "abandon() belongs between open() and close()"
        if not self._files():
            for name in (_RUN, _LOCK):
                (self.path / name).unlink(missing_ok=True)
            if self._made:
                shutil.rmtree(self.path, ignore_errors=True)

    @property
    def finished(self) -> bool:
        """Whether the run that this directory holds has come to its end."""
        return bool(self._content and self._content.get("ended"))

    def stage(self, name: str) -> Path:
        """A sub-directory for one part of the run, made when it is not there."""
        folder = self.path / name
        with file_errors(folder):
            folder.mkdir(parents=True, exist_ok=True)
        return folder

    def __enter__(self) -> Self:
        """Open the run."""
        return self.open()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """Release the lock; a run that failed before it made anything leaves no claim on the directory."""
        if error is not None and self._lock is not None:
            self.abandon()
        self.close()

    def _refuse_foreign_files(self) -> None:
        if (self.path / _RUN).exists():
            return
        foreign = sorted({str(file.relative_to(self.path).parts[0]) for file in self._files()})
        if foreign:
            raise UserError(
                f"`--out` must be new, empty, or a run to go on with; `{self.path}` holds no {_RUN} but other files "
                f"(`{foreign[0]}`, {len(foreign)} in all); give another path."
            )

    def _files(self) -> list[Path]:
        """What lies here beside run.json: neither locks nor what a killed process left half written."""
        found = [file for file in self.path.rglob("*") if not file.is_dir() and file != self.path / _RUN]
        return [file for file in found if file.name != _LOCK and not file.name.endswith(TEMPORARY_SUFFIX)]

    def _resume_or_create(self) -> None:
        for leftover in self.path.rglob(f".*{TEMPORARY_SUFFIX}"):
            inside = leftover.relative_to(self.path).parents
            if not any((self.path / folder / _LOCK).exists() for folder in inside if folder != Path()):
                leftover.unlink(missing_ok=True)  # not what a run inside, such as a shard, is just writing
        identity: Run = json.loads(dumps({**self._identity, "inputs": self._inputs}))
        if not (self.path / _RUN).exists():
            from mm_cb.core.provenance import git_revision, hardware, package_versions

            code: Code = {"versions": package_versions(), "git": git_revision()}
            begun: Run = {
                "schema": SCHEMA,
                **identity,
                **code,
                "hardware": hardware(),
                "started": _now(),
                "ended": None,
            }
            self._content = begun
            write_json(self.path / _RUN, sealed(self._content))
            return
        there = self._content = read_run(self.path)
        recipe = with_added_fields(there["command"], there["recipe"])
        held = {"command": there["command"], "recipe": recipe, "seed": there["seed"]}
        asked = {"command": identity["command"], "recipe": identity["recipe"], "seed": identity["seed"]}
        inputs = there["inputs"], identity["inputs"]
        if same_inputs(*inputs):
            differences = _differences(*_where_they_were(held, asked, inputs[1]))
        else:
            differences = _differences(held, asked) + _other_inputs(*inputs)
        if held["command"] != asked["command"]:
            differences = [f"command ({_shown(held['command'])} there, {_shown(asked['command'])} here)"]
        if differences:
            more = len(differences) - _SHOWN_DIFFERENCES
            listed = "; ".join(differences[:_SHOWN_DIFFERENCES]) + (f"; and {more} more" if more > 0 else "")
            raise UserError(
                f"`--out` `{self.path}` holds another run's results, different in: {listed}. Give another path, or "
                "delete this one."
            )
        if not self.finished:
            self._note_resumption(there)

    def _note_resumption(self, content: Run) -> None:
        from mm_cb.core.provenance import git_revision, package_versions

        code: Code = {"versions": package_versions(), "git": git_revision()}
        other = _differences({"versions": content.get("versions"), "git": content.get("git")}, code)
        resumed: Resumption = {"at": _now()}
        if other:
            warnings.warn(f"`{self.path}` was started with other code ({'; '.join(other)}).", stacklevel=5)
            resumed |= code
        content["resumed"] = [*content.get("resumed", []), resumed]
        write_json(self.path / _RUN, sealed(content))


@contextlib.contextmanager
def held(path: Path) -> Iterator[Run]:
    """The run.json of a finished run whose directory nobody else writes meanwhile.

    Raises:
        UserError: If it is no run directory, the run is not finished, or another process writes there.
    """
    content = finished_run(path)
    with file_errors(path):
        lock = _take_lock(path)
    try:
        yield content
    finally:
        _release(lock)


def finished_run(path: Path) -> Run:
    """The run.json of a finished run.

    Raises:
        UserError: If it is no run directory, or the run is not finished; says what to do.
    """
    content = read_run(path)
    if not content.get("ended"):
        with unwritten(path):
            pass
        raise UserError(
            f"`{path}` must be a finished run, this one has not ended; give its `mm-cb {content['command']}` again to "
            "go on."
        )
    return content


@contextlib.contextmanager
def unwritten(path: Path) -> Iterator[None]:
    """A run's folder that nobody else writes while it is read, which leaves no trace in it.

    Raises:
        UserError: If another process writes there.
    """
    try:
        lock = None if os.path.realpath(path) in written_here else os.open(path / _LOCK, os.O_RDONLY | os.O_CLOEXEC)
    except OSError:  # nobody has ever written here
        lock = None
    if lock is None:
        yield
        return
    _locks.add(lock)
    try:
        with contextlib.suppress(OSError):  # a disk without locks
            _share(lock, path)
        yield
    finally:
        _release(lock)


def _share(lock: int, path: Path) -> None:
    try:
        fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError as e:
        raise UserError(
            f"`{path}` is in use by another mm-cb process, which writes there; wait for it, then give this command "
            "again."
        ) from e


_locks: set[int] = set()
"""Descriptors of this process's locks."""


def _hold_no_lock() -> None:
    """A process that was forked off must not keep a run locked that outlives it."""
    for descriptor in _locks:
        os.close(descriptor)
    _locks.clear()


os.register_at_fork(after_in_child=_hold_no_lock)


def _release(descriptor: int) -> None:
    _locks.discard(descriptor)
    os.close(descriptor)


def being_written(path: Path) -> UserError:
    """What to say of a folder that another process writes, or reads as a whole."""
    return UserError(f"`{path}` is in use by another mm-cb process; wait for it or give another `--out`.")


def _is_there(descriptor: int, file: Path) -> bool:
    """Whether a file that was opened still has its name, which another process may have taken since."""
    try:
        return os.path.samestat(os.fstat(descriptor), file.stat())
    except FileNotFoundError:
        return False


def _take_lock(path: Path) -> int:
    try:
        descriptor = os.open(path / _LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
    except FileNotFoundError as e:
        raise being_written(path) from e  # by one that gave the folder up
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as e:
        os.close(descriptor)
        raise being_written(path) from e
    except OSError as e:
        warnings.warn(f"`{path}` cannot be locked ({e.strerror}); start only one run there.", stacklevel=5)
    if not _is_there(descriptor, path / _LOCK):
        os.close(descriptor)
        raise being_written(path)
    _locks.add(descriptor)
    return descriptor


def hash_inputs(inputs: Iterable[Path | Repository]) -> dict[str, str]:
    """What run.json keeps of a run's inputs: the hashes of files, the commits of repositories.

    Raises:
        UserError: If a file cannot be read.
    """
    hashes: dict[str, str] = {}
    for file in inputs:
        if isinstance(file, Repository):
            hashes[file.name] = file.commit
            continue
        try:
            hashes[str(file) if file.name in hashes else file.name] = file_sha256(file)
        except OSError as e:
            raise UserError(f"`{file}` must be a readable file, got: {e.strerror}.") from e
    return hashes


def flatten(value: object, prefix: str = "") -> dict[str, object]:
    """Nested mappings as dotted keys: ``{"attack": {"steps": 40}}`` -> ``{"attack.steps": 40}``."""
    if isinstance(value, Mapping) and value:
        flat: dict[str, object] = {}
        for key, inner in value.items():
            flat.update(flatten(inner, f"{prefix}.{key}" if prefix else str(key)))
        return flat
    return {prefix: value}


def _where_they_were(
    held: Mapping[str, object], given: Mapping[str, object], inputs: Mapping[str, str]
) -> tuple[dict[str, object], dict[str, object]]:
    """Both without what is the same at another place; their inputs are the same."""
    there, here = flatten(held), flatten(given)
    moved = [k for k in there.keys() & here.keys() if same_place(there[k], here[k], inputs)]
    return {k: v for k, v in there.items() if k not in moved}, {k: v for k, v in here.items() if k not in moved}


def _differences(held: Mapping[str, object], wanted: Mapping[str, object]) -> list[str]:
    """One phrase per differing leaf: ``recipe.attack.steps (100 there, 300 here)``."""
    there, here = flatten(held), flatten(wanted)
    phrases = []
    for key in sorted(there.keys() | here.keys()):
        old, new = there.get(key, _ABSENT), here.get(key, _ABSENT)
        if old != new:
            phrases.append(f"{key} ({_shown(old)} there, {_shown(new)} here)")
    return phrases


def _other_inputs(there: Mapping[str, str], here: Mapping[str, str]) -> list[str]:
    """One phrase for all input files that are others: their hashes would say nothing."""
    names = sorted(name for name in there.keys() | here.keys() if there.get(name) != here.get(name))
    further = len(names) - 1
    more = f" and {further} more file{'s' * (further > 1)}" if further else ""
    return [f"the content of inputs.{names[0]}{more}"] if names else []


def _shown(value: object) -> str:
    if value is _ABSENT:
        return "absent"
    if isinstance(value, str) and _HASH.fullmatch(value):
        return f"{value[:8]}..."
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 40 else text[:37] + "..."


def _now() -> str:
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")


def keep_pictures(folder: Path, pictures: Mapping[str, str]) -> None:
    """Put the selected picture of every item (id → picture in the run) at ``images/<safe_id>.png``."""
    for id, image in pictures.items():
        write_bytes(folder / "images" / f"{safe_id(id)}.png", (folder / image).read_bytes())
