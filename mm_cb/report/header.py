"""What a page is about, in a few facts: model, adapter, data, judge, date, revision."""

from collections.abc import Iterable, Sequence

from mm_cb.core.files import file_sha256
from mm_cb.judges.stored_verdicts import named_by_server, served_names
from mm_cb.report.load import RunFiles

_DIGITS = 12
_WEIGHTS = ".safetensors"
_PICTURES = (".png", ".jpg", ".jpeg", ".webp")
_DEMO = {"adapters/rr/adapter_model.safetensors": "adapter", "behaviors/behaviors.jsonl": "data"}
"""What a demo makes itself, and no run.json therefore names."""
_RULES = "exact rules of the fictional world"


def facts_of(runs: Sequence[RunFiles]) -> dict[str, str]:
    """The facts by name; several values of one stand side by side, and a fact that no run states is left out."""
    found = {
        "model": [f"{model}{_served(run)}" for run in runs if (model := run.run["recipe"].get("model"))],
        "adapter": [_adapter(run) for run in runs],
        "data": _data(runs),
        "judge": judges(runs),
        "date": [str(run.run.get("ended") or run.run.get("started") or "")[:10] for run in runs],
        "revision": [str(run.run.get("git") or "")[:_DIGITS] for run in runs],
    }
    told = {name: list(dict.fromkeys(value for value in values if value)) for name, values in found.items()}
    told["date"] = sorted({*told["date"][:1], *told["date"][-1:]})
    return {name: ", ".join(values) for name, values in told.items() if values}


def _served(run: RunFiles) -> str:
    """What the server of a run's model calls it, with how many answers, where that is another name."""
    named = {(item["id"], item["condition"]): item.get("served") for item in run.items}
    return named_by_server([*named.values()], "answers")


def judges(runs: Iterable[RunFiles]) -> list[str]:
    """Who judged the answers to forbidden requests: a named judge, or the rules that come with a fictional world.

    A judge whose server named other models stands with these.
    """
    found = set()
    for run in runs:
        items = [item for item in run.items if item["metric"] == "compliance"]
        found |= {f"{name}{served_names(run.folder, name)}" for name in {i["judge"] for i in items if i.get("judge")}}
        if run.fiction and any(not i.get("judge") and i.get("outcome") not in (None, "not_judged") for i in items):
            found.add(_RULES)
    return sorted(found)


def _adapter(run: RunFiles) -> str:
    """Path and hash of the adapter, of a demo those of the first one that it trained."""
    made = _made_by_demo(run, "adapter")
    path = run.run["recipe"].get("adapter") or ("adapters/rr" if run.run["command"] == "demo" else "")
    named = (*made, *_inputs([run]))
    digests = [digest for name, digest in named if _base(name) == "adapter_model.safetensors"]
    if not path:
        return ""
    return f"{path} ({digests[0][:_DIGITS]})" if digests else str(path)


def _data(runs: Sequence[RunFiles]) -> list[str]:
    """Files of rows by name and hash; pictures are counted."""
    made = [pair for run in runs for pair in _made_by_demo(run, "data")]
    files = {name: digest for name, digest in (*made, *_inputs(runs)) if not name.endswith(_WEIGHTS)}
    pictures = [name for name in files if name.lower().endswith(_PICTURES)]
    told = [f"{_base(name)} ({digest[:_DIGITS]})" for name, digest in files.items() if name not in pictures]
    return [*told, *([f"{len(pictures)} pictures"] if pictures else [])]


def _made_by_demo(run: RunFiles, what: str) -> list[tuple[str, str]]:
    """Name and hash of the files of one kind that a demo left in its folder."""
    if run.run["command"] != "demo":
        return []
    named = [name for name, kind in _DEMO.items() if kind == what and (run.folder / name).is_file()]
    return [(name, file_sha256(run.folder / name)) for name in named]


def _inputs(runs: Sequence[RunFiles]) -> list[tuple[str, str]]:
    return [(name, str(digest)) for run in runs for name, digest in run.run["inputs"].items()]


def _base(name: str) -> str:
    return name.replace("\\", "/").rpartition("/")[2]
