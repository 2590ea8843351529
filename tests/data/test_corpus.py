import pytest

from mm_cb.core.errors import UserError
from mm_cb.data.corpus import read_corpus


def test_lines_of_text_are_targets_without_a_prompt(tmp_path):
    path = tmp_path / "c.txt"
    path.write_bytes(b"\xef\xbb\xbf one target \r\n\r\n\n{not json\nthree\xe2\x80\xa8lines\n")
    rows = read_corpus(path)
    assert [(r.id, r.prompt, r.target) for r in rows] == [
        ("c.txt:1", "", "one target"),
        ("c.txt:4", "", "{not json"),
        ("c.txt:5", "", "three\u2028lines"),
    ]


def test_json_lines_may_hold_prompts(tmp_path):
    path = tmp_path / "c.jsonl"
    path.write_text('{"target": "a"}\n\n{"target": "b", "prompt": "p"}\n{"target": "c", "prompt": null}\n')
    assert [(r.id, r.prompt, r.target) for r in read_corpus(path)] == [
        ("c.jsonl:1", "", "a"),
        ("c.jsonl:3", "p", "b"),
        ("c.jsonl:4", "", "c"),
    ]


@pytest.mark.parametrize(
    ("name", "content", "match"),
    [
        ("c.txt", b"", "must hold a target a line, it holds none"),
        ("c.jsonl", b"\n \n", "must hold a target a line, it holds none"),
        ("c.txt", b"a\n\xff\n", r"c\.txt:2: the file must be UTF-8"),
        ("c.txt", b"a\nb\0c\n", r"c\.txt:2: .*NUL"),
        ("c.txt", "a\ncaf\ufffd\n".encode(), r"c\.txt:2: the target cannot be used: it holds U\+FFFD"),
        ("c.jsonl", '{"target": "caf\ufffd"}\n'.encode(), r"c\.jsonl:1: `target` cannot be used: it holds U\+FFFD"),
        ("c.jsonl", '{"target": "a", "prompt": "\ufffd"}\n'.encode(), r"jsonl:1: `prompt` cannot be used: it holds"),
        ("c.txt", b'a\n{"target": "b"}\n', r"c\.txt:2: .*name the file .jsonl"),
        ("c.jsonl", b'{"target": "a"}\nb\n', r"c\.jsonl:2: expected one JSON object"),
        ("c.jsonl", b'{"target": " "}\n', r"c\.jsonl:1: `target` must be a text that is not empty, got ' '"),
        ("c.jsonl", b'{"target": 3}\n', r"c\.jsonl:1: `target`"),
        ("c.jsonl", b'{"target": "a", "prompt": ["b"]}\n', r"c\.jsonl:1: `prompt` must be a text or null"),
        ("c.jsonl", b'{"target": "a", "promt": "b"}\n', r"c\.jsonl:1: unknown key `promt`, did you mean `prompt`"),
        ("c.jsonl", b'[{"target": "a"}]', r"c\.jsonl:1: .*JSON array"),
        ("c.json", b'{"target": "a"}', r"must be a \.txt file .* or a \.jsonl file"),
        ("c", b"a", r"must be a \.txt file"),
    ],
)
def test_what_is_no_corpus_is_refused_with_its_line(tmp_path, name, content, match):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=match):
        read_corpus(tmp_path / name)
    with pytest.raises(UserError, match="cannot read the corpus"):
        read_corpus(tmp_path / "nowhere.txt")
