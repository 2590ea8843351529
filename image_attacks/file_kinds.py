"""What a file is by its first bytes, whatever its name says: for telling a picture from what was sent in its place."""

_HEAD = 1024

PICTURES = {
    "PNG": (b"\x89PNG\r\n\x1a\n",),
    "JPEG": (b"\xff\xd8\xff",),
    "WEBP": (b"RIFF",),
    "GIF": (b"GIF87a", b"GIF89a"),
    "BMP": (b"BM",),
    "TIFF": (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+"),
}
"""The formats that are read, by Pillow's names, and how their files begin."""

_OTHERS = (
    (0, b"%PDF", "a PDF document"),
    (0, b"%!PS", "a PostScript document"),
    (0, b"PK\x03\x04", "a ZIP archive"),
    (0, b"\x1f\x8b", "a gzip archive"),
    (0, b"8BPS", "a Photoshop document"),
    (0, b"\x93NUMPY", "a NumPy array"),
    (0, b"\0\0\x01\0", "an icon (ICO)"),
    (0, b"\0\0\0\x0cjP  ", "a JPEG 2000 picture"),
    (0, b"\0\0\0\x0cJXL ", "a JPEG XL picture"),
    (0, b"\xff\x0a", "a JPEG XL picture"),
    (4, b"ftypavi", "an AVIF picture"),
    (4, b"ftyphei", "a HEIC picture"),
    (4, b"ftypmif1", "a HEIC picture"),
    (4, b"ftyp", "a video"),
    (0, b"\x1aE\xdf\xa3", "a video"),
    (0, b"version https://git-lfs", "a Git LFS pointer (`git lfs pull` fetches what it stands for)"),
)
"""What comes in place of a picture: offset, bytes there, name."""


def picture_format(data: bytes) -> str | None:
    """Pillow's name of the picture format that ``data`` begins as, or None."""
    found = next((name for name, heads in PICTURES.items() if data.startswith(heads)), None)
    return None if found == "WEBP" and data[8:12] != b"WEBP" else found


def is_cut(data: bytes) -> bool:
    """Whether a picture file lacks its end, or has zeros in its place, as half a download does.

    Decoders show what they have of such a file, in part without a word. Formats without compression show no end.
    """
    kind = picture_format(data)
    if kind == "PNG":
        return b"IEND\xaeB`\x82" not in data
    if kind == "JPEG":
        return b"\xff\xd9" not in data[_first_scan(data) :]  # the marker that ends it; others may follow
    if kind == "GIF":
        return not data.rstrip(b"\0").endswith(b";")
    return kind == "WEBP" and data.endswith(bytes(32))


def _first_scan(data: bytes) -> int:
    """Where the compressed levels of a JPEG begin: behind its header's segments, which may hold whole pictures."""
    place = 2
    while data[place : place + 1] == b"\xff" and data[place + 1 : place + 2] != b"\xda":
        if data[place + 1 : place + 2] == b"\xff":  # padding
            place += 1
            continue
        place += 2 + int.from_bytes(data[place + 2 : place + 4], "big")
    return place


def kind_of(data: bytes) -> str:
    """What ``data`` is, in words, when no picture could be made of it: ``an HTML page``, ``text``.

    Nothing of its content is quoted: it may be long, secret or binary.
    """
    if not data:
        return "an empty file"
    if named := picture_format(data):
        return f"a {named} file with a damaged header"
    for offset, begin, name in _OTHERS:
        if data[offset:].startswith(begin):
            return name
    return _text_kind(data[:_HEAD]) or "something else or a damaged header"


def _text_kind(head: bytes) -> str | None:
    try:
        text = head.decode("utf-8-sig", "strict" if len(head) < _HEAD else "ignore").lstrip().lower()
    except UnicodeDecodeError:
        return None
    if any(character < " " and character not in "\t\n\r\f" for character in text):
        return None
    if "<svg" in text:
        return "an SVG drawing"
    if text.startswith(("<!doctype html", "<html")) or "<html" in text:
        return "an HTML page"
    if text.startswith("<?xml"):
        return "an XML document"
    return "a JSON text" if text.startswith(("{", "[")) else "text"
