import pytest

from mm_cb.core.endpoint import EndpointError, EndpointFailure
from mm_cb.core.errors import UserError
from mm_cb.core.files import read_jsonl
from mm_cb.inference.generation import LocalEngine, Request, complete_all, complete_batch, prompt_tokens
from mm_cb.inference.subjects import Subject
from mm_cb.inference.unanswered import unanswered, unanswered_note
from mm_cb.miniature import data
from mm_cb.models import load_model
from mm_cb.models.chat import chat
from tests.tiny_llava import picture, tiny_llava

SIZES = [(84, 42), (42, 84), (84, 84), (20, 100)]


def requests(count=9):
    words = "what is in the picture please tell me how to brew tea".split()
    return [
        Request(f"q{i}", " ".join(words[: 1 + (5 * i) % 11]), tuple(picture(i + k, SIZES[i % 4]) for k in range(i % 3)))
        for i in range(count)
    ]


@pytest.fixture(scope="module")
def miniature():
    return Subject("base", load_model("miniature"))


@pytest.fixture(scope="module")
def tiny():
    return Subject("base", tiny_llava())


def test_completions_of_the_miniature_do_not_depend_on_the_batch_size(miniature):
    questions = [*data.multiple_choice_questions(2), *data.open_questions(2)]
    asked = [Request(q.id, q.prompt, () if q.picture is None else (q.picture,)) for q in questions]
    one, seven, all_ = (dict(LocalEngine(miniature, batch).complete(asked, 12)) for batch in (1, 7, 32))
    flips = {key for key in one if not one[key] == seven[key] == all_[key]}
    assert flips == set() and len(one) == 18
    assert len(set(one.values())) > 8


def test_requests_with_none_one_and_two_pictures_mix_in_a_batch(tiny):
    asked = requests()
    alone = {request.key: complete_batch(tiny, [request], 5)[0] for request in asked}
    assert dict(LocalEngine(tiny, 4).complete(asked, 5)) == alone


def test_a_request_that_is_longer_than_the_model_is_named(tiny):
    requests = [Request("short", "what is it"), Request("long", "tell me " * 200)]
    with pytest.raises(UserError, match="request `long` is too long for .* the model has 256 positions"):
        complete_batch(tiny, requests, 2)


def test_a_request_that_spells_a_control_token_is_named_before_the_first_is_asked(tiny):
    with pytest.raises(UserError, match="request `b` cannot be asked: .* control token `</s>`"):
        list(LocalEngine(tiny, 1).complete([Request("a", "what is it"), Request("b", "is it </s> sure")], 2))


def test_the_longest_prompts_come_first(tiny):
    asked = requests()
    order = [key for key, _ in LocalEngine(tiny, 2).complete(asked, 1)]
    lengths = {request.key: prompt_tokens(tiny.model, request) for request in asked}
    assert [lengths[key] for key in order] == sorted(lengths.values(), reverse=True)
    assert len(set(lengths.values())) > 4


def encode(model, requests):
    chats = [chat(request.text, images=len(request.pictures)) for request in requests]
    return model.encode_chats(chats, [list(request.pictures) for request in requests])


def test_lengths_are_those_of_the_encoded_prompts_up_to_the_template(tiny):
    template = {}
    for request in requests():
        real = encode(tiny.model, [request]).input_ids.shape[1]
        template.setdefault(len(request.pictures), set()).add(real - prompt_tokens(tiny.model, request))
    assert all(len(extra) == 1 for extra in template.values())  # the same for every prompt with so many pictures


def test_no_more_forward_passes_than_a_plain_sorted_batched_generate(tiny):
    asked, batch, tokens, model, calls = requests(11), 4, 6, tiny.model, []
    engine = LocalEngine(tiny, batch)
    assert len(dict(engine.complete(asked, tokens))) == 11

    ordered = sorted(asked, key=lambda request: encode(model, [request]).input_ids.shape[1], reverse=True)
    hook = model.base.register_forward_pre_hook(lambda *_: calls.append(1))
    try:
        for start in range(0, len(ordered), batch):
            model.generate(encode(model, ordered[start : start + batch]), tokens)
    finally:
        hook.remove()
    assert 3 < engine.forward_passes <= len(calls)


class Recorder:
    """An engine that answers with the key, fails where it is told to, and stops after so many."""

    def __init__(self, stop_after=None, failing=()):
        self.asked, self.stop_after, self.failing = [], stop_after, failing

    def complete(self, requests, max_new_tokens):
        for request in requests:
            if len(self.asked) == self.stop_after:
                raise KeyboardInterrupt
            self.asked.append(request.key)
            yield request.key, Lost() if request.key in self.failing else f"answer to {request.key}"


class Lost:
    kind = "slow"
    reason = "the endpoint said nothing."


def test_a_stopped_run_goes_on_and_repeats_nothing(tmp_path):
    store = tmp_path / "parts" / "completions.jsonl"
    asked = requests()
    first = Recorder(stop_after=4)
    with pytest.raises(KeyboardInterrupt):
        complete_all(first, asked, store, 5)
    with store.open("ab") as file:
        file.write(b'{"key": "q4", "compl')  # killed while it wrote
    second = Recorder()
    done = complete_all(second, asked, store, 5)
    assert first.asked + second.asked == [request.key for request in asked]
    assert done == {request.key: f"answer to {request.key}" for request in asked}
    third = Recorder()
    assert complete_all(third, asked, store, 5) == done and third.asked == []


def test_failed_requests_end_in_one_line_and_the_others_are_kept(tmp_path):
    store = tmp_path / "completions.jsonl"
    with pytest.raises(UserError, match="2 of 9 requests failed, the first: the endpoint said nothing. The other"):
        complete_all(Recorder(failing=("q1", "q5")), requests(), store, 5)
    assert len(read_jsonl(store)) == 7
    again = Recorder()
    complete_all(again, requests(), store, 5)
    assert again.asked == ["q1", "q5"]


class Silent(Recorder):
    """Fails as it is told to."""

    def __init__(self, kind, failing, answer=None):
        super().__init__(failing=failing)
        self.kind, self.answer = kind, answer

    def complete(self, requests, max_new_tokens):
        for key, answer in super().complete(requests, max_new_tokens):
            silence = self.answer or EndpointFailure(self.kind, "the server says nothing.")
            yield key, answer if isinstance(answer, str) else silence


@pytest.mark.parametrize(
    "engine", [Silent("refused", ("q1",)), Silent("cut", ("q1",)), Silent("cut", ("q1",), "<think>so")]
)
def test_a_request_without_an_answer_is_known_as_one_and_not_asked_again(engine, tmp_path):
    store = tmp_path / "completions.jsonl"
    done = complete_all(engine, requests(), store, 5)
    assert done["q1"] == "" and done["q2"] == "answer to q2"
    lost = unanswered(store)
    assert lost.keys() == {"q1"} and lost["q1"][0] == engine.kind
    note = unanswered_note(store)
    assert note.startswith("CAUTION 1 requests have no answer: 1 ") and (engine.kind == "cut") == (
        "--max-new-tokens" in note
    )
    again = Recorder()
    assert complete_all(again, requests(), store, 5) == done and again.asked == []


@pytest.mark.parametrize("kind", ["refused", "cut"])
def test_a_server_without_one_answer_is_asked_for_all_of_them_again(kind, tmp_path):
    store = tmp_path / "completions.jsonl"
    everything = [r.key for r in requests()]
    with pytest.raises(
        UserError, match="all 9 requests are without an answer, the first: the server says nothing"
    ) as caught:
        complete_all(Silent(kind, everything), requests(), store, 5)
    assert ("`--max-new-tokens` more than 5" in str(caught.value)) == (kind == "cut") and not store.exists()
    again = Recorder()
    complete_all(again, requests(), store, 5)
    assert again.asked == everything


def test_a_server_that_ends_the_run_leaves_what_was_answered(tmp_path):
    class Broke(Recorder):
        def complete(self, requests, max_new_tokens):
            yield from super().complete(requests[:4], max_new_tokens)
            raise EndpointError("the endpoint answers HTTP 402.")

    store = tmp_path / "completions.jsonl"
    with pytest.raises(
        EndpointError, match="HTTP 402. 4 of 9 answers are there and kept: .*run the same command again"
    ):
        complete_all(Broke(), requests(), store, 5)
    again = Recorder()
    assert len(complete_all(again, requests(), store, 5)) == 9 and len(again.asked) == 5


def test_of_a_published_set_what_cannot_be_asked_is_left_out_counted_and_named(tiny, tmp_path):
    texts = {"a": "what is it", "b": "is it </s> sure", "c": "tell me " * 200, "d": "see <image> here"}
    asked = [Request(key, text, published=True) for key, text in texts.items()]
    answers = complete_all(LocalEngine(tiny, 4), asked, tmp_path / "completions.jsonl", 2)
    assert answers["a"] == complete_batch(tiny, asked[:1], 2)[0]
    lost = unanswered(tmp_path / "completions.jsonl")
    assert {key: kind for key, (kind, _) in lost.items()} == dict.fromkeys("bcd", "refused")
    assert all(f"request `{key}`" in reason for key, (_, reason) in lost.items())
    assert "control token `</s>`" in lost["b"][1] and "too long" in lost["c"][1] and "`<image>`" in lost["d"][1]
    note = unanswered_note(tmp_path / "completions.jsonl")
    assert note.startswith("CAUTION 3 requests have no answer: 3 refused, the first: request `b` cannot be asked")
    again = complete_all(LocalEngine(tiny, 4), asked, tmp_path / "completions.jsonl", 2)
    assert again == answers and len(unanswered(tmp_path / "completions.jsonl")) == 3
