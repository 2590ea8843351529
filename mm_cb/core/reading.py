"""One strict reader for each kind of text file that a user gives: what is read is what was meant, or it is refused.

Files are UTF-8, with or without a byte-order mark. A line ends with a line feed alone: U+2028 and its like are text.
"""

import json
import math
import os
import re
import reprlib
import stat
from collections.abc import Iterator, Mapping, Sequence
from functools import lru_cache
from json.decoder import JSONArray, JSONObject  # type: ignore[attr-defined]  # the standard library's, in Python
from json.scanner import py_make_scanner  # type: ignore[attr-defined]
from pathlib import Path
from typing import Any, NamedTuple

from mm_cb.core.errors import UserError, nearest
from mm_cb.core.folders import but_is
from mm_cb.core.folding import is_blank
from mm_cb.core.records import JsonObject

BOM = b"\xef\xbb\xbf"
_WIDE = {b"\xff\xfe": "UTF-16", b"\xfe\xff": "UTF-16"}
_PACKED = {b"\x1f\x8b": "gzip", b"PK\x03\x04": "zip", b"BZh91AY&SY": "bzip2", b"\xfd7zXZ\0": "xz"}
_PACKED |= {b"\x28\xb5\x2f\xfd": "zstd"}
_OTHER = {b"PAR1": "Parquet", b"ARROW1\0\0": "Arrow", b"SQLite format 3\0": "SQLite", b"\x89PNG": "PNG"}
LFS_POINTER = b"version https://git-lfs"
"""What a file begins with of which Git LFS has left a pointer alone."""
_ESCAPE = re.compile(r"\\(?:u([0-9a-fA-F]{4})|.)")
_SUSPECT = re.compile(r"\\u(?:[dD][89a-fA-F]|0000)")
_DECIMAL = re.compile(r"[-+]?(?:0|[1-9][0-9]*)")
_CLOSE = 0.8
"""So alike are a key and its misspelling."""
PICTURES = ("image", "images")
"""Keys under which rows name their pictures."""
_PICTURE = re.compile(
    r"(?:input|path|file|url|to|of)*(?:image|img|picture|pic|photo|screenshot)s?"
    r"(?:path|file|filename|name|url|uri|src|list|data|bytes|base64|b64)?s?\d*"
)


class TextFault(ValueError):
    """What is wrong with a text, and in which of its lines, from 1."""

    def __init__(self, message: str, line: int = 0) -> None:
        """Keep both; line 0 = not known yet."""
        super().__init__(message)
        self.line = line


class _Repeated(TextFault):
    """A key that comes twice in one object."""


class Line(NamedTuple):
    """One record of a file."""

    where: str
    """``file:line`` of its first line."""
    values: JsonObject


def read_text(path: Path, what: str = "text") -> str:
    """The text of a file.

    Args:
        path: The file.
        what: What it should be, for the error line.

    Raises:
        UserError: If it cannot be read or is not UTF-8; names the line and the byte.
    """
    try:
        content = file_bytes(path, what)
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"cannot read the {what} `{path}`: {reason}{but_is(path)}.") from error
    try:
        return decode(content)
    except TextFault as fault:
        raise UserError(f"{path}:{fault.line}: {fault}") from fault


def read_plain(path: Path, what: str) -> str:
    """The text of a file that people write, its lines ended by line feeds, whatever ended them (Windows: two bytes).

    Raises:
        UserError: As `read_text`.
    """
    return plain_lines(read_text(path, what))


def plain_lines(text: str) -> str:
    """Text whose lines end with a line feed, as Python reads it."""
    return text.replace("\r\n", "\n").replace("\r", "\n")


def file_bytes(path: Path, what: str = "input") -> bytes:
    """The bytes of a file.

    Raises:
        UserError: If it is a pipe or a device, see `refuse_pipe`.
        OSError: If it is not there or cannot be read.
    """
    refuse_pipe(path, what)
    return Path(path).read_bytes()


def refuse_pipe(path: Path, what: str = "input") -> None:
    """Refuse what is neither file nor folder: opening a pipe may wait for ever, and reading a device need not end.

    Raises:
        UserError: If it is a pipe or a device.
        OSError: If nothing is there.
    """
    if stat.S_IFMT(mode := os.stat(path).st_mode) not in (stat.S_IFREG, stat.S_IFDIR):
        kind = "a pipe" if stat.S_ISFIFO(mode) else "a socket" if stat.S_ISSOCK(mode) else "a device"
        raise UserError(f"the {what} `{path}` must be a file, which is read more than once, it is {kind}.")


def is_there(path: Path, what: str = "file") -> bool:
    """Whether a file that need not be there is; what stands in its place is not passed over as if nothing did.

    Raises:
        UserError: If it is a pipe, a device, a folder, a link that leads nowhere, or may not be read.
    """
    came = None
    try:
        refuse_pipe(path, what)
        if os.path.isdir(path):
            came = "a folder"
        elif not os.access(path, os.R_OK):
            came = "one that may not be read"
    except (FileNotFoundError, NotADirectoryError):
        if not os.path.islink(path):
            return False
        came = "a link that leads nowhere"
    except (OSError, ValueError) as error:
        came = f"out of reach: {getattr(error, 'strerror', None) or error}"
    if came:
        raise UserError(f"the {what} `{path}` must be a file, it is {came}; put the file there, or take it away.")
    return True


def decode(content: bytes) -> str:
    """UTF-8 bytes as text, without a byte-order mark.

    Raises:
        Fault: If they are not UTF-8, or hold a NUL.
    """
    if kind := other_kind(content):
        raise TextFault(kind, 1)
    if (nul := content.find(b"\0")) >= 0:
        line = content.count(b"\n", 0, nul) + 1
        place = nul - content.rfind(b"\n", 0, nul)
        raise TextFault(f"a NUL, a control character, is byte {place} of the line; save the file as text.", line)
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        start = error.start + (len(BOM) if content.startswith(BOM) else 0)
        line = content.count(b"\n", 0, start) + 1
        place = start - content.rfind(b"\n", 0, start)
        raise TextFault(
            f"the file must be UTF-8, byte {place} of the line (0x{content[start]:02x}) is not; save it as UTF-8.", line
        ) from error


def other_kind(content: bytes) -> str | None:
    """What the first bytes of a file tell that is no UTF-8 text, and what to do; None if they tell nothing."""
    if content.startswith(LFS_POINTER):
        return "the file is a Git LFS pointer, which stands for it; fetch the file itself by `git lfs pull`."
    for begins, kind in (_PACKED | _OTHER).items():
        if content.startswith(begins):
            return f"the file must be UTF-8 text, it is {kind}; {'unpack' if begins in _PACKED else 'convert'} it."
    wide = _WIDE.get(content[:2]) or ("UTF-16 or binary" if b"\0" in content[:2] else None)
    return wide and f"the file must be UTF-8, it is {wide}; save it as UTF-8."


def loads(text: str, *, nul: bool = False, any_text: bool = False) -> Any:
    """A JSON value: no key twice, no NaN or infinity, no half of a surrogate pair.

    Args:
        text: JSON.
        nul: Whether texts may hold NUL characters, as models' answers do.
        any_text: Whether they may also hold halves of surrogate pairs, as names of files do in what we write ourselves.

    Raises:
        Fault: If it is not that.
    """
    if text.startswith("\ufeff"):
        raise TextFault("a byte order mark (BOM) that begins no file, as where files were joined; take it out", 1)
    try:
        value = json.loads(text, **_STRICT)
    except json.JSONDecodeError as error:
        raise TextFault(f"broken JSON, {error.msg} at column {error.colno}", error.lineno) from error
    except RecursionError as error:
        raise TextFault("broken JSON, nested too deep", 1) from error
    except TextFault as fault:
        raise _located(text, **_STRICT) or fault from fault
    except ValueError as error:  # Python's own limit
        raise TextFault("a whole number has too many digits", 1) from error
    if not any_text and _SUSPECT.search(text):
        _refuse_escapes(text, nul)
    return value


def json_object(text: str, where: str, *, nul: bool = False) -> JsonObject:
    """A JSON object on a line of its own.

    Raises:
        UserError: If it is none, or not as `loads` takes it.
    """
    try:
        value = loads(text, nul=nul)
    except TextFault as fault:
        raise UserError(f"{where}: expected one JSON object on the line, got {fault}.") from fault
    if not isinstance(value, dict):
        raise UserError(f"{where}: expected one JSON object on the line, got {type(value).__name__}.")
    return value


def json_lines(path: Path, what: str, *, nul: bool = False) -> Iterator[Line]:
    """The objects of a file with one a line; blank lines are passed over.

    Raises:
        UserError: If the file cannot be read, or a line is no JSON object or ends otherwise; names file and line.
    """
    text = read_text(path, what)
    if text.lstrip().startswith("["):
        raise UserError(f"{path}:1: expected one JSON object a line, got a JSON array; write its objects line by line.")
    for number, line in enumerate(text.split("\n"), start=1):
        if line.strip():
            where = f"{path}:{number}"
            if "\r" in line.strip():
                raise UserError(
                    f"{where}: lines must end with line feeds, some end with carriage returns alone; save it so."
                )
            yield Line(where, json_object(line, where, nul=nul))


def json_file(path: Path, kind: type, expected: str, *, nul: bool = False) -> Any:
    """The content of a JSON file whose top level is a ``kind``.

    Raises:
        UserError: If the file cannot be read, is no such JSON, or holds another kind.
    """
    try:
        value = loads(read_text(path, "file"), nul=nul)
    except TextFault as fault:
        raise UserError(f"{path}:{fault.line}: expected {expected}, got {fault}.") from fault
    if not isinstance(value, kind):
        raise UserError(f"`{path}` must hold {expected}, got {type(value).__name__}.")
    return value


def refuse_repeated_keys(path: Path) -> None:
    """Refuse a JSON file that a library reads in which a key comes twice: it would take the last in silence.

    What else may be wrong with it is told by who reads it; numbers that are none in JSON, as some such files hold, are
    left alone.

    Raises:
        UserError: Naming file, line and key.
    """
    try:
        text = decode(file_bytes(path))
    except (OSError, TextFault):
        return
    try:
        json.loads(text, object_pairs_hook=_object)
    except _Repeated as repeated:
        fault = _located(text, object_pairs_hook=_object) or repeated
        raise UserError(f"{path}:{fault.line}: expected every key once, got {fault}; leave one of them.") from repeated
    except (ValueError, RecursionError):
        return


def load_yaml(text: str, where: str) -> Any:
    """A YAML value in which no key comes twice.

    Args:
        text: YAML.
        where: What the error line calls it: a file, or the setting.

    Raises:
        UserError: If it is no such YAML; names the line.
    """
    import yaml

    class Loader(yaml.SafeLoader):
        """Refuses keys that come twice, which YAML forbids and its readers take the last of, and what JSON has not."""

        def compose_node(self, parent: Any, index: Any) -> Any:
            event: Any = self.peek_event()
            place, self.open = f"{where}:{event.start_mark.line + 1}", getattr(self, "open", [])
            if isinstance(event, yaml.AliasEvent):
                if event.anchor in self.open:
                    raise UserError(f"{place}: the alias `*{event.anchor}` stands inside what it names; write it out.")
                return super().compose_node(parent, index)
            self.open.append(event.anchor)
            node = super().compose_node(parent, index)
            self.open.pop()
            return node

        def construct_scalar(self, node: Any) -> Any:
            value = super().construct_scalar(node)
            if reason := unfit(value):
                raise UserError(f"{where}:{node.start_mark.line + 1}: a text cannot be used: {reason}.")
            return value

        def construct_yaml_int(self, node: Any) -> Any:
            if not _DECIMAL.fullmatch(node.value):
                place = f"{where}:{node.start_mark.line + 1}"
                meant = f"YAML reads it as {super().construct_yaml_int(node)}"
                raise UserError(
                    f"{place}: a whole number must be written in digits alone, got `{node.value}` ({meant})."
                )
            return super().construct_yaml_int(node)

        def construct_yaml_float(self, node: Any) -> Any:
            if "_" in node.value or ":" in node.value:
                place, value = f"{where}:{node.start_mark.line + 1}", super().construct_yaml_float(node)
                raise UserError(
                    f"{place}: a number must be written in digits alone, got `{node.value}` (YAML reads it as {value})."
                )
            return super().construct_yaml_float(node)

        def construct_mapping(self, node: Any, deep: bool = False) -> Any:
            seen: list[Any] = []
            for key_node, _ in node.value:
                key = self.construct_object(key_node, deep=True) if key_node.tag != "tag:yaml.org,2002:merge" else None
                if key is not None and key in seen:
                    line = key_node.start_mark.line + 1
                    raise UserError(f"{where}:{line}: the key `{key}` comes twice; leave one of them.")
                seen.append(key)
            return super().construct_mapping(node, deep)

        def refuse(self, node: Any) -> Any:
            place, kind = f"{where}:{node.start_mark.line + 1}", node.tag.rpartition(":")[2]
            raise UserError(
                f"{place} is not YAML of texts, numbers, lists and `key: value` fields alone: it holds a {kind}; put a "
                "text in quotes."
            )

    Loader.add_constructor("tag:yaml.org,2002:int", Loader.construct_yaml_int)
    Loader.add_constructor("tag:yaml.org,2002:float", Loader.construct_yaml_float)
    for kind in ("binary", "timestamp", "set", "omap", "pairs"):
        Loader.add_constructor(f"tag:yaml.org,2002:{kind}", Loader.refuse)
    try:
        return yaml.load(text, Loader)  # noqa: S506  # a safe loader
    except RecursionError as error:
        raise UserError(f"{where} is not YAML: nested too deep.") from error
    except (yaml.YAMLError, ValueError, TypeError, LookupError, AttributeError) as error:  # of a tag and its value
        mark = getattr(error, "problem_mark", None)
        place = where if mark is None else f"{where}:{mark.line + 1}"
        problem = getattr(error, "problem", None) or error
        raise UserError(f"{place} is not YAML: {problem}.") from error


def refuse_typos(record: JsonObject, optional: Sequence[str], where: str) -> None:
    """Refuse a key that looks like an optional one which is not there: what it says would be passed over in silence.

    Raises:
        UserError: Naming both.
    """
    absent = [name for name in optional if name not in record]
    for key in record if absent else ():
        if key not in optional and (meant := nearest(key.strip(), absent, _CLOSE)):
            raise UserError(f"{where}: unknown key `{key}`, did you mean `{meant}`?")
    if (read := [key for key in optional if key in PICTURES]) and (lost := lost_picture(record, read)):
        raise UserError(f"{where}: unknown key `{lost}`, which names a picture; call it `{read[0]}`.")


def label_of(record: JsonObject, key: str, where: str) -> str:
    """What a record is counted under: its text, or ``all`` where it has none or null.

    Raises:
        UserError: If it is no text, or one of blanks alone, or with blanks around it: it would be a group of its own.
    """
    label = record.get(key)
    if label is None:
        return "all"
    if not isinstance(label, str):
        raise UserError(f"{where}: `{key}` must be a text or null, got {shown(label)}.")
    if is_blank(label) or label != label.strip():
        raise UserError(
            f"{where}: `{key}` must be a text without blanks around it, or null, got {shown(label)}, which would be a "
            "group of its own."
        )
    return label


def lost_picture(record: JsonObject, read: Sequence[str]) -> str | None:
    """The key of a picture that nobody would read, in a record that names none under the keys that are read.

    Args:
        record: What was given.
        read: Keys of pictures that are read; beside one, what else is said of pictures is left alone.
    """
    if any(record.get(key) for key in read):
        return None
    return next((key for key, value in record.items() if value and key not in read and _names_picture(key)), None)


@lru_cache(maxsize=4096)  # a file's rows have the same few keys
def _names_picture(key: str) -> bool:
    plain = re.sub(r"[\W_]", "", key.lower())
    near = nearest(plain, PICTURES, _CLOSE)
    return _PICTURE.fullmatch(plain) is not None or (near is not None and abs(len(near) - len(plain)) < 2)


def unfit(text: str) -> str | None:
    """Why a text can be no prompt, id or path; None if it can."""
    if "\0" in text:
        return "it holds a NUL character"
    try:
        text.encode()
    except UnicodeEncodeError as error:
        return f"it holds half of a surrogate pair ({text[error.start]!a}), which is no character"
    return None


REPLACED = "\ufffd"
"""What stands for bytes that were no character when a file was converted."""
BROKEN = "it holds U+FFFD, which stands for what a wrong encoding lost; save the file again as UTF-8 from its source"


def unfit_in_file(text: str) -> str | None:
    """Why a text of a user's file can be no prompt or target; None if it can."""
    return unfit(text) or (BROKEN if REPLACED in text else None)


def refuse_replaced(record: JsonObject, where: str) -> None:
    """Refuse a record of a user's file a text of which lost characters on the way.

    Raises:
        UserError: Naming the place and the key.
    """
    for key, value in record.items():
        if isinstance(value, str) and REPLACED in value:
            raise UserError(f"{where}: `{key}` cannot be used: {BROKEN}.")


def shown(value: Any) -> str:
    """A value as a message shows it: cut, and bytes by their number alone."""
    return _SHORT.repr(value)


class _Short(reprlib.Repr):
    def repr_bytes(self, value: bytes, level: int) -> str:
        return f"<{len(value):,} bytes>"

    repr_bytearray = repr_memoryview = repr_bytes


_SHORT = _Short()
_SHORT.maxstring = _SHORT.maxother = 80


def _object(pairs: list[tuple[str, Any]]) -> JsonObject:
    found = dict(pairs)
    if len(found) < len(pairs):
        keys = [key for key, _ in pairs]
        raise _Repeated(f"the key `{next(key for key in keys if keys.count(key) > 1)}` twice in one object")
    return found


def _number(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise TextFault(f"{text}, which is no number in JSON")
    return value


_STRICT: Mapping[str, Any] = {"object_pairs_hook": _object, "parse_constant": _number, "parse_float": _number}
"""What Python's reader of JSON is told, so that it takes nothing else."""


def _located(text: str, **checks: Any) -> TextFault | None:
    """The fault that our own checks of JSON raise, with the first line of the object or list that it is in."""
    decoder: Any = json.JSONDecoder(**checks)

    def with_line(parse: Any) -> Any:
        def parsed(state: tuple[str, int], *rest: Any) -> Any:
            try:
                return parse(state, *rest)
            except TextFault as fault:
                fault.line = fault.line or text.count("\n", 0, state[1]) + 1
                raise

        return parsed

    decoder.parse_object, decoder.parse_array = with_line(JSONObject), with_line(JSONArray)
    decoder.scan_once = py_make_scanner(decoder)
    try:
        decoder.decode(text)
    except TextFault as fault:
        fault.line = fault.line or 1
        return fault
    except RecursionError:
        return TextFault("broken JSON, nested too deep", 1)
    return None


def _refuse_escapes(text: str, nul: bool) -> None:
    """Refuse escapes of half a surrogate pair, and of NUL."""
    high: re.Match[str] | None = None
    for match in _ESCAPE.finditer(text):
        code = int(match[1], 16) if match[1] else -1
        if high is not None:
            if not 0xDC00 <= code < 0xE000 or match.start() != high.end():
                break
            high = None
        elif 0xD800 <= code < 0xDC00:
            high = match
        elif 0xDC00 <= code < 0xE000:
            high = match
            break
        elif code == 0 and not nul:
            raise TextFault("a NUL character (\\u0000) in a text", text.count("\n", 0, match.start()) + 1)
    if high is not None:
        line = text.count("\n", 0, high.start()) + 1
        raise TextFault(f"half of a surrogate pair ({high[0]}) in a text, which is no character", line)
