"""``mm-cb eval llava-wild`` and ``mm-cb eval over-refusal``."""

from pathlib import Path
from typing import Annotated

import typer

from mm_cb.cli.options import Adapter, Device, Dtype, Model, Out, Seed, System, read_system
from mm_cb.core.errors import UserError

LLAVA_WILD = "Example: mm-cb eval llava-wild --model M --rule-file rule.json --judge-model J --out runs/wild"
OVER_REFUSAL = (
    "Example: mm-cb eval over-refusal --model miniature --data requests.jsonl --out runs/beside pictures=runs/attack"
)

ModelEndpoint = Annotated[
    str | None, typer.Option(metavar="URL", help="Ask the model of this name at an OpenAI-compatible address.")
]
Subject = Annotated[
    str | None, typer.Option(metavar="NAME", help="Its name in results.json.  [default: base, with --adapter rr]")
]


def llava_wild(
    out: Out,
    more: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[KEY=VALUE]",
            help="max_new_tokens, judge_runs, orders (reference_first, both), judge_temperature, judge_system, limit, "
            "batch; with --reviews further files.",
        ),
    ] = None,
    reviews: Annotated[
        list[Path] | None, typer.Option(metavar="FILE...", help="Score stored official review files (JSONL).")
    ] = None,
    official_failures: Annotated[
        bool, typer.Option("--official-failures", help="Count failed judgements as -1 points, as the original does.")
    ] = False,
    model: Annotated[str | None, typer.Option(metavar="M", help="Hub id, local directory, or `miniature`.")] = None,
    adapter: Adapter = None,
    endpoint: ModelEndpoint = None,
    data: Annotated[
        str | None, typer.Option(metavar="D", help="Folder with the original's files, or a hub id with its columns.")
    ] = None,
    rule_file: Annotated[
        Path | None, typer.Option(metavar="FILE", help="The original llava/eval/table/rule.json (checked).")
    ] = None,
    own_rule: Annotated[
        Path | None, typer.Option(metavar="FILE", help="A rule text of your own: scores compare with nobody else's.")
    ] = None,
    judge_model: Annotated[
        str | None, typer.Option(metavar="J", help="The judge: its served name, a folder or a hub id.")
    ] = None,
    judge_endpoint: Annotated[
        str | None,
        typer.Option(metavar="URL", help="OpenAI-compatible address of the judge; its key in MM_CB_API_KEY."),
    ] = None,
    answers_of: Annotated[
        Path | None,
        typer.Option(
            metavar="RUN_DIR", help="Judge the answers of this earlier run of the same model, ask none again."
        ),
    ] = None,
    subject: Subject = None,
    system: System = None,
    seed: Seed = 0,
    device: Device = "cpu",
    dtype: Dtype = "float32",
) -> None:
    """Score LLaVA-Bench-in-the-Wild: of a model, with a judge, or of stored reviews.

    Failed judgements are counted and left out; past 2 % of them there is no score.
    """
    if (model is None) == (not reviews):
        raise UserError("give one of `--model` (with a judge) and `--reviews`.")
    if reviews:
        asking = {"--adapter": adapter, "--endpoint": endpoint, "--data": data, "--system": system}
        asking |= {"--rule-file": rule_file, "--own-rule": own_rule, "--judge-model": judge_model}
        asking |= {"--judge-endpoint": judge_endpoint, "--subject": subject, "--answers-of": answers_of}
        if useless := [name for name, value in asking.items() if value is not None]:
            raise UserError(f"`{useless[0]}` needs `--model`: stored reviews are summarised as they are.")
        from mm_cb.benchmarks.llava_wild.stored import run_reviews

        files = [*reviews, *(Path(name) for name in more or [])]
        run_reviews(files, out, official_failures=official_failures, seed=seed)
        return
    if official_failures:
        raise UserError("`--official-failures` belongs to `--reviews`; a run keeps its reviews for that.")
    if model is None or judge_model is None or (rule_file is None) == (own_rule is None):
        raise UserError("`--model` needs `--judge-model` and one of `--rule-file`, `--own-rule`.")
    from mm_cb.benchmarks.llava_wild.judging import read_own_rule, read_rule
    from mm_cb.benchmarks.llava_wild.run import JudgeSource, Settings, run_wild
    from mm_cb.core.settings import with_overrides
    from mm_cb.inference.source import Source, subject_name

    text = read_system(system)
    run_wild(
        Source(model, adapter, device, dtype, endpoint, text),
        JudgeSource(judge_model, judge_endpoint, device),
        read_rule(rule_file) if rule_file is not None else read_own_rule(own_rule or Path()),
        with_overrides(Settings(), more or []),
        out,
        data=data,
        subject=subject or subject_name(adapter, text),
        seed=seed,
        answers_of=answers_of,
    )


def over_refusal(
    model: Model,
    data: Annotated[
        str,
        typer.Option(
            metavar="D", help="Our .jsonl, MOSSBench's information .json, XSTest's prompts .csv, or AIcell/MOSSBench."
        ),
    ],
    out: Out,
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="[KEY=VALUE]", help="max_new_tokens, limit, batch, pictures.")
    ] = None,
    adapter: Adapter = None,
    endpoint: ModelEndpoint = None,
    judge: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            help="refusal-strings (a proxy) or miniature; other judges afterwards: mm-cb judge RUN_DIR.  "
            "[default: refusal-strings]",
        ),
    ] = None,
    subject: Subject = None,
    system: System = None,
    seed: Seed = 0,
    device: Device = "cpu",
    dtype: Dtype = "float32",
) -> None:
    """Measure how often benign requests are refused, wholly or partly, answered, or answered incoherently.

    With pictures=RUN, a run of `mm-cb attack`, requests without a picture are asked beside its pictures, attack by
    attack: a breaker that fires on any attacked picture is robust and useless.
    """
    from mm_cb.benchmarks.over_refusal.run import Settings, run_over_refusal
    from mm_cb.core.settings import with_overrides
    from mm_cb.inference.source import Source, subject_name

    text = read_system(system)
    run_over_refusal(
        Source(model, adapter, device, dtype, endpoint, text),
        with_overrides(Settings(), overrides or []),
        out,
        data=data,
        judge=judge,
        subject=subject or subject_name(adapter, text),
        seed=seed,
    )
