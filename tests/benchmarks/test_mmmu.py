import itertools
import json
import os
import random
import string
import subprocess
import sys
from pathlib import Path

import pytest

from mm_cb.benchmarks.mmmu.honesty import against_chance, luck_points, run_checks
from mm_cb.benchmarks.mmmu.parse import normalise, parse_multiple_choice, parse_open, right_open
from mm_cb.benchmarks.mmmu.protocol import protocol, subject_of
from mm_cb.benchmarks.mmmu.score import score
from mm_cb.core.errors import UserError
from mm_cb.metrics.degenerate import degenerate
from tests.reference import mmmu_rules

OFFICIAL = json.loads((Path(__file__).parent / "fixtures" / "mmmu_official.json").read_text())["models"]
DOGS = {"A": "dog", "B": "red", "C": "green apple", "D": "<image 1>"}


def choose(response, options=DOGS):
    return parse_multiple_choice(response, list(options), options)


# multiple choice


@pytest.mark.parametrize(
    ("response", "expected"),
    [
        ("B", "B"),
        ("B.", "B"),
        ("'B'", "B"),
        ("B':;?!.,", "B"),
        ("B,.!?;:'", None),
        ("'.B", None),  # each mark goes once, in a fixed order: behind the quotation mark the full stop stays
        (" B ", "B"),
        ("(B)", "B"),
        ("x(B)y", "B"),
        ("A dog", "A"),
        ("A or B", "B"),
        ("Both A and D seem right but D is best", "D"),
        ("I am sure that A is wrong. So B", "B"),
        ("(A) is wrong, B is right", "A"),  # a bracket anywhere beats letters between blanks
        ("(A) then (B) then (A)", "A"),
        ("B. red", None),
        ("B) red", None),
        ("**B**", None),
        ('"B"', None),
        ("B: red", None),
        ("A,B", None),
        ("b", None),
        ("(b)", None),
        ("A\n", None),
        ("A\tB", None),
        ("", None),
        ("E", None),  # no such option
        ("I cannot help with this request", None),  # "I" is no option of four
        ("one two three four red", None),  # five words: contents are not looked at
        ("one two three four five red", "B"),
        ("it must be a RED thing, I think", "B"),
        ("first red and later a green apple there", "C"),
        ("first a green apple and later red there", "B"),
        ("what is seen in <IMAGE 1> fits best", "D"),
    ],
)
def test_multiple_choice_table(response, expected):
    assert choose(response) == expected
    assert mmmu_rules.letter(response, list(DOGS), DOGS) == expected


def test_with_nine_options_the_pronoun_is_an_answer():
    nine = {letter: f"option {letter}" for letter in "ABCDEFGHI"}
    assert choose("Sorry, I do not know", nine) == "I"
    assert choose("I", nine) == "I"


def test_an_empty_option_matches_everything_and_ties_go_to_the_first():
    assert choose("one two three four five six", {"A": "", "B": "six"}) == "A"  # "" is found behind the last character
    assert choose("one two three four five six", {"A": "five six", "B": "z", "C": "FIVE six"}) == "A"
    assert choose("one two three four five six", {"C": "five six", "A": "five six"}) == "C"


# open questions


@pytest.mark.parametrize(
    ("response", "answer", "right"),
    [
        ("1.0", "0.9965", True),  # both are rounded to two decimals
        ("about 1", "0.9965", True),
        (".1", "0.1", False),  # full stops are trimmed first: 1
        (".1", "1", True),
        ("it costs .1", "0.1", True),
        ("10%", "0.10", False),
        ("10%", "10", True),
        ("2 million", "2000000", False),
        ("2,000,000", "2000000", True),
        ("1,23", "123", True),
        ("1e3", "1000", True),
        ("3 and 4", "4", True),
        ("5-3", "-3", True),
        ("5-3", "3", False),
        ("24/7", "24/7", True),
        ("24/7", "['24/7', '3.429']", False),  # an unparsed list is one long text
        ("24/7", ["24/7", "3.429"], True),
        ("The value is 3.4287", ["24/7", "3.429"], True),
        ("The answer is 0.5 V", "0.5", True),
        ("The answer is forty two", "42", False),
        ("The city is Tampa.", ["Tampa", "Florida"], True),
        ("in Florida", ["Tampa", "Florida"], True),
        ("so it is d", "d", True),
        ("option d here", "d", True),  # the whole response, as no cue stands in it
        ("D", "d", True),
        ("dog", "d", False),
        ("this hormone", "hormone", True),  # `is ` inside "this "
        ("the answer is a\nbut b", "a", True),
        ("x = 5", "5", True),
        ("x = 5\ny", "x = 5", True),
        ("", "5", False),
        ("nan", "5", False),
        ("inf", "5", False),
    ],
)
def test_open_table(response, answer, right):
    pieces = parse_open(response)
    assert right_open(answer, pieces) is right
    assert mmmu_rules.is_right_open(answer, set(pieces)) is right


@pytest.mark.parametrize(
    ("response", "expected"),
    [
        ("", [""]),
        ("Paris.", ["paris"]),
        ("The answer is: 7", ["is: 7", 7.0]),
        ("The result is .", ["is"]),  # nothing behind `is `: the next cue's tail counts, though it is longer
        ("It is .", ["it is"]),  # nothing behind any cue: the whole response
        ("First. Second is it. Third", ["it. third"]),  # sentences are never split
        ("so a is b\nthus c = d", [" b", "b ", " d", "d "]),
        ("= 5", [5.0]),
        ("= 5\nx", ["= 5\nx", 5.0]),  # the equals sign counts on the last line only
        ("1,234.5", [1234.5, 1234.0, 234.5]),
        ("-1.005e2", [-100.5, -1.0, 2.0]),
        ("it is !", ["it is !"]),
    ],
)
def test_parse_open_table(response, expected):
    assert parse_open(response) == expected


def test_normalise():
    assert normalise(" 1,234.567 ") == [1234.57]
    assert normalise("D") == [" d", "d "]
    assert normalise("MgS") == ["mgs"]


PIECES = ["so ", "is ", "thus ", "= ", "answer ", "\n", ". ", "A", "(B)", "(C) ", " D ", "I", "1", "-3", "1,234"]
PIECES += ["1e5", ".5", "12,34", "10%", "x", " ", "this ", ":", "'", "dog", "red", "É", "nan", "_", ")", "green apple"]


def test_parsers_agree_with_the_rules_written_down_a_second_time():
    rng = random.Random(0)
    for _ in range(1500):
        response = "".join(rng.choices(PIECES, k=rng.randrange(12)))
        options = dict(zip("ABCD", rng.choices(["dog", "red", "", "1", "x "], k=4), strict=True))
        assert choose(response, options) == mmmu_rules.letter(response, "ABCD", options), response
        pieces = parse_open(response)
        tails = mmmu_rules.tails(response)
        strings = {piece for piece in set().union(*map(mmmu_rules.as_piece, tails)) if isinstance(piece, str)}
        assert strings <= set(pieces), response
        for gold in ("dog", "d", "5", ["1234", "red"]):
            assert right_open(gold, pieces) == mmmu_rules.is_right_open(gold, set(pieces)), response


# scoring


def record(subject="Art", number=1, response="B", answer="B", n=4, split="validation", **changes):
    letters = list(string.ascii_uppercase[:n])
    fixed = {
        "id": f"{split}_{subject}_{number}",
        "question_type": "multiple-choice",
        "answer": answer,
        "all_choices": letters,
        "index2ans": {letter: f"the {letter.lower()} option" for letter in letters},
        "response": response,
    }
    return fixed | changes


def open_record(subject="Math", number=1, response="5", answer="5", **changes):
    fixed = {"id": f"validation_{subject}_{number}", "question_type": "short-answer", "answer": answer}
    return fixed | {"response": response} | changes


@pytest.mark.parametrize("model", sorted(OFFICIAL))
def test_random_letters_are_the_official_ones(model):
    drawn = OFFICIAL[model]["drawn"]
    records = [record(response="", id=id, n=n, answer="A") for id, n, _ in drawn]
    random.Random(1).shuffle(records)
    records.sort(key=lambda r: int(r["id"].rpartition("_")[2]))  # subjects mixed, inside them in file order
    scored = score(records)
    assert [(one.response.id, one.letter) for one in scored] == [(id, letter) for id, _, letter in drawn]
    assert all(one.fallback and not one.strict for one in scored)


@pytest.mark.parametrize("model", sorted(OFFICIAL))
def test_an_answer_that_parses_draws_no_letter_and_leaves_the_later_ones_theirs(model):
    records, parsed = [], ["B", "(C)", " A "]
    for id, n, _ in sorted(OFFICIAL[model]["drawn"], key=lambda one: int(one[0].rpartition("_")[2])):
        subject = subject_of(id)
        records += [record(subject, f"0{len(records)}{k}", response) for k, response in enumerate(parsed)]
        records.append(record(response="", id=id, n=n, answer="A"))
    letters = {one.response.id: one.letter for one in score(records) if one.fallback}
    assert letters == {id: letter for id, _, letter in OFFICIAL[model]["drawn"]}


def test_nothing_outside_changes_the_random_letters():
    records = [record(subject, number, response="?") for subject in ("Art", "Music") for number in range(1, 9)]
    letters = [one.letter for one in score(records)]
    random.seed(5)
    random.random()
    assert [one.letter for one in score(records)] == letters
    assert [one.letter for one in score(records[8:] + records[:8])] == letters
    assert len(set(letters)) > 1
    parsed = [one for one in score([*records, open_record()]) if not one.response.open]
    assert [one.letter for one in parsed] == letters  # open questions draw nothing


def test_python_hash_seed_has_no_effect():
    code = (
        "from mm_cb.benchmarks.mmmu.parse import parse_open\nfrom mm_cb.benchmarks.mmmu.score import score\n"
        "r = [{'id': f'validation_{s}_{n}', 'question_type': 'open', 'answer': ['a 1', '2'], 'response': t}"
        " for s in ('Math', 'Art') for n, t in enumerate(['so a 1 is 2\\nthus d', 'b', '2 3'])]\n"
        "print([(o.response.id, o.parsed, o.official) for o in score(r)])"
    )
    printed = {
        subprocess.run(
            [sys.executable, "-c", code],
            env={**os.environ, "PYTHONHASHSEED": seed, "PYTHONPATH": str(Path(__file__).parents[2])},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for seed in ("0", "1", "77")
    }
    assert len(printed) == 1 and "True" in printed.pop()


def test_everything_that_is_not_multiple_choice_is_open():
    for kind in ("open", "short-answer"):
        (one,) = score([open_record(question_type=kind)])
        assert one.official and one.strict and one.letter is None
    (one,) = score([open_record(response="B", answer="b")])  # a single letter as answer is no option
    assert one.official


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"id": "Art"}, "must look like"),
        ({"id": "validation_Arts_1"}, "unknown MMMU subject `Arts`, did you mean `Art`?"),
        ({"response": None}, "response"),
        ({"answer": "?"}, "withheld"),
        ({"answer": "E"}, "one of the letters A, B, C, D"),
        ({"answer": None}, "the answer must be a text"),
        ({"all_choices": "['A', 'B']"}, "`all_choices`"),
        ({"all_choices": [["A"]], "index2ans": {"A": "x"}}, "`all_choices`"),
        ({"index2ans": {"A": "x"}}, "`index2ans`"),
        ({"index2ans": {"A": 1, "B": 2, "C": 3, "D": 4}}, "`index2ans`"),
    ],
)
def test_broken_records_are_named(changes, expected):
    with pytest.raises(UserError, match=".") as caught:
        score([record(**changes)])
    assert expected in str(caught.value)


def test_a_question_may_come_once():
    with pytest.raises(UserError, match="comes again"):
        score([record(), record()])


def test_an_option_inside_other_words_counts_officially_but_not_strictly():
    options = {"A": "h", "B": "qq", "C": "zz", "D": "a dog"}
    inside, whole = "the cat sat there and then", "I think that it is h I suppose"
    for response, strict in ((inside, False), (whole, True), ("A", True)):
        (one,) = score([record(response=response, answer="A", index2ans=options)])
        assert (one.parsed, one.official, one.strict) == ("A", True, strict)


def test_subjects_and_domains():
    assert len(protocol().subjects) == 30 and sorted(protocol().subjects) == list(protocol().subjects)
    sizes = {name: list(protocol().domain.values()).count(name) for name in protocol().domains}
    assert list(sizes.values()) == [4, 5, 5, 5, 4, 7]
    assert subject_of("validation_Architecture_and_Engineering_30") == "Architecture_and_Engineering"


# what could make the number lie


def exam(respond, per_subject=30):
    """A stand-in for the validation split: two open questions a subject, answers spread over the letters."""
    records = []
    for subject in protocol().subjects:
        for number in range(1, per_subject + 1):
            if number <= 2:
                records.append(open_record(subject, number, respond(4), "seven"))
            else:
                n = (4, 4, 4, 5, 2, 9)[number % 6]
                gold = string.ascii_uppercase[(number * 7) % n]
                records.append(record(subject, number, respond(n, gold), gold, n))
    return records


def failed(scored):
    return {check["name"] for check in run_checks(scored) if not check["passed"]}


def texts(alphabet, length, blank=""):
    return lambda rng: blank.join("".join(rng.choices(alphabet, k=length[1])) for _ in range(length[0]))


NOISE = {
    "empty": lambda rng: "",
    "printable, short": lambda rng: "".join(rng.choices(string.printable, k=rng.randrange(80))),
    "printable, 128 tokens": texts(string.printable, (1, 400)),
    "printable, long": texts(string.printable, (1, 3000)),
    "letters": texts(string.ascii_letters + " ", (1, 400)),
    "capitals and blanks, short": texts(string.ascii_uppercase + " ", (1, 80)),
    "capitals and blanks": texts(string.ascii_uppercase + " ", (1, 400)),
    "digits and marks": texts(string.digits + string.punctuation + " ", (1, 400)),
    "words": texts(string.ascii_lowercase, (12, 5), " "),
}


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("kind", NOISE)
def test_empty_and_random_strings_earn_nothing_strictly(kind, seed):
    rng = random.Random(seed)
    scored = score(exam(lambda *_: NOISE[kind](rng), 12))
    assert 100 * sum(one.strict for one in scored) / len(scored) <= 1
    assert 15 < 100 * sum(one.official for one in scored) / len(scored) < 35  # what the official rule gives noise
    assert {"answers beat guessing", "little luck in the official number"} <= failed(scored)
    assert luck_points(scored) > 15


def test_where_no_letter_could_be_read_the_check_says_so():
    (value,) = (c["value"] for c in run_checks(score(exam(lambda *_: ""))) if c["name"] == "answers beat guessing")
    assert value == "not one letter could be read"


def test_broken_text_is_counted():
    assert "few broken completions" in failed(score(exam(lambda *_: "")))
    assert "few broken completions" in failed(score(exam(lambda *_: "the the " * 20)))
    rng = random.Random(0)
    assert "few broken completions" in failed(score(exam(lambda *_: NOISE["printable, long"](rng))))


def test_an_answer_in_noise_counts_officially_but_not_strictly():
    noise = "".join(random.Random(0).choices(string.printable.strip(), k=400))
    plain = f"because of what the picture shows, {'and shows again, ' * 30} the answer is"
    for text, strict in ((noise, False), (plain, True)):
        (letter,) = score([record(response=f"{text} (A)", answer="A")])
        (opened,) = score([open_record(response=f"{text} is seven", answer="seven")])
        assert letter.official and opened.official
        assert (letter.strict, opened.strict) == (strict, strict), text


@pytest.mark.parametrize("letter", ["A", "B", "(B)", "The answer is (A)."])
def test_one_letter_for_everything_is_flagged(letter):
    scored = score(exam(lambda *_: letter))
    assert {"answers beat guessing", "not one letter for everything"} <= failed(scored)


def test_random_letters_are_flagged_and_a_model_that_knows_something_is_not():
    rng = random.Random(0)
    random_letters = score(exam(lambda n, gold="A": rng.choice(string.ascii_uppercase[:n])))
    assert failed(random_letters) == {"answers beat guessing"}
    knows = score(exam(lambda n, gold="A": gold if rng.random() < 0.3 else rng.choice(string.ascii_uppercase[:n])))
    assert failed(knows) == set()
    assert against_chance(knows).p < 1e-6


def test_a_model_that_cannot_be_read_but_knows_is_not_called_a_guesser():
    rng = random.Random(0)
    answers = itertools.cycle([lambda g: g, lambda g: f"{g}. that one", lambda g: f"{g}) this"])
    scored = score(exam(lambda n, gold="A": next(answers)(gold if rng.random() < 0.8 else "A")))
    assert failed(scored) == {"little luck in the official number"}


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", "empty"),
        (" \n", "empty"),
        ("B", None),
        ("B.", None),
        ("!" * 30, "repetition"),
        ("the cat sat. " * 6, "repetition"),
        ("I believe " + "no " * 40, "repetition"),
        ("I believe that the answer is B because no no no no.", None),
        ("one two three four five six seven eight nine ten " * 1, None),
        (" ".join(f"item {n % 3} of" for n in range(30)), "repetition"),
    ],
)
def test_degenerate(text, expected):
    assert degenerate(text) == expected
