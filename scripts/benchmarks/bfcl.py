"""Our scorer of function calls beside BFCL's own verdicts, item by item.

    python scripts/benchmarks/bfcl.py --data QUESTIONS --pair NAME ANSWERS SCORES [--pair ...] [--write]

The files are yours: BFCL's questions with ``possible_answer`` beside them, v1 (gorilla at de8307b, ``data``) or v4
(``bfcl_eval/data``), and of each model the folders of answers and score files that the leaderboard archived
(HuanzhiMao/BFCL-Result: v1 stands under 2024-08-11, v4 under 2025-12-16). A score file names the answers that are
wrong; all others of its category are right. What is not scored here is passed over. Ends with 1 if one item differs.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path

from mm_cb.benchmarks.base import Question
from mm_cb.benchmarks.function_calling.benchmark import made_questions, scored
from mm_cb.benchmarks.function_calling.stored import answer_files, read_answers
from mm_cb.core.files import write_json

RESULTS = Path(__file__).resolve().parents[2] / "results" / "bfcl.json"
_SCORES = re.compile(r"(?:BFCL_v4_)?(?P<category>[a-z_]+)_score\.json")


def official_verdicts(folder: Path, ids: Mapping[str, list[str]]) -> dict[str, bool]:
    """What BFCL says of each answer: right or wrong.

    Args:
        folder: Of score files: a first line of counts, then one for every wrong answer. v1 numbers them from 1.
        ids: The questions' ids by category as the files name it, in order.

    Raises:
        SystemExit: If a file counts other answers than there are questions.
    """
    verdicts: dict[str, bool] = {}
    for file in sorted(folder.rglob("*_score.json")):
        named = _SCORES.fullmatch(file.name)
        asked = ids.get(named["category"], []) if named else []
        if not asked:
            continue
        counts, *wrong = map(json.loads, file.read_text(encoding="utf-8").splitlines())
        if counts["total_count"] != len(asked):
            sys.exit(f"{file}: {counts['total_count']} answers were scored, there are {len(asked)} questions")
        found = {asked[one["id"] - 1] if isinstance(one["id"], int) else str(one["id"]) for one in wrong}
        if counts["correct_count"] != len(asked) - len(found):
            sys.exit(
                f"{file}: {counts['correct_count']} should be right, {len(found)} of {len(asked)} are named as wrong"
            )
        verdicts |= {id: id not in found for id in asked}
    return verdicts


def compared(questions: list[Question], answers: Path, scores: Path) -> dict[str, dict[str, int]]:
    """Items, how many BFCL finds right, and how many we judge alike, by category; prints the others."""
    ids: dict[str, list[str]] = defaultdict(list)
    for question in questions:
        ids[re.sub(r"_[0-9].*", "", question.id)].append(question.id)
    verdicts, said = official_verdicts(scores, ids), read_answers(answer_files(answers))
    rows: dict[str, dict[str, int]] = {}
    for question in questions:
        if question.id not in verdicts:
            continue
        ours = bool(scored(question.reference, question.category, said[question.id]).value)
        row = rows.setdefault(question.category, {"items": 0, "right": 0, "same": 0})
        row["items"] += 1
        row["right"] += verdicts[question.id]
        row["same"] += ours is verdicts[question.id]
        if ours is not verdicts[question.id]:
            print(f"{question.id}: ours {ours}, BFCL {verdicts[question.id]}: {said[question.id][:200]!r}")
    return rows


def main() -> None:
    """Compare every pair and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True)
    parser.add_argument("--pair", nargs=3, action="append", required=True, metavar=("NAME", "ANSWERS", "SCORES"))
    parser.add_argument("--underscores", action="store_true", help="functions are called with _ for every dot")
    parser.add_argument("--write", action="store_true", help=f"keep the counts in {RESULTS.name}, beside what is there")
    options = parser.parse_args()
    questions = made_questions(options.data, "python", template=False, underscores=options.underscores)
    version, differ = questions[0].reference["version"], 0
    kept = json.loads(RESULTS.read_text(encoding="utf-8")) if RESULTS.exists() else {}
    for name, answers, scores in options.pair:
        rows = compared(list(questions), Path(answers), Path(scores))
        for category, row in rows.items():
            print(f"v{version} {name}, {category}: {row['same']} of {row['items']} alike, {row['right']} right")
        items, same = (sum(row[key] for row in rows.values()) for key in ("items", "same"))
        print(f"v{version} {name}: {same} of {items} alike")
        differ += items - same if items else 1
        kept[f"v{version} {name}"] = rows
    if options.write:
        write_json(RESULTS, kept)
    sys.exit(1 if differ else 0)


if __name__ == "__main__":
    main()
