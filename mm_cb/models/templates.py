"""Chat templates of strangers: run once apart, within limits of time and size, before this process runs them."""

import json
import signal
import subprocess
import sys
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

from mm_cb.core.errors import UserError
from mm_cb.models.base import ChatModel
from mm_cb.models.chat import ANSWER, Message, by_template, chat
from mm_cb.models.tools import PROBE

SECONDS, CHARACTERS = 10, 1_000_000
"""What a template may take for a few short chats: seconds of a processor, and characters for each."""
_CLOCK = "strftime_now"
_DAY = {
    **{"%Y": "2024", "%y": "24", "%m": "07", "%B": "July", "%b": "Jul", "%d": "26", "%e": "26", "%-d": "26"},
    **{"%A": "Friday", "%a": "Fri", "%H": "00", "%M": "00", "%S": "00", "%I": "12", "%p": "AM"},
}
"""The day that Llama 3's templates name where they are told none, at midnight."""
_MEMORY = 4 * 2**30
_ASKED = "question"
_TEXT = (
    'It\'s "A b":  C & d <x> {y} [z] 1/2, \N{LATIN SMALL LETTER E WITH ACUTE}!\n\n\tWhy? '
    + "words And Words " * 300
    + "end."
)
_SAID = f"Because. {_TEXT[::-1].strip()} So."
_SYSTEM = f"Be told: {_TEXT} Now."
"""Texts with what a template may fold, escape or cut."""
_CHILD = """
import importlib.util, json, re, resource, sys, types
from jinja2 import nodes
for name in ("transformers", "transformers.utils"):  # empty packages: all that theirs import takes a second
    found = importlib.util.find_spec(name)
    sys.modules[name] = package = types.ModuleType(name)
    package.__path__, package.__spec__ = found.submodule_search_locations, found
try:
    from transformers.utils import chat_template_utils as chats
except Exception:  # another version's needs them
    for name in [name for name in sys.modules if name.partition(".")[0] == "transformers"]:
        del sys.modules[name]
    from transformers.utils import chat_template_utils as chats
seconds, most, memory = map(int, sys.argv[1:])
try:
    resource.setrlimit(resource.RLIMIT_AS, (memory, memory))
except (ValueError, OSError):
    pass  # no such limit on this system
seconds += int(sum(resource.getrusage(resource.RUSAGE_SELF)[:2])) + 1  # the imports' own are not the template's
resource.setrlimit(resource.RLIMIT_CPU, (seconds, seconds + 1))
told = json.load(sys.stdin)
try:
    for chat in told["chats"]:
        asked = {"add_generation_prompt": chat[-1]["role"] == "user", **told["tokens"]}
        texts, _ = chats.render_jinja_template(conversations=[chat, chat], chat_template=told["template"], **asked)
        if len(texts[0]) > most:
            sys.exit("it writes " + format(len(texts[0]), ",") + " characters for a chat of two words")
        if texts[0] != texts[1]:
            sys.exit("it writes the same chat in two ways")
        if address := re.search("0x[0-9a-f]{6,}", texts[0]):
            sys.exit("it writes an address in memory (" + address[0] + "), another one each time")
    try:
        shown = {"tools": told["tools"], "add_generation_prompt": True, **told["tokens"]}
        texts, _ = chats.render_jinja_template(conversations=told["chats"][:1], chat_template=told["template"], **shown)
    except (MemoryError, RecursionError):
        raise
    except Exception:
        texts = [""]  # whoever gives it tools is told
    if len(texts[0]) > most:
        sys.exit("it writes " + format(len(texts[0]), ",") + " characters for a chat of one word and a tool")
    written = chats._compile_jinja_template(told["template"]).environment.parse(told["template"])
    drawn = [node.name for node in written.find_all(nodes.Filter) if node.name == "random"]
    drawn += [node.name for node in written.find_all(nodes.Name) if node.name == "lipsum"]
    if drawn:
        sys.exit("it draws by chance (`" + drawn[0] + "`), so that it would write the same chat in many ways")
except MemoryError:
    sys.exit("it takes more memory than there is")
except RecursionError:
    sys.exit("it calls itself without end")
except Exception as error:
    line = getattr(error, "lineno", None)
    sys.exit(type(error).__name__ + (f" in line {line}" if line else "") + f": {str(error)[:300]}")
"""


def check_template(model: ChatModel, folder: Path) -> None:
    """Refuse a model whose chat template is absent, broken, unsafe or endless, or leaves out what it is given.

    Args:
        model: The model, which need not have weights.
        folder: Where its files are.

    Raises:
        UserError: Naming the file and what is wrong with the template.
    """
    template = template_of(model.processor, model.processor.tokenizer, folder)
    sees = model.processor.image_token is not None
    chats = probes(pictures=sees)
    if model.guest is None:  # whose template is the package's own
        flat = chats if sees else [_flat(messages) for messages in chats]
        refuse_endless(template, flat, model.processor.tokenizer, folder)
    for messages in chats:
        images = sum(part["type"] == "image" for part in messages[0]["content"])
        said = ANSWER if len(messages) > 1 else None
        written = model.prompt(_ASKED, has_image=bool(images), completion=said)
        if (token := model.dialect.image_token) and written.count(token) != images:
            raise _unusable(folder, f"it writes `{token}` {written.count(token)} times for {images or 'no'} picture")
    for system in (None, _SYSTEM):
        _refuse_rewriting(model, chat(_TEXT, images=0, system=system, completion=_SAID), folder)


def _refuse_rewriting(model: ChatModel, messages: Sequence[Message], folder: Path) -> None:
    """Refuse a template that changes texts beyond blanks at their ends: ours are put in as they are, see `render_chat`.

    A chat that it cannot write is told where one is asked for: many have no system turn.
    """
    from jinja2 import TemplateError

    try:
        written = by_template(model.processor, messages, model.dialect, {})
    except (TemplateError, TypeError, ArithmeticError):
        return
    texts = {message["role"]: message["content"][-1]["text"] for message in messages}
    if lost := next((role for role, text in texts.items() if text not in written), None):
        raise _unusable(folder, f"it changes the text of a turn of the role `{lost}`, or leaves out a part of it")


def refuse_rewritten(messages: Sequence[Message], written: str) -> None:
    """Refuse a written chat in which a text of its messages is not to be found; blanks at its ends do not matter.

    Raises:
        UserError: Naming the role.
    """
    if lost := next((message["role"] for message in messages if str(message["content"]).strip() not in written), None):
        raise UserError(
            f"the judge's chat template changes the text of a turn of the role `{lost}`, or leaves out a part of it; "
            "take it from the model's published folder."
        )


def check_text_template(tokenizer: Any, folder: Path) -> None:
    """Refuse a tokenizer whose chat template is absent, broken, unsafe or endless.

    Raises:
        UserError: Naming the file and what is wrong with the template.
    """
    template = template_of(tokenizer, tokenizer, folder)
    refuse_endless(template, [_flat(messages) for messages in probes(pictures=False)], tokenizer, folder)


def probes(*, pictures: bool) -> list[list[Message]]:
    """Chats that every template must write: a question, and with its answer; with a picture too."""
    shown = (0, 1) if pictures else (0,)
    return [chat(_ASKED, images=images, completion=said) for images in shown for said in (None, ANSWER)]


def refuse_endless(template: str, chats: Sequence[Any], tokenizer: Any, folder: Path) -> None:
    """Run a template on some chats in a process of its own, within `SECONDS` and `CHARACTERS`.

    Raises:
        UserError: If it fails there or takes more.
    """
    tokens = {name: str(token) for name, token in tokenizer.special_tokens_map.items()}
    if fault := _run_apart(
        json.dumps({"chats": list(chats), "tools": [PROBE], "tokens": tokens, "template": template})
    ):
        raise _unusable(folder, fault)


def template_of(processor: Any, tokenizer: Any, folder: Path) -> str:
    """A processor's template; that of its tokenizer where it has none, as older folders have it.

    One that asks for the date is told the same one on every day: the same chat is the same prompt.

    Raises:
        UserError: If there is none.
    """
    found = getattr(processor, "chat_template", None) or tokenizer.chat_template
    if isinstance(found, dict):
        found = found.get("default")
    if not isinstance(found, str) or not found.strip():
        raise UserError(
            f"`{folder}` must hold a chat template (chat_template.jinja, or `chat_template` in tokenizer_config.json), "
            f"got {'none' if not found else type(found).__name__}; take it from the model's published folder."
        )
    if _CLOCK in found and not found.startswith(_STOPPED):
        found = _STOPPED + found
    processor.chat_template = tokenizer.chat_template = found
    return found


def _stopped_clock() -> str:
    """A macro that stands in for transformers' clock in a template."""
    parts = "".join(f" | replace('{code}', '{value}')" for code, value in _DAY.items())
    return f"{{%- macro {_CLOCK}(format) -%}}{{{{ format{parts} }}}}{{%- endmacro -%}}"


_STOPPED = _stopped_clock()


@cache
def _run_apart(told: str) -> str | None:
    """What is wrong with a template, or None."""
    limits = map(str, (SECONDS, CHARACTERS, _MEMORY))
    done = subprocess.run(
        [sys.executable, "-P", "-c", _CHILD, *limits], input=told, capture_output=True, text=True, check=False
    )
    if not done.returncode:
        return None
    if done.returncode in (-signal.SIGXCPU, -signal.SIGKILL):
        return f"it does not end within {SECONDS} seconds"
    lines = done.stderr.strip().splitlines()
    return lines[-1] if lines else f"it ended its process ({done.returncode})"


def _flat(messages: Sequence[Message]) -> list[Message]:
    """As models of text take messages."""
    return [{**message, "content": message["content"][-1]["text"]} for message in messages]


def _unusable(folder: Path, why: str) -> UserError:
    return UserError(
        f"the chat template of `{folder}` (chat_template.jinja, or `chat_template` in tokenizer_config.json) cannot be "
        f"used: {why.rstrip('.')}. Take it from the model's published folder."
    )
