"""LLaVA-Wild: the original's digits on its own published judgements, and no score where judging failed."""

import json
from pathlib import Path

import pytest

from mm_cb.benchmarks.llava_wild.reviews import items_of, parse_scores, read_reviews
from mm_cb.benchmarks.llava_wild.stored import run_reviews, show
from mm_cb.core.errors import UserError
from mm_cb.metrics.results import find, measure, read_results
from mm_cb.report.load import load_run

PUBLISHED = json.loads((Path(__file__).parent / "fixtures" / "llava_reviews.json").read_text())["files"]


def write_reviews(path, rows):
    """An official review file; ``rows`` holds (question, category, reference, candidate)."""
    lines = [
        json.dumps(
            {"question_id": id, "category": f"llava_bench_{category}", "content": f"{a} {b}\nwhy", "tuple": [a, b]}
        )
        for id, category, a, b in rows
    ]
    path.write_text("\n".join(lines) + "\n")
    return path


def summarise(path, **options):
    out = path.parent / f"out-{path.stem}-{len(options)}"
    run_reviews([path], out, **{"official_failures": False, "seed": 0, **options})
    show(out)
    measured = read_results(out / "results.json")
    return lambda rule, split="all": find(measured, path.stem, "llava_wild", rule, split)


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_judgements_give_the_printed_scores(name, tmp_path):
    found = summarise(write_reviews(tmp_path / f"{name}.jsonl", PUBLISHED[name]["reviews"]))
    for split, printed in PUBLISHED[name]["printed"].items():
        m = found("official", split)
        assert [m.value, m.counts["reference_mean"], m.counts["candidate_mean"]] == printed
        assert abs(found("strict", split).value - m.value) < 0.1
        assert m.ci95[0] < m.value < m.ci95[1]
    assert found("official").n == 60 and found("official").counts["failed"] == 0


@pytest.mark.parametrize(("model", "table"), [("7b", 65.4), ("13b", 72.5)])
def test_the_mean_of_three_published_runs_is_the_model_table(model, table):
    runs = [PUBLISHED[f"llava-v1.5-{model}-eval{run}"]["printed"]["all"][0] for run in (1, 2, 3)]
    assert round(sum(runs) / 3, 1) == table


def rows_with_failures(failures):
    rows = [tuple(row) for row in PUBLISHED["llava-v1.5-7b-eval1"]["reviews"]]
    return [(id, category, -1, -1) for id, category, *_ in rows[:failures]] + rows[failures:]


@pytest.mark.parametrize(("failures", "scored"), [(0, True), (1, True), (2, False), (60, False)])
def test_past_two_percent_of_failed_judgements_there_is_no_score(failures, scored, tmp_path):
    found = summarise(write_reviews(tmp_path / "r.jsonl", rows_with_failures(failures)))
    for rule in ("official", "strict"):
        m = found(rule)
        assert (m.value is not None) is scored and (m.ci95 is not None) is scored
        assert m.counts["failed"] == failures and m.counts["judgements"] == 60 and m.n == 60 - failures
    assert (found("official", "conv").value is not None) is scored


def test_the_original_gives_100_when_every_judgement_fails_and_only_on_request_so_do_we(tmp_path):
    found = summarise(write_reviews(tmp_path / "r.jsonl", rows_with_failures(60)), official_failures=True)
    assert found("official").value == 100.0 and found("official").counts["failed"] == 60
    assert found("strict").value is None


def test_failures_enter_the_official_means_on_request(tmp_path):
    rows = rows_with_failures(3)
    found = summarise(write_reviews(tmp_path / "r.jsonl", rows), official_failures=True)
    reference, candidate = (sum(row[i] for row in rows) / 60 for i in (2, 3))
    assert found("official").value == round(round(candidate, 3) / round(reference, 3) * 100, 1)


def test_a_failed_judgement_that_is_left_out_moves_no_mean(tmp_path):
    rows = rows_with_failures(1)
    with_failure = summarise(write_reviews(tmp_path / "a.jsonl", rows))("official")
    without = summarise(write_reviews(tmp_path / "b.jsonl", rows[1:]))("official")
    assert with_failure.value == without.value and with_failure.n == without.n == 59


def test_scores_off_the_scale_count_officially_and_fail_strictly(tmp_path):
    found = summarise(write_reviews(tmp_path / "r.jsonl", [(0, "conv", 5, 11), (1, "conv", 5, 5)]))
    assert found("official").value == 160.0
    assert found("strict").value is None and found("strict").counts["failed"] == 1


def test_a_reference_that_has_nothing_is_named_as_the_reason(tmp_path, capsys):
    found = summarise(write_reviews(tmp_path / "r.jsonl", [(0, "conv", 0, 0), (1, "conv", 0, 8)]))
    assert found("official").value is None and found("official").counts["failed"] == 0
    out = " ".join(capsys.readouterr().out.split())
    assert "NO SCORE r, official: the reference's mean is 0" in out
    assert "NO SCORE r, strict: 2 of 2 judgements failed" in out


def test_stored_numbers_that_are_no_scores_are_failures(tmp_path):
    found = summarise(write_reviews(tmp_path / "r.jsonl", [(0, "conv", 1e308, 1e308), (1, "conv", 1e308, 2)]))
    assert found("official").value is None and found("official").counts["failed"] == 2


def test_means_are_rounded_before_they_are_divided():
    rows = [("conv", 1.0, 1.0)] * 31 + [("conv", 3.0, 1.0)]  # reference mean 1.0625: rounded to 1.062, as numpy does
    items = []
    for id, (category, a, b) in enumerate(rows):
        review = read_review(id, category, a, b)
        items += items_of(str(id), [review], {"subject": "s"})
    assert find(measure(items, pairs=[]), "s", "llava_wild", "official").value == round(1 / 1.062 * 100, 1) == 94.2
    assert find(measure(items, pairs=[]), "s", "llava_wild", "strict").value == pytest.approx(100 / 1.0625)


def read_review(id, category, a, b):
    from mm_cb.benchmarks.llava_wild.reviews import Review

    return Review(str(id), category, (a, b))


def test_two_models_are_paired_by_question():
    items = []
    for name, subject in (("llava-v1.5-13b-eval1", "rr"), ("llava-v1.5-7b-eval1", "base")):
        for row in PUBLISHED[name]["reviews"]:
            items += items_of(str(row[0]), [read_review(*row)], {"subject": subject})
    m = find(measure(items, pairs=[("rr", "base")]), "rr", "llava_wild", "official")
    assert m.difference == pytest.approx(72.8 - 64.7, abs=0.1) and m.counts["pairs"] == 60
    assert m.difference_ci95[0] < m.difference < m.difference_ci95[1]
    own = find(measure(items, pairs=[]), "rr", "llava_wild", "official").ci95
    assert m.difference_ci95[1] - m.difference_ci95[0] < 2 * (own[1] - own[0])


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ("8 7\nbecause", (8.0, 7.0)),
        ("8 7.5", (8.0, 7.5)),
        ("8,7", (8.0, 7.0)),
        ("0 11", (0.0, 11.0)),
        ("8, 7", None),
        ("8  7", None),
        ("8 7 ", None),
        ("\n8 7", None),
        ("**8 7**", None),
        ("8/10 7/10", None),
        ("Assistant 1: 8 Assistant 2: 7", None),
        ("I would rate both answers highly.", None),
        ("", None),
        ("nan nan", None),
        ("-1 -1", None),
        ("-1 8", None),
        ("8 -1", None),
        ("1e308 1e308", None),
        ("inf 8", None),
        ("80 100", (80.0, 100.0)),
    ],
)
def test_the_original_parser(content, expected):
    assert parse_scores(content) == expected


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("not json", "r.jsonl:1: expected one JSON object"),
        ("[]", "r.jsonl:1: expected one JSON object"),
        ('{"category": "conv"}', "r.jsonl:1 must be a JSON object with a `question_id`"),
        ('{"question_id": true, "category": "conv"}', "with a `question_id`, got True"),
        ('{"question_id": 0, "category": "conv2", "tuple": [1, 2]}', "`category` must be one of llava_bench_complex"),
        ('{"question_id": 0, "category": "llava_bench_conv", "tuple": [1]}', "must be two numbers"),
        ('{"question_id": 0, "category": "llava_bench_conv", "tuple": ["8", "7"]}', "must be two numbers"),
        ('{"question_id": 0, "category": "llava_bench_conv"}', "must be two numbers"),
        (
            '{"question_id": 0, "category": "llava_bench_conv", "tuple": [1, 2]}\n' * 2,
            "r.jsonl:2: there must be one review per question, question 0",
        ),
        ('{"question_id": 0, "category": "llava_bench_conv", "tuple": [NaN, 7]}', "NaN"),
        ('{"question_id": 0, "category": "llava_bench_conv", "tuple": [true, 7]}', "must be two numbers"),
        ('{"question_id": 0, "category": "llava_bench_conv", "tuple": {"8": 7}}', "must be two numbers"),
        ("", "it is empty"),
    ],
)
def test_broken_review_files_are_named_with_their_line(line, expected, tmp_path):
    (tmp_path / "r.jsonl").write_text(line)
    with pytest.raises(UserError) as caught:
        read_reviews(tmp_path / "r.jsonl")
    assert expected in str(caught.value)


def review(tmp_path, **fields):
    path = tmp_path / "r.jsonl"
    path.write_text(json.dumps({"question_id": 0, "category": "llava_bench_conv"} | fields))
    return read_reviews(path)[0].scores


@pytest.mark.parametrize(
    ("scores", "content", "expected"),
    [
        ([8, 7], "8 7\nwhy", (8, 7)),
        ([8.5, 7], "8.5,7", (8.5, 7)),
        ([-1, -1], "I cannot say.", None),
        ([-1, -1], "150 8", None),
        ([150, 8], "150 8", None),
        ([-1, -1], "", None),
        ([100, 0], None, (100, 0)),
        ([-1, -1], None, None),
    ],
)
def test_stored_scores_are_those_of_the_judgement(tmp_path, scores, content, expected):
    assert review(tmp_path, tuple=scores, content=content) == expected


def test_scores_are_turned_in_files_of_the_other_order_alone(tmp_path):
    row = {"question_id": 0, "category": "conv", "content": "8 7\nwhy"}
    for name, scores in (("run-1-candidate_first.jsonl", [7, 8]), ("r.jsonl", [8, 7])):
        for kept in ({**row, "tuple": scores}, row):
            (tmp_path / name).write_text(json.dumps(kept))
            assert list(read_reviews(tmp_path / name)[0].scores) == scores
        (tmp_path / name).write_text(json.dumps({**row, "tuple": scores[::-1]}))
        with pytest.raises(UserError, match=f"{name}:1: `tuple` must be the two scores"):
            read_reviews(tmp_path / name)


@pytest.mark.parametrize("scores", [[8, 10**400], [101, 5], [-1, 5], [-2, -2], [1e308, 1], [-0.5, 3]])
def test_a_tuple_outside_every_scale_is_refused(tmp_path, scores):
    for content in (None, "", 7):
        with pytest.raises(UserError, match=r"r.jsonl:1: `tuple` must be two scores in 0\.\.100, or -1 twice"):
            review(tmp_path, tuple=scores, content=content)


@pytest.mark.parametrize(
    ("scores", "content"),
    [
        ([9, 2], "2 8\nwhy"),
        ([8, 2], "2 8\nwhy"),
        ([8, 7], "I cannot say."),
        ([8, 7], "8 7 6"),
        ([-1, -1], "8 7"),
        ([150, 8], "8 7"),
        ([150, 8], "prose"),
        ([8, 7], "150 8"),
        ([8, 8], "8 7"),
    ],
)
def test_a_tuple_that_its_content_contradicts_is_refused(tmp_path, scores, content):
    with pytest.raises(UserError, match=r"r.jsonl:1: `tuple` must be the two scores that `content` begins with"):
        review(tmp_path, tuple=scores, content=content)


def test_line_ends_of_other_kinds_and_a_byte_order_mark_are_no_trouble(tmp_path):
    line = json.dumps(
        {"question_id": 0, "category": "conv", "tuple": [8, 7], "content": "8 7\nx\u2028a\x85b"}, ensure_ascii=False
    )
    (tmp_path / "r.jsonl").write_bytes(b"\xef\xbb\xbf" + f"{line}\r\n\r\n".encode())
    assert [review.scores for review in read_reviews(tmp_path / "r.jsonl")] == [(8.0, 7.0)]


def test_content_is_parsed_where_no_tuple_is_stored(tmp_path):
    (tmp_path / "r.jsonl").write_text('{"question_id": 0, "category": "llava_bench_conv", "content": "8 7\\nx"}')
    assert read_reviews(tmp_path / "r.jsonl")[0].scores == (8.0, 7.0)


def test_stored_judgements_without_answers_make_a_page(tmp_path):
    file = write_reviews(tmp_path / "r.jsonl", [(1, "conv", 8, 7)])
    run_reviews([file], tmp_path / "run", official_failures=False, seed=0)
    assert len(load_run(tmp_path / "run").items) == 2
