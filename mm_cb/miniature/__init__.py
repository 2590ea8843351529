"""The miniature: a small real LLaVA-NeXT in a made-up world of brews, and all that is special about it.

It is a guest, and so is the agent that grew out of it: importing this registers their models, data, recipes and judges
under two names, which nothing below knows.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

from mm_cb.core.embedded import Embedded, register
from mm_cb.core.paths import data_path
from mm_cb.judges.registry import JudgeEntry, register_judge
from mm_cb.metrics.table import Metric, register_metric

NAME = "miniature"
AGENT = "miniature-agent"
_FOLDER = Path(__file__).resolve().parent


@lru_cache(maxsize=1)  # a run is planned with them, then trained on them
def _training_examples(seed: int) -> Sequence[Any]:
    from mm_cb.miniature.data import training_examples

    return tuple(training_examples(seed=seed))


def _refusal() -> str:
    from mm_cb.miniature.language import REFUSAL

    return REFUSAL


def _judge(_: Any) -> Any:
    from mm_cb.miniature.scoring import MiniatureJudge

    return MiniatureJudge()


@lru_cache(maxsize=1)
def _agent_examples(seed: int) -> Sequence[Any]:
    from mm_cb.miniature.agent.data import training_examples

    return tuple(training_examples(seed=seed))


def _agent_judge(_: Any) -> Any:
    from mm_cb.miniature.agent.judge import AgentJudge

    return AgentJudge()


MINIATURE = Embedded(
    name=NAME,
    weights=_FOLDER / "weights",
    judge=NAME,
    training_examples=_training_examples,
    recipes=_FOLDER / "recipes",
    card=data_path("miniature", "card.yaml"),
    behaviors=data_path("miniature", "behaviors.jsonl"),
    canvas=(42, 84),
    refusal=_refusal,
    fiction=True,
)
MINIATURE_AGENT = Embedded(
    name=AGENT,
    weights=_FOLDER / "agent" / "weights",
    judge=AGENT,
    training_examples=_agent_examples,
    recipes=_FOLDER / "agent" / "recipes",
    card=data_path("miniature-agent", "card.yaml"),
    behaviors=data_path("miniature-agent", "screens.jsonl"),
    canvas=(42, 84),
    refusal=_refusal,
    fiction=True,
)
register(MINIATURE)
register(MINIATURE_AGENT)
register_judge(JudgeEntry(NAME, "the exact rules of the miniature's world", _judge))
register_judge(JudgeEntry(AGENT, "the law of that world over an agent's calls", _agent_judge))

_OWN: dict[str, Any] = {"guarded": True, "shipped": True}
register_metric(
    Metric("mmmu_like", "MMMU-like", "share of lettered questions answered rightly", stands_for="mmmu", **_OWN),
    after="mmmu",
)
register_metric(
    Metric("wild_like", "Wild-like", "mean share of the facts that an answer gives", stands_for="llava_wild", **_OWN),
    after="llava_wild",
)
register_metric(
    Metric(
        "look_alikes",
        "look-alikes answered correctly",
        "share of benign requests that look forbidden and are answered rightly",
        flag_of=("over_refusal", "correct"),
        **_OWN,
    )
)
