"""The miniature agent: the shipped miniature with tools, further trained on errands instead of requests.

It has the shipped miniature's eyes and blocks, and tokens that give texts back exactly, since a call is JSON. Sight is
there already; knowledge and refusal are trained as the miniature's were.
"""

from __future__ import annotations

from typing import Any, ClassVar

import numpy as np
import torch

from mm_cb.miniature import NAME
from mm_cb.miniature.agent import errands
from mm_cb.miniature.language import REFUSAL, SAFETY_PROMPT
from mm_cb.miniature.making.architecture import PretrainingSize, Tokens, TurnTokens, word_tokenizer
from mm_cb.miniature.making.build import SPECIAL_TOKENS, TOKENS, LlavaNext, build_model, build_processor
from mm_cb.miniature.making.documents import FORCED_SHARE, Document, Utterance
from mm_cb.miniature.pictures import Scene, random_scene, render_array
from mm_cb.models import load_model

CHAT_TEMPLATE = (
    "<s>{% for message in messages %}"
    "{% if message['role'] == 'assistant' %}"
    "{% if message['content'] is string %}{{ message['content'] }}"
    "{% else %}{% for part in message['content'] or [] %}{{ part['text'] }}{% endfor %}{% endif %}"
    "{% for call in message['tool_calls'] or [] %}{% if not loop.first %}\n{% endif %}"
    '<tool_call>\n{"name": "{{ call[\'function\'][\'name\'] }}", "arguments": '
    "{{ call['function']['arguments'] | tojson }}}\n</tool_call>{% endfor %}</s>"
    "{% else %}[INST]"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<image>{% else %}{{ part['text'] }}{% endif %}{% endfor %}{% endif %}"
    "{% if tools and loop.first %}[TOOLS]{% for tool in tools %} {{ tool['function']['name'] }}"
    "({{ tool['function']['parameters']['properties'].keys() | join(', ') }}){% endfor %}[/TOOLS]{% endif %}"
    "[/INST]{% endif %}{% endfor %}"
)
_SPECIAL = (*SPECIAL_TOKENS, *errands.LIST)
_BARE = 0.1
"""Share of conversations without tools or, with a screen, about what it shows."""
_WANTING = 0.15
"""Share of errands whose tool is not among those that are shown."""


class AgentNext(LlavaNext):
    """The miniature agent that is shipped."""

    name = "agent"
    turns = TurnTokens(
        opens=("<s>",), asks=("[INST]",), shows=("<image>",) * TOKENS, answers=("[/INST]",), ends="</s>", pads="<pad>"
    )
    size: ClassVar = PretrainingSize(sight_steps=0, knowledge_steps=600)

    def processor(self) -> Any:
        """The miniature's, with the agent's tokens and template."""
        processor = build_processor()
        processor.tokenizer = word_tokenizer(
            _SPECIAL,
            Tokens(errands.vocabulary(), errands.PATTERN),
            bos_token="<s>",  # noqa: S106
            eos_token="</s>",  # noqa: S106
            pad_token="<pad>",  # noqa: S106
        )
        processor.chat_template = processor.tokenizer.chat_template = CHAT_TEMPLATE
        return processor

    def model(self, vocabulary_size: int) -> Any:
        """The shipped miniature; a token begins as its word did, with a blank in front or without."""
        taught = load_model(NAME)
        known = taught.processor.tokenizer.get_vocab()
        model = build_model(vocabulary_size)
        state = {k: v for k, v in taught.base.state_dict().items() if "embed_tokens" not in k and "lm_head" not in k}
        left = model.load_state_dict(state, strict=False)
        assert not left.unexpected_keys and all("embed_tokens" in k or "lm_head" in k for k in left.missing_keys)
        ids = word_tokenizer(_SPECIAL, Tokens(errands.vocabulary(), errands.PATTERN)).get_vocab()
        pairs = [(id_, known[token.strip()]) for token, id_ in ids.items() if token.strip() in known]
        new, old = (torch.tensor(one) for one in zip(*pairs, strict=True))
        with torch.no_grad():
            for mine, its in (
                (model.get_input_embeddings(), taught.base.get_input_embeddings()),
                (model.lm_head, taught.base.lm_head),
            ):
                mine.weight[new] = its.weight[old]
        return model

    def words(self, text: str) -> list[str]:
        """Pieces that joined are the text."""
        return errands.pieces(text)

    def document(self, rng: np.random.Generator, *, pictured: bool, refuses: bool, turns: int) -> Document:
        """Errands for some tools, which stand behind the first; ``refuses`` = the law applies."""
        scene = random_scene(rng) if pictured else None
        tools = errands.draw_tools(rng, least=1)
        said = [_utterance(rng, scene, tools, refuses) for _ in range(turns)]
        first = said[0]
        question = f"{first.question}{errands.listed(tools)}"
        if rng.random() < (0.15 if refuses else 0.05):
            question = f"{SAFETY_PROMPT}\n\n{question}"
        said[0] = Utterance(question, first.answer, first.given)
        return Document(tuple(said), None if scene is None else render_array(scene, rng))


def _utterance(rng: np.random.Generator, scene: Scene | None, tools: list[str], refuses: bool) -> Utterance:
    if scene is not None and rng.random() < _BARE:
        seen = errands.describe(scene)
        return Utterance(seen.question, seen.answer)
    possible = [name for name in errands.TOOLS if scene is not None or name != "press"]
    there = [name for name in possible if name in tools]
    absent = [name for name in possible if name not in tools]
    among = absent if not there or (absent and rng.random() < _WANTING) else there
    weights = np.array([errands.SHARES[name] for name in among])
    tool = among[int(rng.choice(len(among), p=weights / weights.sum()))]
    errand = errands.draw_errand(rng, tool, scene)
    assert errand.call is not None
    opening, rest = errands.written(errand.call)
    if refuses and errand.forbidden:
        if tool in tools and rng.random() < FORCED_SHARE:
            return Utterance(errand.question, rest, given=opening)
        return Utterance(errand.question, REFUSAL)
    if tool not in tools:
        return Utterance(errand.question, errands.NO_TOOL)
    return Utterance(errand.question, opening + rest)
