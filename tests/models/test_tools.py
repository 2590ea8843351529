"""Tools in chat templates: four ways of writing calls, what of a chat counts as one, templates that leave tools out."""

import copy
import json
import shutil
from pathlib import Path

import pytest

from mm_cb.core.calls import Call
from mm_cb.core.errors import UserError
from mm_cb.models.chat import Dialect, chat, render_chat
from mm_cb.models.families import load_processor, read_config
from mm_cb.models.text import TextProcessor
from mm_cb.models.tools import tool_format
from tests.models.shapes import MISTRAL_TEMPLATE, sentencepiece_like_tokenizer
from tests.tiny_llava import tiny_processor

# In the shape of the published templates, with the same ways of writing tools, calls and results.
QWEN = (
    "{%- if tools %}{{- '<|im_start|>system\n' }}{%- if messages[0].role == 'system' %}{{- messages[0].content }}"
    "{%- endif %}{{- '\n# Tools\n<tools>' }}{%- for tool in tools %}{{- '\n' }}{{- tool | tojson }}{%- endfor %}"
    '{{- \'\n</tools>\n<tool_call>\n{"name": <function-name>, "arguments": <args-json-object>}\n</tool_call></s>\n\' }}'
    "{%- elif messages[0].role == 'system' %}{{- '<|im_start|>system\n' + messages[0].content + '</s>\n' }}{%- endif %}"
    "{%- for message in messages %}"
    "{%- if message.role == 'user' or (message.role == 'assistant' and not message.tool_calls) %}"
    "{{- '<|im_start|>' + message.role + '\n' + message.content + '</s>\n' }}"
    "{%- elif message.role == 'assistant' %}{{- '<|im_start|>assistant' }}"
    "{%- if message.content %}{{- '\n' + message.content }}{%- endif %}{%- for call in message.tool_calls %}"
    '{{- \'\n<tool_call>\n{"name": "\' + call.function.name + \'", "arguments": \' }}'
    "{{- call.function.arguments | tojson }}{{- '}\n</tool_call>' }}{%- endfor %}{{- '</s>\n' }}"
    "{%- elif message.role == 'tool' %}{{- '<|im_start|>user\n<tool_response>\n' + message.content "
    "+ '\n</tool_response></s>\n' }}{%- endif %}{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n' }}{%- endif %}"
)
LLAMA = (
    "{{- '<s>' }}{%- if tools %}{{- 'Respond with JSON: {\"name\": function name, \"parameters\": dictionary}.\n' }}"
    "{%- for tool in tools %}{{- tool | tojson(indent=4) }}{{- '\n\n' }}{%- endfor %}{%- endif %}"
    "{%- for message in messages %}{%- if not (message.role == 'tool' or 'tool_calls' in message) %}"
    "{{- '<|' + message.role + '|>\n\n' + message.content | trim + '</s>' }}"
    "{%- elif 'tool_calls' in message %}{%- if not message.tool_calls|length == 1 %}"
    "{{- raise_exception('This model only supports single tool-calls at once!') }}{%- endif %}"
    "{%- set call = message.tool_calls[0].function %}{{- '<|assistant|>\n\n{\"name\": \"' + call.name + '\", ' }}"
    "{{- '\"parameters\": ' }}{{- call.arguments | tojson }}{{- '}' }}{{- '</s>' }}"
    "{%- else %}{{- '<|ipython|>\n\n' }}{{- message.content | tojson }}{{- '</s>' }}{%- endif %}{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|assistant|>\n\n' }}{%- endif %}"
)
MISTRAL = (
    "{{- '<s>' }}{%- for message in messages %}{%- if message.role == 'user' %}"
    "{%- if tools and loop.last or tools and loop.first %}{{- '[AVAILABLE_TOOLS] ' + (tools | tojson) }}"
    "{%- endif %}{{- '[INST] ' + message.content + '[/INST]' }}"
    "{%- elif message.tool_calls is defined %}{{- '[TOOL_CALLS] [' }}{%- for call in message.tool_calls %}"
    "{%- set out = call.function | tojson %}{{- out[:-1] }}{%- if call.id|length != 9 %}"
    "{{- raise_exception('Tool call IDs should be alphanumeric strings with length 9!') }}{%- endif %}"
    "{{- ', \"id\": \"' + call.id + '\"}' }}{%- if not loop.last %}{{- ', ' }}{%- else %}{{- ']</s>' }}{%- endif %}"
    "{%- endfor %}{%- elif message.role == 'assistant' %}{{- ' ' + message.content + '</s>' }}"
    "{%- elif message.role == 'tool' %}"
    '{{- \'[TOOL_RESULTS] {"content": \' + message.content|string + \', "call_id": "\' + message.tool_call_id '
    "+ '\"}[/TOOL_RESULTS]' }}{%- endif %}{%- endfor %}"
)
TEMPLATES = {"hermes": QWEN, "llama": LLAMA, "mistral": MISTRAL}
TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "brew",
            "description": "Brews tea.",
            "parameters": {"type": "object", "properties": {"leaf": {"type": "string"}}, "required": ["leaf"]},
        },
    }
]
CALL = Call("brew", {"leaf": 'gr\\een "tea" }\n</tool_call>', "n": [1, 2.5, None, True, {"a": {}}]})


def processor(template):
    made = TextProcessor(copy.deepcopy(sentencepiece_like_tokenizer()))
    made.tokenizer.chat_template = template
    made.chat_template = template
    return made


def turns(calls, text=""):
    return [
        *chat("make tea"),
        {"role": "assistant", "content": text, "tool_calls": calls},
        *({"role": "tool", "content": f'"done" {n}'} for n in range(len(calls))),
        {"role": "assistant", "content": "It is ready."},
    ]


def spans(rendered):
    return [(span.role.name, rendered.text[span.start : span.end]) for span in rendered.spans]


@pytest.mark.parametrize("name", TEMPLATES)
def test_a_family_is_told_by_what_its_template_writes(name):
    assert tool_format(processor(TEMPLATES[name])).name == name


@pytest.mark.parametrize("name", TEMPLATES)
@pytest.mark.parametrize("count", [1, 2])
def test_calls_are_found_whole_and_read_back(name, count):
    if (name, count) == ("llama", 2):
        return  # its template refuses, see below
    calls = [CALL, Call("brew", {"leaf": "black"})][:count]
    rendered = render_chat(processor(TEMPLATES[name]), turns(calls), tools=TOOLS)
    (said,) = [text for role, text in spans(rendered) if role == "CALL"]
    assert said.endswith("</s>")
    assert tool_format(processor(TEMPLATES[name])).read(said.removesuffix("</s>")) == (calls, "")
    others = [(role, text) for role, text in spans(rendered) if role != "CALL"]
    assert others[0] == ("USER", "make tea") and others[-1] == ("COMPLETION", "It is ready.</s>")
    assert [role for role, _ in others[1:-1]] == ["USER"] * count
    assert "Brews tea." in rendered.text


@pytest.mark.parametrize("name", TEMPLATES)
def test_the_result_is_what_the_template_writes(name):
    made, call = processor(TEMPLATES[name]), Call("brew", {"leaf": "black"})
    told = {"type": "function", "id": "call00000", "function": {"name": "brew", "arguments": {"leaf": "black"}}}
    plain = [
        *chat("make tea"),
        {"role": "assistant", "content": "", "tool_calls": [told]},
        {"role": "tool", "content": '"done" 0', "tool_call_id": "call00000"},
        {"role": "assistant", "content": "It is ready."},
    ]
    written = made.apply_chat_template(plain, tools=TOOLS, tokenize=False)
    assert render_chat(made, turns([call]), tools=TOOLS).text == written.rstrip("\n")


def test_text_beside_a_call_is_the_assistants_too():
    rendered = render_chat(processor(QWEN), turns([CALL], "I will."), tools=TOOLS)
    assert ("COMPLETION", "I will.") in spans(rendered)
    with pytest.raises(UserError, match="must write the texts of all messages"):  # these drop it
        render_chat(processor(LLAMA), turns([CALL], "I will."), tools=TOOLS)


def test_a_chat_may_end_with_a_call_open_or_closed_and_be_gone_on_with_behind_a_result():
    made, messages = processor(QWEN), turns([CALL])
    closed = render_chat(made, messages[:2], tools=TOOLS).text
    assert closed.endswith("</tool_call></s>")
    assert render_chat(made, messages[:2], tools=TOOLS, close_turn=False).text == closed.removesuffix("</s>")
    assert render_chat(made, messages[:3], tools=TOOLS).text.endswith("<|im_start|>assistant\n")


def test_an_operators_text_is_neither_the_users_nor_the_assistants():
    messages = [{"role": "system", "content": "Be kind."}, *turns([CALL])]
    assert ("TEMPLATE", "Be kind.") in spans(render_chat(processor(QWEN), messages, tools=TOOLS))


@pytest.mark.parametrize("made", [processor(MISTRAL_TEMPLATE), tiny_processor()], ids=["text", "pictures"])
def test_a_template_that_leaves_tools_out_is_refused(made):
    for messages in (chat("make tea"), turns([CALL])):
        with pytest.raises(UserError, match="leaves out the tools that it is given, in silence"):
            render_chat(made, messages, tools=TOOLS)


def test_calls_that_a_template_cannot_write_are_refused():
    with pytest.raises(UserError, match="single tool-calls at once"):
        render_chat(processor(LLAMA), turns([CALL, CALL]), tools=TOOLS)
    with pytest.raises(UserError, match="in a way that is not read here"):
        tool_format(processor(QWEN.replace("<tool_call>", "<call>")))


def test_a_template_is_asked_how_it_writes_calls_once_and_again_when_it_is_another():
    one, asked = processor(TEMPLATES["hermes"]), []
    template = type(one).apply_chat_template
    one.apply_chat_template = lambda *given, **more: asked.append(1) or template(one, *given, **more)
    assert [tool_format(one).name for _ in range(3)] == ["hermes"] * 3 and len(asked) == 2
    one.tokenizer.chat_template = TEMPLATES["mistral"]
    assert [tool_format(one).name for _ in range(3)] == ["mistral"] * 3 and len(asked) == 4
    dropping = QWEN.replace("call.function.arguments | tojson", "'{}'")
    with pytest.raises(UserError, match="in a way that is not read here"):
        render_chat(processor(dropping), turns([CALL]), tools=TOOLS)


def test_a_tool_that_names_the_image_placeholder_is_refused():
    tool = copy.deepcopy(TOOLS[0])
    tool["function"]["description"] = "Shows <image>."
    with pytest.raises(UserError, match="must not hold the image placeholder `<image>`"):
        render_chat(processor(QWEN), chat("make tea"), tools=[tool], dialect=Dialect("<image>", "<image>", "</s>"))


def published(folder, around="{}"):
    """A small Qwen2.5-VL with its two templates, each with something around it; where it is from."""
    source = Path(__file__).parents[1] / "miniature" / "miniature-qwen2_5_vl"
    for file in source.iterdir():
        if file.is_file() and file.name != "chat_template.jinja":
            shutil.copy(file, folder)
    plain, taught = (source / "chat_template.jinja").read_text().rstrip("\n"), QWEN.replace("</s>", "<|im_end|>")
    (folder / "chat_template.json").write_text(json.dumps({"chat_template": around.replace("{}", plain)}))
    fields = json.loads((source / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps(fields | {"chat_template": around.replace("{}", taught)}))
    return source


def test_a_model_that_sees_is_shown_tools_by_its_tokenizers_template_where_the_processors_takes_none(tmp_path):
    """Qwen2.5-VL is published so: chat_template.json is for pictures alone, tokenizer_config.json's for tools alone."""
    source = published(tmp_path)
    made = load_processor(tmp_path, read_config(tmp_path))
    assert tool_format(made).name == "hermes"
    picture = "<|vision_start|><|image_pad|><|vision_end|>"
    dialect, asked = Dialect("<|image_pad|>", "<|image_pad|>", "<|im_end|>"), chat("make tea", images=1)
    answer = {"role": "assistant", "content": "", "tool_calls": [CALL]}
    rendered = render_chat(made, [*asked, answer], dialect=dialect, tools=TOOLS)
    assert rendered.text.startswith("<|im_start|>system\n\n# Tools\n<tools>\n")
    assert f"<|im_start|>user\n{picture}make tea<|im_end|>\n" in rendered.text
    (said,) = [text for role, text in spans(rendered) if role == "CALL"]
    assert tool_format(made).read(said.removesuffix("<|im_end|>")).calls == [CALL]
    untold = load_processor(source, read_config(source))
    assert render_chat(made, asked, dialect=dialect) == render_chat(untold, asked, dialect=dialect)
    made.save_pretrained(tmp_path / "saved")
    shutil.copy(source / "config.json", tmp_path / "saved")
    assert tool_format(load_processor(tmp_path / "saved", read_config(source))).name == "hermes"


@pytest.mark.parametrize("around", ["\n{}", "  {}", "{}\n", "{}{{ '' }}\n", "{}.", "{}.\n\n"])
def test_two_templates_in_one_write_what_each_writes(tmp_path, around):
    published(tmp_path, around)
    made = load_processor(tmp_path, read_config(tmp_path))
    seeing = json.loads((tmp_path / "chat_template.json").read_text())["chat_template"]
    asked, flat = chat("make tea", images=1), [{"role": "user", "content": "make tea"}]
    for tools in (None, []):
        assert made.apply_chat_template(asked, tools=tools) == made.apply_chat_template(asked, chat_template=seeing)
    assert made.apply_chat_template(flat, tools=TOOLS) == made.tokenizer.apply_chat_template(
        flat, tools=TOOLS, tokenize=False
    )
