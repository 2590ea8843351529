"""Damage to files: seeded changes of bytes, texts, JSON, tables, pictures, tensors, one small function each."""

from __future__ import annotations

import csv
import io
import json
import struct
import zlib
from collections.abc import Callable
from random import Random
from typing import Any

import yaml
from PIL import Image

Change = Callable[[bytes, Random], bytes]

ODD_BYTES = (b"\xef\xbb\xbf", b"\0", b"\xff\xfe", b"\xed\xa0\xbd", b"\xe2\x80\xa8", b"\x85", b"\r", b"\x1a", b"\x1b[2J")
ODD_TEXTS = (
    "\ufeff",
    "\0",
    "\u2028",
    "\x85",
    "\\ud83d",
    "\\u0000",
    "1e999",
    "9" * 5000,
    "[" * 100_000,
    '{"a":' * 50_000,
)
ODD_TEXTS += (
    '"',
    "'",
    ",",
    "\t",
    "\r",
    "\n",
    "{",
    "]",
    ":",
    "NaN",
    "-Infinity",
    "<image>",
    "\x1b[2J",
    "../../x",
    "\u202e",
)
ODD_YAML = (
    "2024-13-45",
    "!!python/object:os.system x",
    "!!float x",
    "!!binary x",
    "*a",
    "&a [*a]",
    "? [a]\n: b",
    "0o9",
)
ODD_TEMPLATE = (
    "{{ x }}",
    "{{ 1 // 0 }}",
    "{% include 'x' %}",
    "{{ ''.__class__.__mro__ }}",
    "{% break %}",
    "{{ messages }}",
)
ODD_VALUES: tuple[Any, ...] = (
    None,
    True,
    0,
    -1,
    10**400,
    2**63,
    1e308,
    float("nan"),
    float("inf"),
    0.5,
    "",
    " ",
    "\ud83d",
)
ODD_VALUES += (
    "\0",
    "../../x",
    "/etc/hostname",
    "a" * 100_000,
    "<image>",
    "\u2028",
    [],
    {},
    [[]],
    [None],
    {"": None},
    "1",
    "no",
)


def _at(data: bytes, rng: Random) -> int:
    return rng.randint(0, len(data))


def flip_a_bit(data: bytes, rng: Random) -> bytes:
    """One bit is another."""
    if not data:
        return data
    place = rng.randrange(len(data))
    return data[:place] + bytes([data[place] ^ 1 << rng.randrange(8)]) + data[place + 1 :]


def cut_off(data: bytes, rng: Random) -> bytes:
    """The end is missing."""
    return data[: _at(data, rng)]


def cut_out(data: bytes, rng: Random) -> bytes:
    """A piece of the middle is missing."""
    start = _at(data, rng)
    return data[:start] + data[start + rng.randint(1, 40) :]


def repeat(data: bytes, rng: Random) -> bytes:
    """A piece comes twice."""
    start = _at(data, rng)
    end = start + rng.randint(1, 200)
    return data[:end] + data[start:end] + data[end:]


def insert_bytes(data: bytes, rng: Random) -> bytes:
    """A mark of byte order, NUL, half a surrogate pair, a control character; at the start as often as elsewhere."""
    place = rng.choice((0, _at(data, rng)))
    return data[:place] + rng.choice(ODD_BYTES) + data[place:]


def empty(data: bytes, rng: Random) -> bytes:
    """Nothing, or nothing but blanks."""
    return rng.choice((b"", b"\n", b" \n ", b"\0" * 8))


BYTES: tuple[Change, ...] = (flip_a_bit, cut_off, cut_out, repeat, insert_bytes, empty)


def encode_otherwise(data: bytes, rng: Random) -> bytes:
    """Another encoding than UTF-8, or other line ends."""
    text = data.decode("utf-8", "replace")
    if rng.random() < 0.3:
        return text.replace("\n", rng.choice(("\r\n", "\r", "\u2028"))).encode()
    return text.replace("e", "\u00e9", 1).encode(rng.choice(("utf-16", "utf-16-le", "latin-1", "utf-8-sig")), "replace")


def _inserting(texts: tuple[str, ...], data: bytes, rng: Random) -> bytes:
    text = data.decode("utf-8", "replace")
    place = rng.randint(0, len(text))
    return (text[:place] + rng.choice(texts) + text[place:]).encode("utf-8", "replace")


def insert_text(data: bytes, rng: Random) -> bytes:
    """A character, a huge number or deep brackets where none belongs."""
    return _inserting(ODD_TEXTS, data, rng)


def swap_lines(data: bytes, rng: Random) -> bytes:
    """A line is lost, comes twice or is empty."""
    lines = data.split(b"\n")
    place = rng.randrange(len(lines))
    lines[place : place + 1] = rng.choice(([], [lines[place]] * 2, [b""], [b"", lines[place]]))
    return b"\n".join(lines)


TEXT: tuple[Change, ...] = (*BYTES, encode_otherwise, insert_text, swap_lines)


def _places(value: Any) -> list[tuple[Any, Any]]:
    """Every (container, key) inside a JSON value."""
    keys = list(value) if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ()
    return [pair for key in keys for pair in ((value, key), *_places(value[key]))]


def change_value(value: Any, rng: Random) -> Any:
    """A JSON value with one place changed: another type, gone, wrapped, renamed, nested, or a neighbour's."""
    whole = {"": value}
    container, key = rng.choice(_places(whole))
    held = container[key]
    kind = rng.randrange(7)
    if kind == 0 and container is not whole:
        del container[key]
    elif kind == 1:
        container[key] = rng.choice(([held], {"a": held}, str(held), [held, held]))
    elif kind == 2 and isinstance(container, dict) and container is not whole:
        container[rng.choice((str(key) + "x", "", "id", "auto_map", "schema"))] = container.pop(key)
    elif kind == 3:
        other, at = rng.choice(_places(whole))
        container[key] = json.loads(json.dumps(other[at]))
    elif kind == 4:
        for _ in range(rng.choice((3, 90))):
            held = [held]
        container[key] = held
    else:
        container[key] = rng.choice(ODD_VALUES)
    return whole[""]


def _parsed(change: Callable[[Any, Random], Any], text: str, rng: Random) -> str:
    """JSON text with a change of its value; as it is if it is no JSON any more."""
    try:
        return json.dumps(change(json.loads(text), rng))
    except (ValueError, RecursionError):
        return text


def change_json(data: bytes, rng: Random) -> bytes:
    """One place of a JSON file is another value."""
    return _parsed(change_value, data.decode("utf-8", "replace"), rng).encode("utf-8", "replace")


def change_line(data: bytes, rng: Random) -> bytes:
    """One place of one JSON line is another value."""
    lines = data.decode("utf-8", "replace").split("\n")
    place = rng.choice([number for number, line in enumerate(lines) if line.strip()] or [0])
    lines[place] = _parsed(change_value, lines[place], rng)
    return "\n".join(lines).encode("utf-8", "replace")


def double_key(data: bytes, rng: Random) -> bytes:
    """A key comes twice in an object, with another value first or last."""
    parts = data.split(b'": ')
    if len(parts) < 2:
        return data
    place = rng.randrange(len(parts) - 1)
    key = parts[place].rpartition(b'"')[2]
    parts[place] += b'": ' + json.dumps(rng.choice(ODD_VALUES)).encode() + b', "' + key
    return b'": '.join(parts)


JSON: tuple[Change, ...] = (*TEXT, *[change_json] * 14, double_key)
JSONL: tuple[Change, ...] = (*TEXT, *[change_line] * 14, double_key)


def change_yaml(data: bytes, rng: Random) -> bytes:
    """One place of a YAML file is another value."""
    try:
        return yaml.safe_dump(change_value(yaml.safe_load(data), rng)).encode("utf-8", "replace")
    except (yaml.YAMLError, ValueError, RecursionError, TypeError):
        return data


def insert_yaml(data: bytes, rng: Random) -> bytes:
    """A tag, an anchor, an impossible date."""
    return _inserting(ODD_YAML, data, rng)


def repeat_key(data: bytes, rng: Random) -> bytes:
    """A line of YAML comes again with another value."""
    lines = data.split(b"\n")
    line = rng.choice(lines)
    return b"\n".join([*lines, line.partition(b":")[0] + b": " + rng.choice((b"", b"1", b"[]", b"x"))])


YAML: tuple[Change, ...] = (*TEXT, *[change_yaml] * 8, *[insert_yaml] * 2, repeat_key)


def change_table(data: bytes, rng: Random) -> bytes:
    """A cell is lost, one too many, without its quotes, or its quote is never closed; a column comes twice."""
    text = data.decode("utf-8", "replace")
    comma = "\t" if "\t" in text.partition("\n")[0] else ","
    try:
        rows = list(csv.reader(io.StringIO(text, newline=""), delimiter=comma))
    except csv.Error:  # it is no table any more
        return data
    row = rng.choice([row for row in rows if row] or [[""]])
    place = rng.randrange(len(row))
    odd = rng.choice(ODD_TEXTS)
    row[place : place + 1] = rng.choice(([], [row[place]] * 2, [""], ["a, b"], ['"' + row[place]], [odd], [row[0]]))
    if rng.random() < 0.5:
        return "\n".join(comma.join(row) for row in rows).encode("utf-8", "replace")
    out = io.StringIO()
    csv.writer(out, delimiter=comma).writerows(rows)
    return out.getvalue().encode("utf-8", "replace")


TABLE: tuple[Change, ...] = (*TEXT, *[change_table] * 9)


def insert_template(data: bytes, rng: Random) -> bytes:
    """Jinja that fails, looks around or asks for more."""
    return _inserting(ODD_TEMPLATE, data, rng)


TEMPLATE: tuple[Change, ...] = (*TEXT, *[insert_template] * 4)


def _chunk(kind: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


def change_png(data: bytes, rng: Random) -> bytes:
    """A PNG whose header says something else, or with a chunk that nobody asked for; checksums are right."""
    if data[12:16] != b"IHDR" or len(data) < 33:
        return data
    fields = list(struct.unpack(">IIBBBBB", data[16:29]))
    if rng.random() < 0.5:
        place = rng.randrange(len(fields))
        fields[place] = rng.choice(
            (0, 1, 2, 3, 4, 6, 8, 16, 255) if place > 1 else (0, 1, 7, 9000, 2**31 - 1, 2**32 - 1)
        )
        return data[:8] + _chunk(b"IHDR", struct.pack(">IIBBBBB", *fields)) + data[33:]
    kind = rng.choice(
        (b"tRNS", b"PLTE", b"eXIf", b"iCCP", b"zTXt", b"gAMA", b"acTL", b"sBIT", b"iTXt", b"IDAT", b"abcd")
    )
    bomb = b"a\0\0" + zlib.compress(b"a" * 10**6)
    content = rng.choice(
        (b"", rng.randbytes(6), rng.randbytes(60), bomb, struct.pack(">II", 9, 0), b"MM\0*\0\0\0\x08" * 2)
    )
    return data[:33] + _chunk(kind, content) + data[33:]


def save_otherwise(data: bytes, rng: Random) -> bytes:
    """The same picture in another mode or format: 16 bits, floats, CMYK, transparent, animated, turned."""
    try:
        with Image.open(io.BytesIO(data)) as opened:
            picture = opened.convert("RGB")
    except Exception:  # it is no picture any more
        return data
    form, mode = rng.choice(
        (("PNG", "I;16"), ("PNG", "LA"), ("PNG", "P"), ("PNG", "1"), ("PNG", "RGBA"), ("TIFF", "F"))
    )
    form, mode = rng.choice(
        ((form, mode), ("JPEG", "CMYK"), ("JPEG", "L"), ("GIF", "P"), ("TIFF", "I;16"), ("WEBP", "RGBA"))
    )
    other = picture.convert("L").convert(mode) if mode in ("I;16", "F") else picture.convert(mode)
    options: dict[str, Any] = {}
    if rng.random() < 0.3 and form in ("PNG", "GIF", "TIFF", "WEBP"):
        options = {"save_all": True, "append_images": [other.transpose(Image.Transpose.ROTATE_180)]}
    if rng.random() < 0.3 and form in ("PNG", "JPEG", "WEBP"):
        exif = Image.Exif()
        exif[0x0112] = rng.choice((0, 3, 6, 9))
        options["exif"] = exif
    out = io.BytesIO()
    try:
        other.save(out, form, **options)
    except (OverflowError, ValueError, OSError):  # more than the form can say, such as the size of a GIF
        return data
    return out.getvalue()


PICTURE: tuple[Change, ...] = (*BYTES, *[save_otherwise] * 4, *[change_png] * 4)


def change_header(data: bytes, rng: Random) -> bytes:
    """Safetensors whose header says something else, with the right or a wrong length in front."""
    size = int.from_bytes(data[:8], "little")
    header = _parsed(change_value, data[8 : 8 + size].decode("utf-8", "replace"), rng).encode("utf-8", "replace")
    length = len(header) if rng.random() < 0.8 else rng.choice((0, 1, len(header) + 1, 2**40, 2**64 - 1))
    return length.to_bytes(8, "little") + header + data[8 + size :]


def change_tensors(data: bytes, rng: Random) -> bytes:
    """Safetensors with other numbers, another shape, another name, or fewer tensors."""
    from safetensors.torch import load, save

    try:
        tensors = load(data)
    except Exception:  # no safetensors any more
        return data
    name = rng.choice(sorted(tensors))
    tensor = tensors.pop(name)
    odd = {"fewer": {}, "renamed": {f"{name}.x": tensor}, "nan": {name: tensor * float("nan")}}
    odd |= {"flat": {name: tensor.flatten()}, "half": {name: tensor.half()}, "long": {name: tensor.long()}}
    odd |= {"layout": {name.replace("language_model.", ""): tensor}, "more": {name: tensor, "x": tensor.clone()}}
    return save({**tensors, **odd[rng.choice(sorted(odd))]})


TENSORS: tuple[Change, ...] = (*BYTES, *[change_header] * 4, *[change_tensors] * 4)


def change_column(data: bytes, rng: Random) -> bytes:
    """Parquet with one column gone, renamed, empty or of another kind."""
    import pyarrow
    import pyarrow.parquet

    try:
        table = pyarrow.parquet.read_table(io.BytesIO(data))
    except Exception:  # no Parquet any more
        return data
    place = rng.randrange(table.num_columns)
    name, rows = table.column_names[place], len(table)
    odd = rng.choice(
        (None, 1, -0.5, "", "x" * 10_000, b"\0", [], ["a"], {"bytes": b"x", "path": None}, {"path": "../x"})
    )
    out = io.BytesIO()
    if rng.random() < 0.3:
        table = rng.choice((table.remove_column(place), table.slice(0, 0), pyarrow.concat_tables([table, table])))
    else:
        name = name if rng.random() < 0.8 else "other"
        table = table.set_column(place, name, pyarrow.array([odd] * rows))
    pyarrow.parquet.write_table(table, out)
    return out.getvalue()


PARQUET: tuple[Change, ...] = (*BYTES, *[change_column] * 8)

CHANGES: dict[str, tuple[Change, ...]] = {
    **dict.fromkeys(("", ".txt", ".md", ".py"), TEXT),
    **{".json": JSON, ".jsonl": JSONL, ".yaml": YAML, ".csv": TABLE, ".jinja": TEMPLATE},
    **dict.fromkeys((".png", ".jpg", ".jpeg", ".gif", ".tiff", ".webp"), PICTURE),
    **{".safetensors": TENSORS, ".parquet": PARQUET, ".arrow": BYTES},
}
"""What can be done to a file, by its ending."""
