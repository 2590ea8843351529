"""What batched generation costs and changes: python scripts/benchmarks/generation.py [--dtype bfloat16] [--batch 8].

The questions of the miniature's benchmarks are answered by our engine, by one plain length-sorted batched ``generate``
over the same inputs, and one at a time. Printed: forward passes and seconds of each, and the completions that differ
from those made one at a time (flips): none in float32, a few in lower precision.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from mm_cb.data.pictures import shown  # noqa: E402
from mm_cb.inference.cached_chunks import chunks  # noqa: E402
from mm_cb.inference.generation import LocalEngine, Request  # noqa: E402
from mm_cb.inference.subjects import Subject  # noqa: E402
from mm_cb.miniature import data  # noqa: E402
from mm_cb.models import load_model  # noqa: E402
from mm_cb.models.chat import chat  # noqa: E402


def plain(subject: Subject, requests: list[Request], batch: int, tokens: int) -> dict[str, str]:
    """The yardstick: everything encoded once, sorted by the encoded length, generated batch by batch."""
    model = subject.model

    def encoded(group: list[Request]):
        chats = [chat(request.text, images=len(request.pictures)) for request in group]
        return model.encode_chats(chats, [[shown(picture) for picture in r.pictures] for r in group])

    ordered = sorted(requests, key=lambda request: -encoded([request]).input_ids.shape[1])
    found: dict[str, str] = {}
    for group in chunks(ordered, batch):
        found |= zip((r.key for r in group), model.generate(encoded(group), tokens), strict=True)
    return found


def measured(subject: Subject, answer: Callable[[], dict[str, str]]) -> tuple[dict[str, str], int, float]:
    """Completions, forward passes and seconds of one way to answer."""
    passes: list[int] = []
    hook = subject.model.base.register_forward_pre_hook(lambda *_: passes.append(1))
    started = time.perf_counter()
    try:
        return answer(), len(passes), time.perf_counter() - started
    finally:
        hook.remove()


def main() -> int:
    """Print the table; exit code 1 when our engine needs more passes than the plain one, or flips in float32."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="miniature", help="hub id, folder or miniature")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--questions", type=int, default=8, help="of each form and benchmark")
    parser.add_argument("--tokens", type=int, default=16)
    o = parser.parse_args()
    subject = Subject("base", load_model(o.model, device=o.device, dtype=o.dtype))
    questions = [*data.multiple_choice_questions(o.questions), *data.open_questions(o.questions)]
    requests = [Request(q.id, q.prompt, () if q.picture is None else (q.picture,)) for q in questions]
    ways: dict[str, Callable[[], dict[str, str]]] = {
        "one at a time": lambda: dict(LocalEngine(subject, 1).complete(requests, o.tokens)),
        f"our engine, {o.batch} at a time": lambda: dict(LocalEngine(subject, o.batch).complete(requests, o.tokens)),
        f"plain generate, {o.batch} at a time": lambda: plain(subject, requests, o.batch, o.tokens),
    }
    rows = {name: measured(subject, way) for name, way in ways.items()}
    alone, ours, yardstick = rows.values()
    print(f"{o.model}, {o.dtype}, {o.device}: {len(requests)} questions, at most {o.tokens} tokens")
    print(f"{'':32}{'passes':>8}{'seconds':>9}{'flips':>7}")
    for name, (completions, passes, seconds) in rows.items():
        flips = sum(completions[key] != text for key, text in alone[0].items())
        print(f"{name:32}{passes:8}{seconds:9.2f}{flips:7}")
    return int(ours[1] > yardstick[1] or (o.dtype == "float32" and ours[0] != alone[0]))


if __name__ == "__main__":
    sys.exit(main())
