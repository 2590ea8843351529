"""Every reader of a user's file: a valid sample, which of its files may come damaged, and the call that reads it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from image_attacks import ImageFileError
from mm_cb.core.errors import UserError
from tests.fuzz import calls, samples
from tests.fuzz.samples import ROOT, TEXTS, encoded, frozen, frozen_file, inputs, lines, one, with_picture


class Reader(NamedTuple):
    """One reader, or several of the same file."""

    name: str
    files: Callable[[], samples.Files]
    """A valid input: path in its folder → content."""
    read: Callable[[Path], object]
    """Given the folder, gives a value, or refuses."""
    damaged: str = ""
    """Which of the files come damaged, one at a time: names with blanks between them; none = any."""
    refuses: tuple[type[Exception], ...] = (UserError, ImageFileError)
    """What it may raise: what the command line prints as one line, or what a Python function's docstring says."""


IN_PYTHON = (UserError, ImageFileError, ValueError, TypeError)
RUN = "run/run.json run/items.jsonl run/results.json"
PICTURES = (("PNG", "RGB"), ("PNG", "P"), ("JPEG", "RGB"), ("GIF", "P"), ("TIFF", "RGB"), ("WEBP", "RGB"))
MOSSBENCH = {"1": {"question": "q", "image": "a.png", "metadata": {"over": "x"}}}
BREAKERS = [{"prompt": "a", "output": "b", "llama3_output": "c"}] * 3
LLAVA = [{"from": "human", "value": "<image>\nwhat is it"}, {"from": "gpt", "value": "a square"}]
LLAVA_ROWS = lines([{"image": "a.png", "conversations": LLAVA}] * 2)
IN_MEMORY = lines([[{"messages": TEXTS, "set": "retain"}] * 2])

PROMPTS_AND_ROWS = (
    Reader("behaviours", inputs("behaviors", "pictures"), calls.behaviors, "behaviors.jsonl"),
    Reader("prompts, JSONL", one("p.jsonl", lines([{"prompt": "a"}, {"prompt": "b"}])), calls.prompts),
    Reader("prompts, CSV", one("p.csv", b'BehaviorID,Behavior\n1,"a, b"\n2,c\n'), calls.prompts),
    Reader("HarmBench", samples.harmbench, calls.built("harmbench")),
    Reader("MM-SafetyBench", samples.safetybench, calls.built("mm_safetybench")),
    Reader("scenarios", one("s.json", b'{"Row-1": "fraud"}'), calls.scenarios),
    Reader("corpus, text", one("c.txt", b"the sky is blue\n\na tree\n"), calls.corpus),
    Reader("corpus, JSONL", one("c.jsonl", lines([{"target": "a", "prompt": "b"}, {"target": "c"}])), calls.corpus),
    Reader("benign targets", one("t.txt", b"the sky is blue .\n\na tree\n"), calls.targets),
    Reader("data card", one("c.yaml", ROOT / "data/cards/mossbench.yaml"), calls.cards),
    Reader("recipe", one("r.yaml", ROOT / "mm_cb/training/recipes/llava-next-mistral-7b.yaml"), calls.recipe),
    Reader("rows, own", with_picture("rows.jsonl", lines(samples.OWN)), calls.mixture),
    Reader("rows, array", one("rows.json", json.dumps(BREAKERS, indent=1).encode()), calls.mixture),
    Reader("rows, CSV", one("rows.csv", samples.XSTEST), calls.mixture),
    Reader("rows, LLaVA", with_picture("rows.jsonl", LLAVA_ROWS), calls.mixture),
    Reader("rows, messages", one("rows.jsonl", lines([{"messages": TEXTS}] * 2)), calls.mixture),
    Reader("rows, saved", samples.saved_rows, calls.mixture),
    Reader("rows, Python", one("r.json", IN_MEMORY), calls.records, "", IN_PYTHON),
    Reader("pairs gone on with", samples.half_built, calls.build),
    Reader("prompt files", one("p.txt", b"Is it? {behavior} {completion}\n"), calls.prompt_files),
    Reader("judge's card", one("README.md", samples.JUDGE_CARD), calls.judge_card),
    Reader("answers", one("a.txt", b'8 7\n{"query": "a", "completion": "b"}\nThe answer is (A). 1,000'), calls.answers),
    Reader("a server's answer", one("a.json", samples.SERVED), calls.served),
    Reader("a user's own file", one("mine.py", samples.OWN_FILE), calls.users_code),
)
BENCHMARKS = (
    Reader("requests, own", inputs("requests", "pictures"), calls.requests, "requests.jsonl"),
    Reader("requests, MOSSBench", with_picture("requests.json", lines([MOSSBENCH])), calls.requests),
    Reader("requests, XSTest", one("requests.csv", samples.SAFE), calls.requests),
    Reader("requests, table", with_picture("requests.csv", samples.TABLE), calls.requests),
    Reader("POPE, Parquet", samples.pope_parquet, calls.pope),
    Reader("POPE, lines and answers", samples.pope_lines, calls.pope),
    Reader("BFCL", samples.function_calling, calls.function_calling),
    Reader("harmful calls", samples.harmful_calls, calls.harmful_calls),
    Reader("AgentHarm", samples.agentharm, calls.agentharm),
    Reader("behaviours, calls", samples.target_calls, calls.target_calls),
    Reader("functions", samples.functions, calls.functions),
    Reader("LLaVA-Wild", inputs("wild"), calls.wild),
    Reader("LLaVA-Wild, Parquet", samples.wild_parquet, calls.wild),
    Reader("LLaVA-Wild, reviews", frozen_file("llava-wild/reviews/run-1-reference_first.jsonl"), calls.reviews),
    Reader("MMMU", inputs("mmmu"), calls.mmmu),
    Reader("MMMU, stored", samples.mmmu_outputs, calls.mmmu_responses),
)
RUNS = (
    Reader("report, judged", frozen("judged", "*.json*", "judgements/*", "images/**/*"), calls.report),
    Reader("report, llava-wild", frozen("llava-wild", "*.json*"), calls.report),
    Reader("report, mmmu", frozen("mmmu", "*.json*"), calls.report),
    Reader("report, over-refusal", frozen("over-refusal", "*.json*"), calls.report),
    Reader("report, transfer", frozen("transfer", "*.json*"), calls.report),
    Reader("judge", samples.judged_run, calls.judged_again),
    Reader("attack verify", frozen("attack-base"), calls.verify),
    Reader("attack transfer", frozen("attack-base"), calls.transferred),
    Reader("pictures of a run", frozen("attack-base"), calls.shown_beside, f"{RUN} run/behaviors.jsonl"),
    Reader("shards", frozen("attack", "*.json*", "shards/**/*"), calls.gathered),
    Reader("a run gone on with", frozen("attack", "run.json"), calls.gone_on_with),
    Reader("shown, mmmu", frozen("mmmu", "*.json*"), calls.shown("mmmu")),
    Reader("shown, llava-wild", frozen("llava-wild"), calls.shown("llava-wild")),
    Reader("shown, over-refusal", frozen("over-refusal"), calls.shown("over-refusal")),
    Reader("shown, attack check", frozen("check", "*.json"), calls.battery, "run/battery.json run/checks.json"),
    Reader("pieces of a run", frozen("judged", "run.json", "parts/*"), calls.pieces),
    Reader("answers taken over", frozen("llava-wild", "run.json", "parts/*"), calls.taken_over),
    Reader("stores of answers", frozen("llava-wild", "parts/*"), calls.stores),
    Reader("state of an attack", samples.saved_state, calls.attack_state),
    Reader("checkpoint", samples.half_trained, calls.checkpoint, "checkpoint-3/complete"),
)
MODELS = (
    Reader("model, description", samples.description, calls.described),
    Reader("model", samples.model, calls.model),
    Reader("model, index", samples.model_index, calls.weights, "m/model.safetensors.index.json"),
    Reader("adapter", samples.adapted, calls.adapter, "a/adapter_config.json a/adapter_model.safetensors a/base.json"),
)
READERS = (
    *PROMPTS_AND_ROWS,
    *BENCHMARKS,
    *RUNS,
    *MODELS,
    *(
        Reader(f"{form} {mode}", one(f"a.{form.lower()}", encoded(form, mode)), calls.pictures)
        for form, mode in PICTURES
    ),
)
