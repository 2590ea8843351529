"""The state of a running attack: whatever is no state of ours, the attack starts again and keeps nothing of it."""

import pytest
import torch
from safetensors.torch import save_file

from mm_cb.attacks.checkpoint import Watch

STATE = {"attack.delta": torch.ones(2), "kept.1": torch.zeros(2), "watch.step": torch.tensor(3)}


def resumed(path):
    watch = Watch([1], path=path, seconds=0)
    return watch.resume(), watch.step, dict(watch.kept)


def test_a_state_is_gone_on_with(tmp_path):
    save_file(STATE, tmp_path / "s")
    state, step, kept = resumed(tmp_path / "s")
    assert list(state) == ["delta"] and step == 3 and list(kept) == [1]


@pytest.mark.parametrize(
    "changes",
    [
        {"watch.step": None},
        {"watch.step": torch.tensor(3.5)},
        {"watch.step": torch.tensor([3])},
        {"kept.one": torch.zeros(2)},
        {"kept.": torch.zeros(2)},
        {"kept.-1": torch.zeros(2)},
        {f"kept.{'9' * 5000}": torch.zeros(2)},
        {"model.weight": torch.zeros(2)},
        {"attack.": torch.zeros(2)},
    ],
)
def test_what_is_no_state_is_begun_anew(tmp_path, changes):
    save_file({key: value for key, value in (STATE | changes).items() if value is not None}, tmp_path / "s")
    assert resumed(tmp_path / "s") == (None, 0, {})


@pytest.mark.parametrize("content", [b"", b"\0" * 8, b"\xff" * 100, b"{}"])
def test_a_torn_state_is_begun_anew(tmp_path, content):
    (tmp_path / "s").write_bytes(content)
    assert resumed(tmp_path / "s") == (None, 0, {})
