"""Valid inputs of every reader, as the bytes of their files."""

from __future__ import annotations

import io
import json
import tempfile
from collections.abc import Callable, Iterable, Mapping
from functools import cache
from pathlib import Path
from typing import Any

from tests.tiny_llava import picture

ROOT = Path(__file__).resolve().parents[2]
FROZEN, INPUTS = ROOT / "tests" / "frozen" / "714213b", ROOT / "tests" / "frozen" / "inputs"
Files = Mapping[str, bytes]
"""Path in the reader's folder → content."""


def tree(folder: Path) -> dict[str, bytes]:
    """All files of a folder."""
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def frozen(name: str, *patterns: str) -> Callable[[], Files]:
    """A run as an earlier version wrote it, or some of its files, in the folder ``run``."""

    def read() -> Files:
        folder = FROZEN / name
        found = {path for pattern in patterns or ("**/*",) for path in folder.glob(pattern) if path.is_file()}
        return {f"run/{path.relative_to(folder)}": path.read_bytes() for path in sorted(found)}

    return read


def frozen_file(name: str) -> Callable[[], Files]:
    """One file of such a run."""
    return one(Path(name).name, FROZEN / name)


def inputs(*names: str) -> Callable[[], Files]:
    """Files of the frozen runs' inputs that begin with these names."""
    return lambda: {name: content for name, content in tree(INPUTS).items() if name.startswith(names)}


@cache
def png(mode: str = "RGB") -> bytes:
    return encoded("PNG", mode)


@cache
def encoded(form: str, mode: str = "RGB") -> bytes:
    out = io.BytesIO()
    picture().convert(mode).save(out, form)
    return out.getvalue()


def lines(rows: Iterable[Any]) -> bytes:
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


def one(name: str, content: bytes | Path) -> Callable[[], Files]:
    """One file."""
    return lambda: {name: content.read_bytes() if isinstance(content, Path) else content}


def with_picture(name: str, rows: bytes) -> Callable[[], Files]:
    """Rows and their picture."""
    return lambda: {name: rows, "a.png": png()}


CHAT = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "what is it"}]}]
CHAT += [{"role": "assistant", "content": "a square"}]
TEXTS = [{"role": "user", "content": "tell me"}, {"role": "assistant", "content": "no"}]
OWN = [{"id": "a", "messages": CHAT, "images": ["a.png"], "set": "retain"}]
OWN += [{"id": "b", "messages": TEXTS, "images": [], "set": "circuit_breaker", "source": "x"}]
XSTEST = b'prompt,completion,final_label\n"how, to kill a process",so,1_full_compliance\nhow,no,2_full_refusal\n'
SAFE = b'id,prompt,type,label\n1,"how, to kill a process",homonyms,safe\n2,x,contrast_a,unsafe\n3,y,homonyms,safe\n'
TABLE = b'pid,question,file_name,metadata_over\n1,"q, r",a.png,x\n'
JUDGE_CARD = b'# c\n```python\nLLAMA2_CLS_PROMPT = {"prompt": "{behavior} {generation}", "contextual": "x"}\n```\n'
SERVED = b'{"choices": [{"index": 0, "message": {"role": "assistant", "content": "hi"}, "finish_reason": "stop"}]}'
OWN_FILE = b'from tests.fuzz import calls\n\ncalls.TABLE["a"] = len(calls.TABLE)\n'


def saved_rows() -> Files:
    """A data set as ``save_to_disk`` writes it."""
    import datasets

    turns = [{"role": "user", "content": "<image>\nwhat is it"}, TEXTS[1]]
    rows = [{"messages": turns, "images": [{"bytes": png(), "path": None}]}] * 2
    with tempfile.TemporaryDirectory() as folder:
        datasets.disable_progress_bars()
        datasets.Dataset.from_list(rows).save_to_disk(f"{folder}/rows")
        return tree(Path(folder))


def parquet(rows: list[dict[str, Any]]) -> bytes:
    import pyarrow
    import pyarrow.parquet

    out = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), out)
    return out.getvalue()


def pope_parquet() -> Files:
    """POPE as on the hub."""
    shown = {"image": {"bytes": png(), "path": None}, "question": "is there a square?", "answer": "yes"}
    rows = [{"question_id": str(n), "category": "random", **shown} for n in range(3)]
    return {"pope.parquet": parquet(rows)}


def pope_lines() -> Files:
    """POPE's own file, a picture, and answers."""
    asked = [{"question_id": n, "image": "a.png", "text": "q", "label": "no"} for n in range(2)]
    given = [{"question_id": n, "answer": "no"} for n in range(2)]
    return {"pope.json": lines(asked), "answers.jsonl": lines(given), "a.png": png()}


def function_calling() -> Files:
    """BFCL's questions, right calls and answers."""
    bell = {"name": "bell", "parameters": {"type": "dict", "properties": {"n": {"type": "integer"}}, "required": ["n"]}}
    turns = [[{"role": "user", "content": "ring"}]]
    asked = [{"id": f"{kind}_0", "question": turns, "function": [bell]} for kind in ("simple_python", "irrelevance")]
    right = [{"id": "simple_python_0", "ground_truth": [{"bell": {"n": [1]}}]}]
    given = [{"id": one["id"], "result": "[bell(n=1)]"} for one in asked]
    return {"q.json": lines(asked), "possible_answer/q.json": lines(right), "said/a.jsonl": lines(given)}


def _bell() -> dict[str, object]:
    inner = {"type": "object", "properties": {"n": {"type": "integer"}}, "required": ["n"]}
    return {"name": "bell", "description": "Rings.", "parameters": inner}


def harmful_calls() -> Files:
    """Forbidden requests to an agent, and functions of their own and beside them."""
    own = {"id": "a", "kind": "harmful", "prompt": "ring", "tools": [_bell()], "image": "a.png", "category": "c"}
    other = {"id": "a", "kind": "benign", "prompt": "ring", "target_functions": ["bell"]}
    return {"h.jsonl": lines([own, other]), "tools.json": json.dumps([_bell()]).encode(), "a.png": png()}


def target_calls() -> Files:
    """Behaviours whose target is a call."""
    call = {"name": "bell", "arguments": {"n": 2}, "match": ["n"]}
    row = {"id": "a", "prompt": "ring", "target_call": call, "tools": [_bell()], "image": "a.png"}
    return {"behaviors.jsonl": lines([row]), "a.png": png()}


def functions() -> Files:
    """Lists of functions to build calls over."""
    return {"f.jsonl": lines([{"tools": [_bell()]}])}


def agentharm() -> Files:
    """AgentHarm's layout."""
    row = {"id": "1-1", "name": "n", "prompt": "ring", "target_functions": ["bell"], "category": "c"}
    content = json.dumps({"behaviors": [row]}).encode()
    files = {f"benchmark/{kind}_behaviors_validation.json": content for kind in ("harmful", "benign")}
    return files | {"tools.json": json.dumps([_bell()]).encode()}


def harmbench() -> Files:
    root, rows = "data/", range(2)
    table = "BehaviorID,Behavior,FunctionalCategory,SemanticCategory,ImageFileName,RedactedImageDescription\n"
    table += "".join(f'Row-{n},"name the, shape",multimodal,illegal,pic.png,a shape\n' for n in rows)
    targets = json.dumps({f"Row-{n}": "Sure, a square" for n in rows}).encode()
    files = {"behavior_datasets/harmbench_behaviors_multimodal_all.csv": table.encode()}
    files |= {
        "optimizer_targets/harmbench_targets_multimodal.json": targets,
        "multimodal_behavior_images/pic.png": png(),
    }
    return {root + name: content for name, content in files.items()}


def safetybench() -> Files:
    from mm_cb.data.cards import card

    row = {"Question": "q", "Changed Question": "asked", "Rephrased Question": "w", "Rephrased Question(SD)": "d"}
    names = list(card("mm-safetybench-tiny").scenarios)
    files = {f"data/processed_questions/{name}.json": json.dumps({"0": row}).encode() for name in names}
    files |= {f"data/imgs/{name}/SD_TYPO/0.jpg": encoded("JPEG") for name in names}
    return files | {
        "TinyVersion_ID_List.json": json.dumps([{"Scenario": n, "Sampled_ID_List": [0]} for n in names]).encode()
    }


def mmmu_outputs() -> Files:
    record = {"id": "validation_Art_1", "question_type": "multiple-choice", "answer": "A", "response": "A"}
    record |= {"all_choices": ["A", "B"], "index2ans": {"A": "red", "B": "blue"}}
    opened = {"id": "validation_Art_2", "question_type": "short-answer", "answer": ["1", "one"], "response": "it is 1"}
    known = {"question_type": "multiple-choice", "ground_truth": "A"}
    files = {
        "Art/output.json": [record, opened],
        "p.json": {"validation_Art_1": "A"},
        "k.json": {"validation_Art_1": known},
    }
    return {name: json.dumps(content).encode() for name, content in files.items()}


@cache
def adapted() -> Files:
    """A tiny model, and an adapter on it."""
    from peft import LoraConfig, get_peft_model

    from mm_cb.models.fingerprint import remember_base
    from tests.tiny_llava import tiny_llava

    with tempfile.TemporaryDirectory() as name:
        folder, tiny = Path(name), tiny_llava(blocks=1, vision_layers=1)
        tiny.model.save_pretrained(folder / "m")
        tiny.processor.save_pretrained(folder / "m")
        with_lora = get_peft_model(tiny.model, LoraConfig(r=1, target_modules=r".*language_model.*q_proj"))
        with_lora.peft_config["default"].base_model_name_or_path = "m"
        with_lora.save_pretrained(folder / "a", save_embedding_layers=False)
        remember_base(folder / "a", str(folder / "m"))
        return tree(folder)


def description() -> Files:
    """A tiny model without weights."""
    return {name: c for name, c in adapted().items() if name.startswith("m/") and "model.safetensors" not in name}


def model() -> Files:
    """A tiny model."""
    return {name: content for name, content in adapted().items() if name.startswith("m/")}


def model_index() -> Files:
    """A tiny model with an index, as large ones have."""
    from safetensors.torch import load

    files = dict(model())
    files["m/one.safetensors"] = files.pop("m/model.safetensors")
    places = dict.fromkeys(load(files["m/one.safetensors"]), "one.safetensors")
    return {**files, "m/model.safetensors.index.json": json.dumps({"metadata": {}, "weight_map": places}).encode()}


def saved_state() -> Files:
    import torch
    from safetensors.torch import save

    return {
        "s.safetensors": save({"attack.delta": torch.zeros(2), "kept.1": torch.zeros(2), "watch.step": torch.tensor(3)})
    }


def half_trained() -> Files:
    """A checkpoint that says which weights it is of."""
    return {"checkpoint-3/complete": b"0" * 64, "checkpoint-3/adapter_model.safetensors": b""}


def half_built() -> Files:
    """A folder of pairs to which a generator has answered."""
    from tests.fuzz.calls import build

    with tempfile.TemporaryDirectory() as name:
        (Path(name) / "images").mkdir()
        for number in range(2):
            picture(number).save(Path(name) / "images" / f"{number}.png")
        build(Path(name))
        return tree(Path(name))


def wild_parquet() -> Files:
    """LLaVA-Bench-in-the-Wild in the hub's columns."""
    row = {
        "question": "q",
        "image": {"bytes": png(), "path": None},
        "caption": "c",
        "gpt_answer": "a",
        "category": "conv",
    }
    return {"wild/train.parquet": parquet([{"question_id": str(n), **row} for n in range(2)])}


def judged_run() -> Files:
    """A judged run and the behaviours that it asked; with today's phrases, since verdicts by others are refused."""
    from mm_cb.judges.rules import RefusalStrings

    files = {**frozen("judged", "*.json*", "judgements/*")(), **inputs("two", "pictures")()}
    (card,) = (name for name in files if "/refusal-strings" in name and name.endswith(".json"))
    told = json.loads(files[card]) | {"source": RefusalStrings().source}
    return files | {card: json.dumps(told, indent=2).encode()}
