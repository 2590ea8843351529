from dataclasses import dataclass

import pytest
import torch
from PIL.Image import Image

from mm_cb.core.progress import Progress
from mm_cb.inference import questions as runner
from mm_cb.inference.cached_chunks import chunks, once
from mm_cb.inference.questions import ask
from mm_cb.inference.subjects import Subject
from mm_cb.training.representations import compare
from tests.tiny_llava import picture, tiny_llava


@dataclass
class Item:
    id: str
    prompt: str
    picture: Image | None


ITEMS = [
    Item(f"q{i}", ("what is it", "please tell me how to brew tea")[i % 2], picture(i) if i % 3 else None)
    for i in range(7)
]


def score(item, completion):
    return {"metric": "m", "length": len(completion)}


def run(model, folder, **options):
    with Progress() as progress:
        return ask(Subject("base", model), ITEMS, score, folder, progress, name="m", max_new_tokens=5, **options)


def test_answers_do_not_depend_on_the_batch_size(tmp_path):
    model = tiny_llava()
    one, three, all_ = (run(model, tmp_path / str(b), batch=b) for b in (1, 3, 64))
    assert one == three == all_
    assert [r["id"] for r in one] == [i.id for i in ITEMS]
    assert any(r["completion"] for r in one)


def test_finished_batches_are_not_asked_again(tmp_path, monkeypatch):
    model = tiny_llava()
    first = run(model, tmp_path, batch=3)
    (tmp_path / "parts" / "m-0001.json").unlink()
    asked = []
    real = runner.complete
    monkeypatch.setattr(
        runner, "complete", lambda s, group, n: asked.append([q.id for q in group]) or real(s, group, n)
    )
    assert run(model, tmp_path, batch=3) == first
    assert asked == [["q3", "q4", "q5"]]


def test_once_computes_again_what_is_damaged(tmp_path):
    path = tmp_path / "deep" / "part.json"
    assert once(path, lambda: {"a": 1}) == {"a": 1}
    assert once(path, lambda: {"a": 2}) == {"a": 1}
    path.write_text("{torn")
    assert once(path, lambda: {"a": 3}) == {"a": 3}


def test_once_leaves_nothing_when_the_work_fails(tmp_path):
    def fails():
        raise RuntimeError("killed")

    with pytest.raises(RuntimeError):
        once(tmp_path / "part.json", fails)
    assert not list(tmp_path.iterdir())


def test_chunks_keep_order_and_everything():
    assert chunks(list(range(7)), 3) == [[0, 1, 2], [3, 4, 5], [6]]
    assert chunks([], 3) == []


def test_representations_without_an_adapter_do_not_move():
    model = tiny_llava()
    same = compare(model, ["what is it"] * 3, [None, picture(), None], ["it is red", "it is", "a blue circle"], batch=2)
    assert same["n"] == 3 and len(same["cosine"]) == 4
    assert same["cosine"] == pytest.approx([1.0] * 4, abs=1e-5)
    assert same["norm_reference"] == pytest.approx(same["norm_adapted"])


def test_representations_weigh_every_answer_alike():
    model = tiny_llava()
    prompts, answers = ["what is it"] * 2, ["it", "a blue circle please"]
    singles = [compare(model, [p], [None], [a]) for p, a in zip(prompts, answers, strict=True)]
    both = compare(model, prompts, [None, None], answers)
    mean = torch.tensor([s["norm_adapted"] for s in singles]).mean(0)
    assert both["norm_adapted"] == pytest.approx(mean.tolist(), abs=1e-3)
