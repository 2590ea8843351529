"""Features go to tokens row by row: where the numbers differ, the model is refused, not scattered over."""

from dataclasses import replace

import pytest

from mm_cb import cli
from mm_cb.core.errors import UserError
from mm_cb.models import TokenRole
from tests import test_families_end_to_end as end_to_end
from tests.models import laws
from tests.models.tiny import KINDS, tiny


def moved_between_rows(inputs):
    """The first picture's last token is one of the second row's: the batch has as many as before."""
    roles = inputs.roles.clone()
    (here,) = inputs.image_mask[0].nonzero()[-1:].unbind(1)
    (there,) = (roles[1] == TokenRole.USER).nonzero()[-1:].unbind(1)
    roles[0, here], roles[1, there] = TokenRole.USER, TokenRole.IMAGE
    return replace(inputs, roles=roles)


def one_less(inputs):
    roles = inputs.roles.clone()
    roles[1, inputs.image_mask[1].nonzero()[0]] = TokenRole.USER
    return replace(inputs, roles=roles)


@pytest.mark.parametrize("kind", KINDS)
def test_rows_with_other_tokens_than_features_are_refused(kind):
    model = tiny(kind)
    chats = [laws.CHATS[0], laws.CHATS[2]]
    inputs = model.encode_chats(chats, [laws.pictures_of(chat, 3 * i) for i, chat in enumerate(chats)])
    model.tower_inputs(inputs)
    features = model.image_features(inputs)
    for wrong, row in ((moved_between_rows, "1"), (one_less, "2")):
        changed = wrong(inputs)
        with pytest.raises(UserError, match=rf"row {row} of a batch has \d+ .* \d+ features"):
            model.tower_inputs(changed)
        with pytest.raises(UserError, match=rf"row {row} of a batch has \d+ .* \d+ features"):
            model.embed(changed, features=features)


def test_training_refuses_a_template_that_leaves_pictures_out(tmp_path, capsys):
    model = tiny("llava")
    written = model.processor.chat_template
    first = "{% for part in message['content'] if part['type'] == 'image' %}"
    assert first in written
    model.processor.chat_template = written.replace(first, f"{first}{{% if loop.first %}}").replace(
        "{{ '<image>\n' }}{% endfor %}", "{{ '<image>\n' }}{% endif %}{% endfor %}"
    )
    laws.saved(model, tmp_path / "model")
    rows = list(end_to_end.rows(tmp_path))
    for row in (row for row in rows if row["images"]):
        row["images"] *= 2
        row["messages"][0]["content"].insert(0, {"type": "image"})
    data = end_to_end.write_lines(tmp_path / "rows.jsonl", rows)
    chosen = {"model": tmp_path / "model", "data": [str(data)], "lora.modules": ["q_proj"]}
    settings = [f"{name}={value}" for name, value in {**end_to_end.SETTINGS, **chosen}.items()]
    capsys.readouterr()
    assert cli.run(["train", "miniature", "--out", str(tmp_path / "rr"), *settings]) == 2
    said = [line for line in capsys.readouterr().err.splitlines() if "`<image>`" in line]
    assert len(said) == 1 and "once for each picture; of 2 it wrote 1" in said[0], said
