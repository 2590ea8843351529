"""docs/add_a_model.md: its example is a family like those that ship, on both image backends."""

import re
from functools import partial
from importlib import import_module
from pathlib import Path

import pytest
from transformers import InternVLConfig, InternVLProcessor, Qwen2Config

from mm_cb.core.errors import UserError
from mm_cb.models import VisionModel, registry
from tests.models import laws
from tests.models.tiny import _QWEN_TOKENS, _TEXT, BACKENDS, image_processor, token_ids, tokenizer, wrapped

PAGE = Path(__file__).parents[2] / "docs" / "add_a_model.md"
TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' }}{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}{{ '<IMG_CONTEXT>\n' }}{% else %}{{ part['text'] }}{% endif %}{% endfor %}"
    "{{ '<|im_end|>\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


@pytest.fixture(scope="module")
def family():
    """The page's class; the table is put back, as another process would have it."""
    (code,) = re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.S)
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(registry, "_FAMILIES", dict(registry._FAMILIES))
        space: dict = {}
        exec(compile(code, "internvl.py", "exec"), space)
        yield space["InternVLModel"]


def internvl(backend):
    words = tokenizer(
        [*_QWEN_TOKENS[:3], "<img>", "</img>", "<IMG_CONTEXT>", "<video>"],
        eos="<|im_end|>",
        pad="<|endoftext|>",
        start_image_token="<img>",
        end_image_token="</img>",
        context_image_token="<IMG_CONTEXT>",
        video_token="<video>",
    )
    images = image_processor(
        "got_ocr2", "GotOcr2ImageProcessor", backend, size={"height": 28, "width": 28}, max_patches=4
    )
    videos = import_module("transformers.models.internvl.video_processing_internvl").InternVLVideoProcessor()
    processor = InternVLProcessor(images, words, videos, image_seq_length=1, chat_template=TEMPLATE)
    tower = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = InternVLConfig(
        text_config=Qwen2Config(**_TEXT, **token_ids(words)),
        vision_config={**tower, "image_size": [28, 28], "patch_size": [14, 14]},
        image_token_id=words.convert_tokens_to_ids("<IMG_CONTEXT>"),
        image_seq_length=1,
        downsample_ratio=0.5,
    )
    return wrapped(config, processor)


@pytest.mark.parametrize("law", laws.LAWS, ids=lambda law: law.__name__)
@pytest.mark.parametrize("backend", BACKENDS)
def test_the_example_keeps_every_law(family, backend, law, tmp_path):
    assert isinstance(internvl(backend), family)
    law(partial(internvl, backend), tmp_path)


def test_without_the_class_the_model_is_refused_and_the_page_named(monkeypatch):
    shipped = {kind: one for kind, one in registry._FAMILIES.items() if kind != "internvl"}
    monkeypatch.setattr(registry, "_FAMILIES", shipped)
    with pytest.raises(UserError, match="internvl; docs/add_a_model.md"):
        internvl("pil")


def test_a_class_without_a_type_is_refused():
    with pytest.raises(ValueError, match="must name the model types"):
        registry.register_family(type("NamelessModel", (VisionModel,), {}))


def test_the_table_names_members_that_there_are():
    rows = re.findall(r"^\| (`.*?) \|", PAGE.read_text(encoding="utf-8"), re.M)
    names = {name for row in rows for name in re.findall(r"`(\w+)", row)}
    assert len(names) > 15 and all(hasattr(VisionModel, name) for name in names)
