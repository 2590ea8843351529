"""Which model is to be measured, as the command line names it."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from mm_cb.core.devices import refuse_unknown
from mm_cb.core.embedded import embedded, is_fiction
from mm_cb.core.errors import UserError
from mm_cb.core.folding import is_blank
from mm_cb.core.names import alike
from mm_cb.core.places import found_again, may_be
from mm_cb.core.recipe_files import recipe_model, recipe_names
from mm_cb.core.records import Run

if TYPE_CHECKING:
    from mm_cb.core.hub import Repository


_FOLDER = "the path of a folder"
_TEXTS = {
    "model": "a hub id, a folder's path or an embedded model's name",
    "adapter": _FOLDER,
    "device": "a text such as cpu or cuda:0",
    "dtype": "float32, bfloat16 or float16",
    "base": "a hub id or a folder's path",
    "probe": _FOLDER,
}
_NEEDED = ("model", "device", "dtype")


@dataclass(frozen=True)
class ModelSource:
    """A model with what it takes to load it."""

    model: str
    """Hub id, local directory, or an embedded model's name."""
    adapter: str | None = None
    """Folder of a PEFT adapter."""
    device: str = "cpu"
    dtype: str = "float32"
    endpoint: str | None = None
    """OpenAI-compatible address that serves the model under this name; None = in this process."""
    system: str | None = None
    """Text in front of every request."""
    base: str | None = None
    """What a breaker without adapter was made from."""
    probe: str | None = None
    """Folder of a harmfulness probe."""
    thinking: bool = False
    """Whether it thinks before it answers, where its chat template leaves that open: targets stand in its thoughts."""

    def __post_init__(self) -> None:
        """Check types and the name of the device; a torch dtype or device becomes its name.

        Raises:
            TypeError: Saying what was expected.
            UserError: If a name is empty, or there is no such device on any machine.
        """
        for name, what in _TEXTS.items():
            value = getattr(self, name)
            if isinstance(value, Path) or (name in ("device", "dtype") and type(value).__module__ == "torch"):
                value = str(value).removeprefix("torch.")
                object.__setattr__(self, name, value)
            if value == "":
                raise UserError(f"`{name}` must be {what}, got an empty text.")
            if not isinstance(value, str | None) or (value is None and name in _NEEDED):
                raise TypeError(f"`{name}` must be {what}, got {value!r:.60} ({type(value).__name__}).")
        refuse_unknown(self.device)

    def identity(self) -> dict[str, str | bool | None]:
        """What belongs to a run's identity: that the model is served, not the address it is served at today."""
        held = {**asdict(self), "endpoint": "served" if self.endpoint else None}
        return {key: value for key, value in held.items() if key not in ("base", "probe", "thinking") or value}

    @property
    def breaker(self) -> bool:
        """Whether it is told apart from a base: by an adapter, or by the base itself."""
        return self.adapter is not None or self.base is not None

    @property
    def fiction(self) -> bool:
        """Whether it is a model of a made-up world, so that pages show what it says; of a served one nobody knows."""
        return self.endpoint is None and is_fiction(self.model)

    def weights(self) -> list[Path | Repository]:
        """What is behind the names: files and repositories, whose content belongs to a run; nothing if it is served.

        Raises:
            UserError: If the model is neither here nor on the hub.
        """
        if self.endpoint is not None:
            return []
        from mm_cb.models.cache import model_inputs

        base = model_inputs(self.base) if self.base else []
        adapter = sorted(Path(self.adapter).glob("*.safetensors")) if self.adapter else []
        probe = sorted(Path(self.probe).glob("*.safetensors")) if self.probe else []
        return [*model_inputs(self.model), *base, *adapter, *probe]


def source_again(
    folder: Path,
    run: Run,
    remedy: str,
    device: str,
    model: str | None = None,
    adapter: str | None = None,
    base: str | None = None,
) -> ModelSource:
    """The model of a run directory, wherever it lies now.

    Args:
        folder: The run's.
        run: Its run.json.
        remedy: What to do if a part is not found, for the error line; ``{}`` is ``model``, ``adapter`` or
            ``base``.
        device: Where to load it.
        model: Where the model lies, if that is given.
        adapter: Likewise.
        base: Likewise.

    Raises:
        UserError: If it is neither where the run found it nor beside the run, or a part is given that the run had not.
    """
    recipe, inputs = run["recipe"], run["inputs"]
    given = {"model": model, "adapter": adapter, "base": base}
    for part in (part for part, place in given.items() if place is not None and recipe.get(part) is None):
        raise UserError(f"`{folder}` was made without `--{part}`: leave it out.")
    for part, place in given.items():
        if place is not None and not may_be(place, str(recipe[part]), inputs):
            raise UserError(
                f"`{place}` holds other weights than `{folder}` was made with; give the same as `--{part}`."
            )
    for part, held in ((part, recipe.get(part)) for part in given):
        if given[part] is None and held is not None:
            given[part] = found_again(folder, held, inputs, remedy.format(part))
    dtype = recipe.get("dtype", "float32")
    model, adapter, base = str(given["model"]), given["adapter"], given["base"]
    probe = recipe.get("probe")
    probe = probe and found_again(folder, probe, inputs, "train it again: `mm-cb probe`")
    thinking = bool(recipe.get("thinking", False))
    return ModelSource(
        model, adapter, device, dtype, system=recipe["system"], base=base, probe=probe, thinking=thinking
    )


def subject_name(breaker: bool, system: str | None, probe: str | None = None) -> str:
    """What a model is called in results.json: ``base`` or ``rr``, then ``+probe`` and ``+safety_prompt``."""
    name = ("rr" if breaker else "base") + ("+probe" if probe is not None else "")
    return name + ("+safety_prompt" if system is not None else "")


_OURS = [
    f"{kind}{probe}{prompt}" for kind in ("base", "rr") for probe in ("", "+probe") for prompt in ("", "+safety_prompt")
]


def refuse_lookalike(name: str) -> None:
    """Refuse a model's name that reads as one of ours and is another, or has blanks around it.

    Raises:
        UserError: Saying which it looks like.
    """
    ours = next((one for one in _OURS if alike(one) == alike(name) and one != name), None)
    if ours is not None or is_blank(name) or name != name.strip():
        meant = f"which reads as `{ours}` and is another: write `{ours}`, or" if ours else "which is blank at an end:"
        raise UserError(f"`--subject` must be a name that nobody mistakes, got `{name}`, {meant} take another name.")


def chosen_name(source: ModelSource, given: str | None) -> str:
    """What a model is called in results.json: the name that is given, or its own, see `subject_name`.

    A page takes ``base`` and ``rr`` for what they say, so that a model that is something else cannot have them. Of a
    served one, and of a folder that may be a merged breaker, nobody knows.

    Raises:
        UserError: If the name says what the model is not, or reads as another.
    """
    own = subject_name(source.breaker, source.system, source.probe)
    if given is None:
        return own
    refuse_lookalike(given)
    kind, *more = given.split("+")
    if kind not in ("base", "rr") or source.endpoint is not None:
        return given
    what = [] if source.adapter is None else ["`--adapter`"]
    what += [] if source.probe is None or "probe" in more else ["`--probe`"]
    what += [] if source.system is None or "safety_prompt" in more else ["`--system`"]
    if kind == "rr":
        what = [one for one in what if one != "`--adapter`"]
        what += ["a base without `--adapter`"] if not source.breaker and _is_base(source.model) else []
    for flag, held in (("probe", source.probe), ("safety_prompt", source.system)):
        what += [f"no `--{'system' if flag == 'safety_prompt' else flag}`"] if flag in more and held is None else []
    if what:
        raise UserError(
            f"`--subject {given}` says what this model is not, it is given {' and '.join(what)}: leave `--subject` out "
            f"(it is `{own}` then), or take a name of your own."
        )
    return given


def _is_base(model: str) -> bool:
    """Whether a name stands for a model that breakers are made from: an embedded one, or a shipped recipe's."""
    return embedded(model) is not None or model in map(recipe_model, recipe_names())
