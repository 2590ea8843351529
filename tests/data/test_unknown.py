"""Which words a tokenizer has, and how many tokens it makes of them."""

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from mm_cb.data.unknown import Words


def tokenizer_of(**around):
    """Words between blanks; ``around`` is what stands around a text."""
    words = Tokenizer(models.WordLevel({"<unk>": 0, "<s>": 1, "</s>": 2, "tea": 3, "is": 4, "hot": 5}, "<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    if around:
        special = [("<s>", 1), ("</s>", 2)]
        words.post_processor = processors.TemplateProcessing(single=around["single"], special_tokens=special)
    return PreTrainedTokenizerFast(tokenizer_object=words, unk_token="<unk>", bos_token="<s>", eos_token="</s>")


@pytest.mark.parametrize(("around", "more"), [({}, 0), ({"single": "<s> $A"}, 1), ({"single": "<s> $A </s>"}, 2)])
@pytest.mark.parametrize("text", ["", "tea", "tea is hot", "tea is lukewarm", "tepid tea", "quite lukewarm"])
def test_texts_are_measured_with_what_stands_around_them_and_judged_without(around, more, text):
    tokenizer = tokenizer_of(**around)
    words, told = Words(tokenizer), text.split()
    unknown = sum(word not in ("tea", "is", "hot") for word in told)
    for _ in range(2):
        assert words.length(text) == len(tokenizer(text).input_ids) == len(told) + more
        assert words.partly_unknown(text) == (unknown > 0)
        assert (words.mostly_unknown(["tea", text]) == "<unk>") == (unknown > 0 and 2 * unknown >= len(told))
