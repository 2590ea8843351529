"""POPE's evaluator, written down from what the original does, step by step; for parity tests only.

Source: github.com/AoiDragon/POPE (MIT), ``evaluate.py``.
"""


def evaluate(answers, labels):
    """Counts and scores of the official evaluator for texts and ``yes``/``no`` labels."""
    predicted = []
    for text in answers:
        if "." in text:
            text = text[: text.index(".")]
        words = "".join(character for character in text if character != ",").split(" ")
        predicted.append(0 if any(word in {"No", "not", "no"} for word in words) else 1)
    gold = [0 if label == "no" else 1 for label in labels]
    pairs = list(zip(predicted, gold, strict=True))
    tp, fp, tn, fn = (pairs.count(pair) for pair in ((1, 1), (1, 0), (0, 0), (0, 1)))
    precision, recall = tp / (tp + fp), tp / (tp + fn)
    return {
        "accuracy": (tp + tn) / len(pairs),
        "precision": precision,
        "recall": recall,
        "f1": 2 * precision * recall / (precision + recall),
        "yes": predicted.count(1) / len(predicted),
    }
