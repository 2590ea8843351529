from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sacrebleu.metrics.bleu import BLEU

from mm_cb.core.errors import UserError
from mm_cb.data.contamination import THRESHOLD, Contamination, bleu_bound, read_tested

WORDS = st.sampled_from("how do i brew a red green potion , please ?".split())
TEXTS = st.lists(WORDS, min_size=1, max_size=14).map(" ".join)


def plain(text, behavior):
    return BLEU(lowercase=True, effective_order=True).sentence_score(text, [behavior]).score / 100


@given(st.lists(TEXTS, min_size=1, max_size=6), TEXTS)
@settings(max_examples=150, deadline=None)
def test_pruning_changes_nothing(behaviors, text):
    scores = [plain(text, behavior) for behavior in behaviors]
    match = Contamination(behaviors).match(text)
    if max(scores) > THRESHOLD:
        assert match is not None and match.bleu == max(scores) and scores[match.behavior] == max(scores)
    else:
        assert match is None


@given(TEXTS, TEXTS)
@settings(max_examples=150, deadline=None)
def test_the_bound_is_a_bound(text, behavior):
    a, b = text.split(), behavior.split()

    def grams(tokens, order):
        return {tuple(tokens[i : i + order]) for i in range(len(tokens) - order + 1)}

    shared = max((order for order in range(1, 5) if grams(a, order) & grams(b, order)), default=0)
    if shared:
        assert plain(text, behavior) <= bleu_bound(len(a), len(b), shared)


def test_long_texts_are_not_scored_at_all(monkeypatch):
    contamination = Contamination(["how do i brew a red potion ?", "how do i brew a green potion ?"])
    monkeypatch.setattr(contamination, "_score", None)  # scoring would fail
    assert contamination.match("tell me all about how do i brew a red potion ? " + "and then some " * 20) is None
    assert contamination.match("please tell me what is in this picture of a dog") is None


def test_case_and_the_empty_text():
    contamination = Contamination(["How do I brew a red potion?"])
    assert contamination.match("HOW DO I BREW A RED POTION?").bleu == pytest.approx(1)
    assert contamination.match("") is None


def test_prompts_are_read_from_either_file_each_with_its_id_and_place(tmp_path):
    lines, table = tmp_path / "b.jsonl", tmp_path / "b.csv"
    lines.write_text('{"prompt": "one", "id": "tea"}\n\n{"prompt": "two"}\n')
    table.write_text("BehaviorID,Behavior\nx,three\n")
    assert read_tested(lines) == [("one", f"`tea` ({lines}:1)"), ("two", f"({lines}:3)")]
    assert read_tested(table) == [("three", f"`x` ({table}:2)")]


def test_an_embedded_models_behaviours_go_by_its_name():
    assert len(read_tested(Path("miniature"))) == 12


@pytest.mark.parametrize(
    ("name", "content", "match"),
    [
        ("b.jsonl", "{", r"b\.jsonl:1: expected one JSON object"),
        ("b.jsonl", '{"prompt": "x"}\n[]', r"b\.jsonl:2: expected one JSON object"),
        ("b.jsonl", '{"text": "x"}', r"b\.jsonl:1: .*keys \['text'\]"),
        ("b.csv", "a,b\n1,2\n", r"b\.csv:2: .*`Behavior`"),
        ("b.jsonl", "", "at least one"),
    ],
)
def test_broken_behaviours_are_named(tmp_path, name, content, match):
    (tmp_path / name).write_text(content)
    with pytest.raises(UserError, match=match):
        read_tested(tmp_path / name)
