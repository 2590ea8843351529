"""The page's part about agents: calls as code, differing arguments marked, harmful ones withheld, its numbers."""

import pytest

from mm_cb.core.calls import FORMATS, Call
from mm_cb.report.agents import Piece, agents, pieces, target_pieces

MAKES = Call("brew", {"leaf": "red <b>", "minutes": 3})
OTHER = Call("brew", {"leaf": "red <b>", "minutes": 4, "milk": True})


def shown(call, others):
    return [(piece.text, piece.differs) for piece in pieces(call, others)]


def test_arguments_that_differ_are_marked():
    assert shown(MAKES, [OTHER]) == [
        ("brew(", False), ("leaf='red <b>'", False), (", ", False), ("minutes=3", True), (")", False),
    ]  # fmt: skip
    assert [text for text, differs in shown(OTHER, [MAKES]) if differs] == ["minutes=4", "milk=True"]
    assert not any(differs for _, differs in shown(MAKES, [Call("ring", {}), MAKES]))
    assert [text for text, differs in shown(MAKES, []) if differs] == ["brew("]


@pytest.mark.parametrize("format", FORMATS)
def test_an_attacks_call_stands_beside_what_was_said(format):
    target, said = FORMATS[format].write([MAKES]), FORMATS[format].write([OTHER])
    ((*found,),) = target_pieces({"target": target, "completion": said})
    assert [piece.text for piece in found if piece.differs] == ["minutes=3"]
    assert target_pieces({"target": "Here is how", "completion": said}) == ()


def item(subject, way, call, kind, metric="harmful_calls", **more):
    fixed = {"id": "a", "split": "all", "category": "c", "prompt": "the <request>", "score": None, "seed": 0}
    fixed |= {"completion": "said", "image": None, "clean_image": None, "outcome": None}
    parsed = [call._asdict()] if call else []
    own = {"metric": metric, "subject": subject, "condition": way, "call": kind, "parsed": parsed}
    return fixed | own | more


def asked(outcome=None):
    harmful = {"outcome": outcome}
    return [
        item("base", "forced_call", MAKES, "call_made", call_made=True, **harmful),
        item("rr", "forced_call", None, "gibberish", call_made=False, outcome="gibberish"),
        item("base", "strict", MAKES, "call_made", "benign_calls", score=1.0, gibberish=False),
        item("rr", "strict", OTHER, "call_made", "benign_calls", score=1.0, gibberish=False),
    ]


def add(items):
    def edit(old):
        old.extend(items)

    return edit


def test_the_page_has_the_part_with_its_numbers_and_withholds_what_may_be_harmful(make_run, tmp_path):
    from mm_cb.report import write_report

    data = write_report([make_run(edit=add(asked()), fiction=False)], tmp_path / "page.html")
    page = (tmp_path / "page.html").read_text().partition('<section id="agents">')[2].partition("</section>")[0]
    assert "harmless twins: call made" in page and "not measured" in page and "not judged" in page
    assert "<mark>minutes=3</mark>" in page and "leaf=&#39;red &lt;b&gt;&#39;" in page  # of the twins
    assert page.count("[call withheld]") == 1 and "the &lt;request&gt;" in page
    assert data.measurements
    for made in (asked("refusal"), asked("harmful")):
        told = write_report([make_run(edit=add(made), fiction=False, name=made[0]["outcome"])], tmp_path / "again.html")
        again = (tmp_path / "again.html").read_text()
        assert ("[call withheld]" in again) is (made[0]["outcome"] == "harmful") and told.measurements


def test_a_fiction_is_shown_and_a_page_without_agents_has_no_such_part(make_run, tmp_path):
    from mm_cb.report import write_report

    write_report([make_run(edit=add(asked()), fiction=True)], tmp_path / "page.html")
    assert "[call withheld]" not in (tmp_path / "page.html").read_text()
    write_report([make_run(name="plain")], tmp_path / "plain.html")
    assert 'id="agents"' not in (tmp_path / "plain.html").read_text()


def test_answers_that_differ_come_first():
    same = [{**one, "id": "z", "parsed": [MAKES._asdict()]} for one in asked()[2:]]
    from mm_cb.metrics.results import measure

    items = [*same, *asked()[2:]]
    found = agents(items, measure(items, pairs=[("rr", "base")]), ["base", "rr"], show=True)
    assert [one.item["id"] for one in found.asked] == ["a", "z"] and found.possible == 2
    assert found.kinds == [
        ("harmless twin", "base", [2, 0, 0, 0, 0, 0], 2),
        ("harmless twin", "rr", [2, 0, 0, 0, 0, 0], 2),
    ]
    assert all(piece == Piece(piece.text) for said in found.asked[1].said for call in said.calls for piece in call)
