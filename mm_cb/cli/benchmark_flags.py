"""One command a benchmark, made from what the benchmark says about itself: its settings are the flags."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from mm_cb.benchmarks.base import Benchmark
from mm_cb.benchmarks.registry import get_benchmark
from mm_cb.benchmarks.settings import Settings, StoredAnswers
from mm_cb.cli.attacked import beside_the_base
from mm_cb.cli.options import (
    Adapter,
    Device,
    Dtype,
    Out,
    ProbeFolder,
    RayCount,
    Seed,
    System,
    Thinking,
    read_system,
    refuse_old_settings,
)
from mm_cb.cli.options import given as typed
from mm_cb.core.closing import TYPED, Hint, again, base_folder, say, what_next
from mm_cb.core.errors import UserError

MODEL, WHAT, RUN = "Model", "Benchmark", "Run"
OLD_NAMES = {"over-refusal": {"pictures": "--beside"}}
"""Settings that have another name as a flag than they had as ``key=value``."""
Parameter = inspect.Parameter


def eval_command(benchmark: Benchmark) -> Callable[..., None]:
    """The function behind ``mm-cb eval NAME``."""
    stored = _names(benchmark.stored) if benchmark.stored else []
    hidden = [name for name in stored if name not in _names(benchmark.settings)]

    def command(**given: Any) -> None:
        for name in hidden:
            if given.pop(name):
                raise UserError(
                    f"stored outputs are scored without a model now: write `mm-cb score {benchmark.name} "
                    f"{_flag(name)} ... --out DIR`."
                )
        refuse_old_settings(given.pop("words"), _old_flags(benchmark))
        text = read_system(given.pop("system"))
        ray = given.pop("ray")
        common = {name: given.pop(name) for name in _COMMON}
        if common["model"] is None:
            raise UserError(f"`mm-cb eval {benchmark.name}` needs `--model`.")
        settings = _read(benchmark.settings, given)
        if common["endpoint"] is not None:
            _refuse_idle(benchmark, settings)
            if ray is not None:
                raise UserError(
                    "`--ray` is for a model in its processes, `--endpoint` asks one that is served: drop one."
                )
        from mm_cb.benchmarks.runner import run_benchmark
        from mm_cb.inference.source import ModelSource, chosen_name

        source = ModelSource(
            common["model"],
            common["adapter"],
            common["device"],
            common["dtype"],
            common["endpoint"],
            text,
            probe=common["probe"],
            thinking=common["thinking"],
        )
        subject = chosen_name(source, common["subject"])
        out: Path = common["out"]
        more = {"data": common["data"], "subject": subject, "seed": common["seed"]}
        if ray is not None:
            from mm_cb.benchmarks.on_ray import run_on_ray

            run_on_ray(ray, benchmark, source, settings, out, **more)
        else:
            run_benchmark(benchmark, source, settings, out, **more)
        show_measured(out, benchmark.name, subject)
        benchmark.refuse(out)

    parameters = [
        *_model_options(),
        *_data_options(benchmark, settings=True),
        *_run_options("base, with --adapter rr"),
        _shared("ray", RayCount, None, RUN),
        _words(),
    ]
    parameters += [_hidden(name) for name in hidden]
    return _described(command, parameters, f"{benchmark.title}: {benchmark.about}. It needs {benchmark.needs}.")


def _refuse_idle(benchmark: Benchmark, settings: Settings) -> None:
    """Refuse what says how a model is loaded, where it is served and nothing else is loaded.

    Raises:
        UserError: Naming the first such flag.
    """
    if idle := [flag for flag in typed("--device", "--dtype") if flag not in benchmark.loading(settings)]:
        raise UserError(
            f"`{idle[0]}` is for a model in this process, `--endpoint` asks one that is served: drop one of them."
        )


def score_command(benchmark: Benchmark) -> Callable[..., None]:
    """The function behind ``mm-cb score NAME``."""
    kind = benchmark.stored
    assert kind is not None, "benchmarks without stored answers have no such command"
    many = [field.name for field in dataclasses.fields(kind) if field.metadata.get("many")]

    def command(**given: Any) -> None:
        words = given.pop("words") or []
        if many and words:
            given[many[0]] = [*(given[many[0]] or []), *words]
        else:
            refuse_old_settings(words, {name: _flag(name) for name in _names(kind)})
        out, subject = given.pop("out"), given.pop("subject")
        seed, data = given.pop("seed"), given.pop("data", None)
        benchmark.score_stored(_read(kind, given), out, data=data, subject=subject or "base", seed=seed)
        show_measured(out, benchmark.name, subject or "base")

    options = _setting_options(kind, "Stored outputs")
    options += _data_options(benchmark, settings=False) if issubclass(kind, StoredAnswers) else []
    parameters = [*options, *_run_options("base"), _words()]
    return _described(command, parameters, f"Score stored outputs of {benchmark.title}, without a model.")


def show_measured(folder: Path, benchmark: str, subject: str) -> None:
    """Print a finished run of a benchmark, what others have published of it, and what to type next."""
    from mm_cb.core.runs import read_run
    from mm_cb.data.cards import cards

    known = get_benchmark(benchmark)
    known.show(folder, subject)
    for metric in known.metrics[:1]:
        better = {True: "; higher is better", False: "; lower is better", None: ""}[metric.higher_is_better]
        say(f"{metric.label}: {metric.rule}{better}", "  ")
    published = [card.published for card in cards().values() if card.hub is not None and card.hub == known.dataset]
    for line in (line for lines in published for line in lines):
        say(f"published: {line}", "  ")
    recipe = read_run(folder)["recipe"]
    if recipe.get("adapter") is not None:
        typed = {"--adapter": None, "--subject": None, "--out": base_folder(folder)}
        what_next(*beside_the_base(folder, again(typed) if TYPED[:1] == ["eval"] else []))
        return
    what_next(Hint("the page, of this run or of several side by side", ["report", folder]))


_COMMON = ("out", "model", "adapter", "probe", "thinking", "endpoint", "data", "subject", "seed", "device", "dtype")


def _model_options() -> list[Parameter]:
    return [
        _option("model", str | None, "M", "Hub id, local directory, or `miniature`.  [required]", MODEL),
        _shared("adapter", Adapter, None, MODEL),
        _shared("probe", ProbeFolder, None, MODEL),
        _option("endpoint", str | None, "URL", "Ask the model of this name at an OpenAI-compatible address.", MODEL),
        _shared("system", System, None, MODEL),
        _shared("thinking", Thinking, False, MODEL),
        _shared("device", Device, "cpu", MODEL),
        _shared("dtype", Dtype, "float32", MODEL),
    ]


def _data_options(benchmark: Benchmark, *, settings: bool) -> list[Parameter]:
    default = f"  [default: {benchmark.dataset}]" if benchmark.dataset else "  [required]"
    data = _option("data", str | None, "D", f"{benchmark.data_help}{default}", WHAT)
    return [data, *(_setting_options(benchmark.settings, WHAT) if settings else [])]


def _run_options(default: str) -> list[Parameter]:
    subject = f"Its name in results.json.  [default: {default}]"
    return [
        _shared("out", Out, Parameter.empty, RUN),
        _option("subject", str | None, "NAME", subject, RUN),
        _shared("seed", Seed, 0, RUN),
    ]


def _setting_options(kind: type[Settings], panel: str) -> list[Parameter]:
    made = []
    for field in dataclasses.fields(kind):
        about = field.metadata
        unset = field.default in ("", (), None) or field.default is False
        default = ",".join(field.default) if isinstance(field.default, tuple) else str(field.default)
        shown = "" if unset or "[default" in about["about"] else default
        choices = f" {', '.join(about['choices'])}." if about["choices"] else ""
        text = f"{about['about']}{choices}{f'  [default: {shown}]' if shown else ''}"
        if (limit := about["limit"]) is not None:
            text = f"{text}  [{limit.range}]"
        type_: Any = list[str] | None if about["many"] else bool if field.default is False else str | None
        made.append(_option(field.name, type_, about["metavar"] or _metavar(field.default), text.strip(), panel))
    return made


def _metavar(default: Any) -> str:
    return "N" if isinstance(default, int | float) else "A,B" if isinstance(default, tuple) else "TEXT"


def _option(name: str, type_: Any, metavar: str, text: str, panel: str) -> Parameter:
    switch = type_ is bool
    info = typer.Option(_flag(name), metavar=None if switch else metavar, help=text, rich_help_panel=panel)
    return Parameter(name, Parameter.KEYWORD_ONLY, default=False if switch else None, annotation=Annotated[type_, info])


def _shared(name: str, annotation: Any, default: Any, panel: str) -> Parameter:
    """An option that several commands share, in one of our groups."""
    type_, info = annotation.__origin__, annotation.__metadata__[0]
    grouped = typer.Option(
        *([_flag(name)] if info.default is ... else [info.default]),
        metavar=info.metavar,
        help=info.help,
        callback=info.callback,
        parser=info.parser,
        rich_help_panel=panel,
    )
    return Parameter(name, Parameter.KEYWORD_ONLY, default=default, annotation=Annotated[type_, grouped])


def _words() -> Parameter:
    annotation = Annotated[list[str] | None, typer.Argument(metavar="", hidden=True)]
    return Parameter("words", Parameter.KEYWORD_ONLY, default=None, annotation=annotation)


def _hidden(name: str) -> Parameter:
    """A flag of `mm-cb score`, taken by `mm-cb eval` only to be answered."""
    switch = name == "official_failures"
    type_: Any = bool if switch else str | None
    annotation: Any = Annotated[type_, typer.Option(_flag(name), hidden=True)]
    return Parameter(name, Parameter.KEYWORD_ONLY, default=False if switch else None, annotation=annotation)


def _described(command: Callable[..., None], parameters: list[Parameter], text: str) -> Callable[..., None]:
    required = [one for one in parameters if one.default is Parameter.empty]
    ordered = [*required, *(one for one in parameters if one.default is not Parameter.empty)]
    command.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    command.__annotations__ = {one.name: one.annotation for one in ordered}
    command.__doc__ = f"{text[:1].upper()}{text[1:]}"
    return command


def _names(kind: type[Settings] | None) -> list[str]:
    return [] if kind is None else [field.name for field in dataclasses.fields(kind)]


def _flag(name: str) -> str:
    return f"--{name.replace('_', '-')}"


def _old_flags(benchmark: Benchmark) -> dict[str, str]:
    known = {name: _flag(name) for name in _names(benchmark.settings)}
    return known | OLD_NAMES.get(benchmark.name, {})


def _read(kind: type[Any], given: Mapping[str, Any]) -> Any:
    """The settings of a class from what stood behind its flags."""
    fields = {field.name: field for field in dataclasses.fields(kind)}
    kept = {name: value for name, value in given.items() if value is not None and value is not False}
    return kind(**{name: _value(fields[name], value) for name, value in kept.items()})


def _value(field: Any, value: Any) -> Any:
    """What stood behind a flag, read as what its field holds."""
    if isinstance(value, list):
        return tuple(value)
    if value is True:
        return True
    if (limit := field.metadata.get("limit")) is not None:
        return limit.read(_flag(field.name), value)
    if isinstance(field.default, tuple):
        parts = tuple(part.strip() for part in value.split(",") if part.strip())
        if len(set(parts)) < len(parts):
            raise UserError(f"`{_flag(field.name)}` must name each once, got `{value}`.")
        return parts
    return value
