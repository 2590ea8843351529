"""Records of run directories: what each file and line holds, defined once; `mm_cb.core.checked` reads them.

The records are the JSON objects themselves: keys may be absent, and what nobody here knows is kept.
"""

from collections.abc import Mapping
from typing import Any, Required, TypedDict

RecipeFields = Mapping[str, Any]
"""What a command was asked for, as its run.json holds it: open, each command has fields of its own."""


JsonObject = dict[str, Any]
"""An object that nobody has looked into: of a file that is not ours, or on its way to a check of every value."""


Message = dict[str, Any]
"""One turn of a chat, or a part of its content, as transformers and servers take them:
``{"role": "user" | "assistant", "content": str | [{"type": "image"}, {"type": "text", "text": ...}, ...]}``"""


MetricsRow = Mapping[str, float | str]
"""One line of metrics.jsonl: ``step``, ``modality``, and by name what was logged, which depends on the loss."""


class Candidate(TypedDict, total=False):
    """One try of an item: an answer to one picture."""

    restart: int
    image: str | None
    """In the run's folder; None for a relaxation."""
    epsilon: int
    """Largest change of a value from the clean file, in 255ths."""
    distance: float | None
    """In the threat's own measure."""
    loss: float | None
    """The target's loss of the file."""
    objective_file: float | None
    objective_logged: float | None
    loss_clean: float
    """Where it is another one than its item's: of a chat whose text varies."""
    completion: str
    outcome: str | None
    iterate: int | None
    """Step; None = the selected picture of the run."""
    sample: int | None
    """Which answer drawn at random this is; None = the greedy one."""
    nll_base: float | None
    """Mean loss per token of the completion under the base model."""
    incoherent: bool
    selected_step: int | None
    zero_gradients: float | None
    judge_score: float | None
    prompt_sha256: str | None
    """Of the imported messages that were sent."""
    sent: str
    """The prompt, where it is another one than the behaviour's."""
    at_limit: bool | None
    """Whether the answer ends at the longest one that was asked for, and not where the model ended it."""
    pixels_by: str | None
    """``processor``, where the search ran the image processor itself because its imitation is not exact."""


class ScoredCompletion(Candidate, total=False):
    """A completion with its verdict, before it is said whose it is."""

    metric: Required[str]
    condition: Required[str]
    split: str | None
    category: str | None
    score: float | None
    reference_score: float | None
    """The judge's score of the reference answer; ``score`` is then on the judge's scale."""
    gibberish: bool | None
    seed: int
    clean_image: str | None
    reference: Any
    parsed: Any
    correct: bool
    counts: dict[str, int] | None


class Item(ScoredCompletion, total=False):
    """One line of items.jsonl: what one question or behaviour came to, for one subject under one condition.

    Of an attacked behaviour it holds the answer of the candidate that went worst.
    """

    id: Required[str]
    subject: Required[str]
    part: str
    """A third way to divide items: whether a universal picture was made for the behaviour."""
    prompt: str | None
    target: str
    loss_clean: float
    prefix_emitted: bool | None
    candidates: list[Candidate] | None
    worst_case: bool | None
    """Whether its attack counts in the worst case."""
    prefilled: bool | None
    """Whether its answer was generated behind its target."""
    given: str | None
    """What its attack was given: nothing, opening, form and words, supplied text, or base's pictures."""
    target_outcome: str
    """What the judge says of the target alone: one that is harmful itself is a supplied text."""
    knows_breaker: bool | None
    """Whether its attack is aimed at what an adapter changed."""
    outside_threat: bool
    """Whether the norm does not hold for its attack."""
    anneal: str
    """How its attack dialled the adapter up on the way, where it did."""
    draws: int
    """Of best-of-N: its variations, each tried whatever came of the others."""
    k: int
    """Answers judged per behaviour at most."""
    early_stop: bool
    relaxation: bool
    stopped_early: bool | None
    benign_target: bool
    adapter_changes_nothing: bool
    """Whether its subject's adapter does nothing."""
    undecoded: bool | None
    """Of a question with a right call: whether the answer could not be read as calls."""
    live_right: bool | None
    """Of BFCL's live questions: whether the call is right."""
    call: str | None
    """Of a request to an agent: what the answer is by rule, see `mm_cb.benchmarks.harmful_calls.answers.KINDS`."""
    screen: str | None
    """Of the same: the picture that it was asked with, a file of the run."""
    call_made: bool | None
    """Of a forbidden one: whether a function that it takes is called."""
    same_as: str
    """Attack whose results stand for this one's."""
    made_by: str
    """Attacks of the run that the picture is from."""
    judge: str
    beside: str
    """Id of the behaviour whose attacked picture was shown."""
    reason: str
    """Why there is no score."""
    thought: str
    """What the model thought in front of its completion; neither scored nor judged."""
    served: str
    """The model that the server of the completion names, where it is another name than was asked for."""
    answer: str | list[str]
    letter: str | None
    question_type: str
    run_dir: str
    """Not in files: where a report found it."""


class Check(TypedDict):
    """One line of checks.json."""

    name: str
    passed: Any
    """Only true is passed; None = not shown: the estimate passes, its interval reaches beyond."""
    value: Any
    expected: Any
    why: str


class Curve(TypedDict):
    """One entry of curves.json: quartiles over behaviours of an attack's loss, by step."""

    subject: str
    condition: str
    q25: list[float]
    q50: list[float]
    q75: list[float]
    n: int


class StateMeans(TypedDict):
    """Means over one kind of token, by entry of ``hidden_states``, adapter on against off."""

    cosine: list[float]
    norm_reference: list[float]
    norm_adapted: list[float]
    n: int


class SetStates(StateMeans, total=False):
    """The same of one set of rows: of its answers' tokens, and of each kind."""

    tokens: dict[str, StateMeans]


class Representations(TypedDict, total=False):
    """representations.json."""

    target_layers: list[int]
    """That a drawing points at."""
    lora_blocks: list[int] | None
    layers: Required[list[int]]
    sets: Required[dict[str, SetStates]]


class Agreement(TypedDict, total=False):
    """One entry of judgements/agreement.json: two judges on the same completions."""

    judges: Required[list[str]]
    n: Required[int]
    not_judged: int
    agreement: Required[float | None]
    """Percent."""
    kappa: Required[float | None]
    disagreements: Required[list[dict[str, str]]]
    """Which answer, and what each judge said of it."""


class StoredVerdict(TypedDict):
    """One line of judgements/<judge>.jsonl, as far as judges are compared."""

    key: str
    """Of the completion."""
    outcome: str


class Completion(TypedDict, total=False):
    """One line of parts/completions.jsonl: what a model or a server said to a request."""

    key: Required[str]
    """Of the request."""
    completion: Required[str]
    thought: str
    """What stood in front of it, or came beside it: no part of the answer."""
    refusal: bool
    """Whether the server calls the answer a refusal."""
    served: str
    """The model that the server names, where it is another name than was asked for."""
    at_limit: bool
    """Whether it ends at the longest answer that was asked for."""
    refused: str
    """Why there is no answer."""
    cut: str
    """The same of an answer that was cut before it began."""


class Timing(TypedDict, total=False):
    """One line of timings.jsonl."""

    stage: Required[str]
    seconds: Required[float]
    forward_passes: int | None


class Hardware(TypedDict, total=False):
    """The machine of a run."""

    system: str
    processor: str
    cores: int
    memory_gib: float
    torch_threads: int
    gpus: list[str]


class Code(TypedDict, total=False):
    """The code of a run."""

    versions: dict[str, str | None]
    """Of Python, of mm-cb and of the packages that decide numbers; None for one that is not installed."""
    git: str | None
    """Commit, with ``+changes`` when files differ from it; None outside a checkout."""


class _Steps(TypedDict, total=False):
    steps: int | None


class RecipeParts(TypedDict, total=False):
    """What of a run's recipe is looked into, whichever command's it is; all else in it may be anything."""

    runs: list[dict[str, Any]]
    options: _Steps | None
    rerouting: dict[str, Any] | None
    annealing: dict[str, Any] | None
    steps: int | None


class Resumption(Code, total=False):
    """When a run was gone on with, and the code if it had changed."""

    at: Required[str]


class Run(Code, total=False):
    """run.json."""

    schema: int
    command: Required[str]
    recipe: Required[RecipeFields]
    seed: Required[int]
    inputs: Required[dict[str, str]]
    """File or repository → hash of its content, or commit."""
    hardware: Hardware
    started: str
    ended: str | None
    """None while it is under way."""
    left_out: dict[str, int]
    """Why rows of the data were not used → how many; absent where all were."""
    resumed: list[Resumption]
    files: dict[str, str]
    """File of the finished run that nothing writes anew → hash of its content."""
    seal: str
    """Of all of the above, see `mm_cb.core.seal`; checked and taken off where the file is read."""
