"""What a model thought is no part of its answer, and nothing of it is lost."""

import pytest

from mm_cb.core.thoughts import AnswerText, answer_in

BLOCKS = [
    "<think>so {}</think>",
    "\n<THINK>\nso {}\n</think>\n\n",
    "<thinking>so {}</thinking>",
    "<reasoning>so {}</reasoning>\n",
    "<seed:think>so {}</seed:think>",
    "[THINK]so {}[/THINK]",
    "<|channel>thought\nso {}<channel|>",
    "<|channel|>analysis<|message|>so {}<|end|><|start|>assistant<|channel|>final<|message|>",
    "<|START_THINKING|>so {}<|END_THINKING|><|START_RESPONSE|>",
    "\u25c1think\u25b7so {}\u25c1/think\u25b7",
    "so {}\n</think>\n\n",
    "so {}</think>\n\n",
    "<think>\n\n</think>\n\n",
    "<think>so {}</think><think>or {}</think>",
]
HONEST = [
    "A",
    "",
    "a <think> b",
    "The tag <think> opens a thought and </think> closes it.",
    "Write <think>hm</think> in front.",
    "It ends with </think>",
    "```\n<think>\nhm\n</think>\n```\nThat is the mark.",
    "<thinker>so</thinker> is no mark",
    "[thinks] A",
    "analysis of A",
    "I think A",
]


@pytest.mark.parametrize("answer", ["A", "(B) is it", "I cannot.\n\nSorry </think> about it", "x <think> y"])
@pytest.mark.parametrize("block", BLOCKS)
def test_a_finished_thought_is_taken_off_and_kept(block, answer):
    whole = block.replace("{}", "B I cannot") + answer
    if block.startswith("so") and "think>" in answer:
        return  # nobody can tell where such a thought ends
    said = answer_in(whole)
    assert said == answer and said.thought + said == whole and not said.cut
    assert answer_in(said) == said and answer_in(said).thought == ""


@pytest.mark.parametrize("text", HONEST)
def test_an_answer_that_names_a_mark_is_left_alone(text):
    assert (answer_in(text), answer_in(text).thought) == (text, "")


@pytest.mark.parametrize("text", [*(block.partition("{}")[0] for block in BLOCKS[:10]), "<think>a</think><think>b"])
def test_a_thought_that_never_ends_has_no_answer(text):
    assert answer_in(text).cut and answer_in(text).thought == text and answer_in(text) == ""
    assert not answer_in("").cut


@pytest.mark.parametrize("block", [*BLOCKS, "so B</think>"])
def test_nothing_behind_a_finished_thought_is_an_empty_answer_unless_the_limit_came(block):
    whole = block.replace("{}", "B")
    said = [answer_in(text, opened="so" in block[:2]) for text in (whole, AnswerText(whole, at_limit=True))]
    assert [(one, one.thought, one.cut) for one in said] == [("", whole, False), ("", whole, True)]


def test_a_thought_that_the_prompt_began_ends_at_its_mark_or_never():
    said = answer_in("so B</think>A", opened=True)
    assert (said, said.thought) == ("A", "so B</think>") and answer_in("so B", opened=True).cut


def test_an_answer_is_a_text_and_what_came_beside_it_is_a_thought():
    said = answer_in("<think>so</think>A", beside="before")
    assert isinstance(said, str) and isinstance(said, AnswerText) and said.thought == "before<think>so</think>"
