"""Repositories on the Hugging Face hub: fetched by file patterns, one commit each, every failure said in one line.

Whatever is read from the hub is read from a folder of its cache, which holds one commit: no library asks for another
file later, nothing but what was named is fetched, and without network the same folder serves.
"""

import contextlib
import fnmatch
import json
import logging
import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

from mm_cb.core.errors import UserError, one_line
from mm_cb.core.files import no_room, refuse_broken_link
from mm_cb.core.packages import stay_offline_without_network
from mm_cb.core.paths import refuse_missing_parts
from mm_cb.core.reading import file_bytes

RepositoryKind = Literal["model", "dataset"]

_SHOWN = 300
_PAUSES = (2.0, 8.0)
_DATA = ("README.md", "*.parquet", "*.arrow", "*.json", "*.jsonl", "*.csv", "*.png", "*.jpg", "*.jpeg")
"""Of data sets in an unusual layout; no code, so none can run."""
_THINGS: Mapping[RepositoryKind, str] = {"model": "model", "dataset": "data set"}
_ENDINGS = (
    *(".json", ".jsonl", ".csv", ".tsv", ".parquet", ".arrow", ".txt", ".yaml", ".yml", ".py", ".html", ".zip", ".gz"),
    *(".safetensors", ".png", ".jpg", ".jpeg"),
)
"""Of files, and of no name on the hub."""
_commits: dict[str, str] = {}


class Repository(NamedTuple):
    """A repository at one commit, for a run's record of its inputs."""

    name: str
    """``models/ORG/NAME`` or ``datasets/ORG/NAME``, with ``@REVISION`` behind it where one was asked for."""
    commit: str


def fetch(
    name: str, patterns: Sequence[str], *, kind: RepositoryKind = "model", flat: bool = False, bars: bool = False
) -> Path:
    """Files of a repository that match, downloaded once, in a folder of the hub's cache that is called by its commit.

    The first call of a process decides which commit that is; what `keep_to` took from a run goes before.

    Args:
        name: ``ORG/NAME``, or ``ORG/NAME@REVISION``: a branch, a tag or a commit; else the newest commit.
        patterns: Shell patterns of paths in the repository; that nothing matches is no error.
        kind: What sort of repository.
        flat: Leave out what lies in folders of the repository.
        bars: Show progress, if the terminal can.

    Raises:
        UserError: If there is no such repository or revision, it is behind a gate, or it is neither in the cache nor
            can the hub be reached; before anybody is asked, if the name is written as a path here is.
    """
    from huggingface_hub import snapshot_download

    refuse_broken_link(Path(name))
    _refuse_path(name, kind)
    stay_offline_without_network()
    repository, _, revision = name.partition("@")
    key = f"{kind}s/{name}"
    try:
        with _quiet(bars):
            folder = _patiently(
                snapshot_download,
                repository,
                repo_type=kind,
                revision=_commits.get(key) or revision or None,
                allow_patterns=list(patterns),
                ignore_patterns=["*/*"] if flat else None,
            )
    except Exception as error:  # the hub's library raises whatever its layers raise
        if isinstance(error, OSError) and no_room(error):
            raise
        raise refused(name, error, kind, patterns) from error
    _commits[key] = Path(folder).name
    return Path(folder)


def _refuse_path(name: str, kind: RepositoryKind) -> None:
    """Refuse what is meant as a path here: by its ending, its slashes, or since run directories lie beside it.

    Raises:
        UserError: Saying what is there, and what is wanted.
    """
    path, repository = Path(name), name.partition("@")[0]  # a revision may hold slashes: `refs/pr/1`
    begins = name.startswith(("/", "./", "../", "~")) or name in (".", "..")
    slashes = repository.count("/") > 1 or repository.endswith("/") or "\\" in name
    written = begins or slashes or repository.lower().endswith(_ENDINGS)
    if os.path.isfile(name):
        raise UserError(
            f"`{name}` must be a folder, or a name on the hub (ORG/NAME), it is a file; of this {_THINGS[kind]} no "
            "such file is read."
        )
    among_runs = len(path.parts) > 1 and any(path.parent.glob("*/run.json"))
    if written or among_runs:
        inside = f": `{path.parent}` is here, it is not" if path.parent.name and path.parent.is_dir() else ""
        raise UserError(
            f"`{name}` must be a folder, which is not here, or a name on the hub (ORG/NAME); correct it{inside}."
        )


def _patiently(download: Callable[..., str], *arguments: Any, **options: Any) -> str:
    """Try again after a server's fault, which the hub's library does for some requests only; files that are here stay.

    Raises:
        Exception: Whatever the last try met.
    """
    from huggingface_hub.errors import HfHubHTTPError

    for pause in _PAUSES:
        try:
            return download(*arguments, **options)
        except HfHubHTTPError as error:
            if error.response.status_code < 500:
                raise
        time.sleep(pause)
    return download(*arguments, **options)


def cached(name: str, pattern: str, *, kind: RepositoryKind = "model") -> list[Path]:
    """Files that match in the cache, asking nobody; of the commit that would be read if nobody answered."""
    from huggingface_hub import constants

    repository, _, revision = name.partition("@")
    store = Path(constants.HF_HUB_CACHE) / f"{kind}s--{repository.replace('/', '--')}"
    wanted = _commits.get(f"{kind}s/{name}") or revision or "main"
    with contextlib.suppress(OSError):
        wanted = (store / "refs" / wanted).read_text(encoding="utf-8").strip()
    folder = store / "snapshots" / wanted
    if not os.path.isdir(folder):  # False, not an error, for a name that no system takes
        return []
    paths = (str(path.relative_to(folder)) for path in folder.rglob("*"))
    return sorted(folder / path for path in paths if fnmatch.fnmatch(path, pattern) and (folder / path).is_file())


def load_split(name: str, split: str, config: str | None = None) -> Any:
    """A split of a hub data set as a ``datasets.Dataset``.

    In the hub's usual layout (``data/SPLIT-*.parquet``, or the configuration's folder) no other split is fetched.

    Raises:
        UserError: As `fetch` does, or if the data set has no such split or cannot be read.
    """
    import datasets

    usual = f"{config or 'data'}/{split}-*.parquet"
    folder = fetch(name, [usual], kind="dataset", bars=True)
    try:
        with _quiet(False), silent(datasets):
            if files := sorted(folder.glob(usual)):
                refuse_missing_parts(files)
                return datasets.Dataset.from_parquet([str(file) for file in files])
            folder = fetch(name, _DATA, kind="dataset", bars=True)
            refuse_missing_parts(sorted(folder.rglob("*-of-*")))
            return datasets.load_dataset(str(folder), config, split=split)
    except UserError:
        raise
    except Exception as error:  # whatever the reader of that file type raises
        raise UserError(
            f"the data set `{name}` has no readable split `{split}`"
            + (f" of `{config}`" if config else "")
            + f": {type(error).__name__}: {one_line(str(error))[:_SHOWN]}"
        ) from error


def repository_of(name: str) -> tuple[str, str | None]:
    """A hub id without its revision, and that: ``"org/x@v1"`` -> ``("org/x", "v1")``; a folder is left as it is."""
    repository, _, revision = name.partition("@")
    return (name, None) if Path(name).exists() else (repository, revision or None)


def used(*names: str, kind: RepositoryKind = "model") -> list[Repository]:
    """Those of the names that this process has fetched from the hub, each with its commit."""
    keys = (f"{kind}s/{name}" for name in names)
    return [Repository(key, _commits[key]) for key in keys if key in _commits]


def keep_to(run: Path) -> None:
    """Read the commits that a run directory's earlier start read, whatever the hub shows as newest today."""
    with contextlib.suppress(OSError, ValueError, AttributeError):
        inputs = json.loads(file_bytes(Path(run) / "run.json")).get("inputs")
        _commits.update({k: v for k, v in inputs.items() if k.startswith(("models/", "datasets/"))})


def refused(name: str, error: Exception, kind: RepositoryKind, patterns: Sequence[str] = ()) -> UserError:
    """The user's error for a repository that was not to be had, with what to do about it."""
    from huggingface_hub import constants, errors, get_token

    repository, _, revision = name.partition("@")
    page = f"{constants.ENDPOINT}/{'datasets/' if kind == 'dataset' else ''}{repository}"
    thing = _THINGS[kind]
    cause = error.__cause__ if isinstance(error, errors.LocalEntryNotFoundError) else error
    if isinstance(cause, errors.GatedRepoError):
        known = (
            "with the account of this machine's token" if get_token() else "then run `hf auth login` or set HF_TOKEN"
        )
        return UserError(f"`{name}` is gated: accept its licence at {page} , {known}.")
    if isinstance(cause, errors.RepositoryNotFoundError):
        return UserError(
            f"there is no {thing} `{name}` on the hub and no folder of this name here, or it is private: correct the "
            "name, or run `hf auth login` or set HF_TOKEN if it is private."
        )
    if isinstance(cause, errors.RevisionNotFoundError):
        wanted = _commits.get(f"{kind}s/{name}") or revision
        return UserError(f"`{repository}` has no revision `{wanted}`; its commits: {page}/commits/main")
    if isinstance(cause, errors.HFValidationError):
        return UserError(f"`{name}` must be a folder, which is not here, or a name on the hub (ORG/NAME); correct it.")
    if isinstance(error, errors.LocalEntryNotFoundError):
        download = f"hf download {repository}" + (f" --revision {revision}" if revision else "")
        if kind == "dataset":
            download += " --repo-type dataset" + (f" --include '{patterns[0]}'" if len(patterns) == 1 else "")
        return UserError(
            f"the {thing} `{name}` is not (wholly) on this machine, and the hub cannot be asked{_reason(cause)}; get "
            f"it where there is a network with `{download}`, or give a folder."
        )
    if isinstance(cause, errors.HfHubHTTPError) and cause.response.status_code == 401:
        return UserError("the hub does not know the token of this machine: run `hf auth login`, or correct HF_TOKEN.")
    return UserError(
        f"the {thing} `{name}` could not be fetched: {type(error).__name__}: {one_line(str(error))[:_SHOWN]}; what has "
        "arrived is kept, run the same command again."
    )


def _reason(cause: BaseException | None) -> str:
    from huggingface_hub import constants, errors

    if cause is None or isinstance(cause, errors.OfflineModeIsEnabled) or constants.HF_HUB_OFFLINE:
        return " (offline)"
    return f" ({type(cause).__name__}: {one_line(str(cause))[:120]})"


@contextlib.contextmanager
def offline() -> Iterator[None]:
    """Inside the block nobody is asked: what is not in the cache is not there."""
    from huggingface_hub import constants

    stay_offline_without_network()
    before, constants.HF_HUB_OFFLINE = constants.HF_HUB_OFFLINE, True
    try:
        yield
    finally:
        constants.HF_HUB_OFFLINE = before


@contextlib.contextmanager
def _quiet(bars: bool) -> Iterator[None]:
    """Without the hub's notes on retries (what failed in the end is raised), and perhaps without its bars."""
    from huggingface_hub.utils import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars

    bars = bars and sys.stderr.isatty()
    logger = logging.getLogger("huggingface_hub")
    level, shown = logger.level, not are_progress_bars_disabled()
    logger.setLevel(logging.ERROR)
    if shown and not bars:
        disable_progress_bars()
    try:
        yield
    finally:
        logger.setLevel(level)
        if shown and not bars:
            enable_progress_bars()


@contextlib.contextmanager
def silent(datasets: Any) -> Iterator[None]:
    """Without the bars of the data sets' library and its notes: what failed is raised."""
    shown, level = datasets.is_progress_bar_enabled(), datasets.logging.get_verbosity()
    datasets.disable_progress_bars()
    datasets.logging.set_verbosity(logging.CRITICAL)
    try:
        yield
    finally:
        datasets.logging.set_verbosity(level)
        if shown:
            datasets.enable_progress_bars()
