import gzip
import json

import pytest

from intarsia.base.errors import IntarsiaError
from intarsia.data.sources import documents, sources


def read(*inputs, field="text"):
    return [(s.category, text) for s in sources(inputs) for text in documents(s, field)]


def test_files_and_folders_give_documents_with_categories(tmp_path):
    folder = tmp_path / "notes"
    (folder / "deep").mkdir(parents=True)
    (folder / "a.txt").write_text("first")
    (folder / "deep" / "b.md").write_text("\ufeffsecond, déjà", encoding="utf-8")
    (folder / "c.png").write_bytes(b"\x89PNG\0")
    (folder / ".git").mkdir()
    (folder / ".git" / "hidden.txt").write_text("not this")
    rows = "".join(json.dumps({"text": f"row {i}"}) + "\n" for i in range(2))
    (folder / "web.jsonl").write_text(rows + "\n")
    (tmp_path / "wiki.jsonl.gz").write_bytes(gzip.compress(b'{"body": "packed", "text": 3}'))
    assert read(folder) == [
        ("notes", "first"), ("notes", "second, déjà"), ("web", "row 0"), ("web", "row 1"),
    ]
    assert read(tmp_path / "wiki.jsonl.gz", field="body") == [("wiki", "packed")]
    assert read(folder / "a.txt", folder / "a.txt") == [("notes", "first")]


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("a.txt", b"", "is empty"),
        ("a.jsonl", b"\n\n", "is empty"),
        ("a.txt", b"ab\0cd", "binary"),
        ("a.md", b"caf\xe9 au lait", "not UTF-8 text (byte 3 is 0xe9)"),
        ("a.jsonl", b'{"text": "x"}\n{"text": \n', "line 2, is not JSON"),
        ("a.jsonl", b'{"text": "x"}\n{"body": "y"}\n', "line 2, has no text in a field 'text': it has body"),
        ("a.jsonl", b'[1]\n', "line 1, has no text in a field 'text': it is a list"),
        ("a.jsonl", b'{"text": "a\\u0000b"}\n', "line 1, is binary"),
        ("a.jsonl", b'{"text": "\\ud800"}\n', "half a surrogate"),
        ("a.jsonl.gz", gzip.compress(b'{"text": "x"}\n' * 500)[:-20], "damaged or cut short"),
        ("a.jsonl.gz", b"not gzip", "damaged or cut short"),
        ("a.pdf", b"%PDF", "no text that can be read: files that can be end in .txt"),
    ],
)
def test_bad_files_are_named_in_a_sentence(tmp_path, name, content, words):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(IntarsiaError) as error:
        read(tmp_path / name)
    assert words in str(error.value) and str(tmp_path / name) in str(error.value)


def test_missing_and_empty_inputs(tmp_path):
    with pytest.raises(IntarsiaError, match="there is no file or folder"):
        sources(tmp_path / "nowhere")
    with pytest.raises(IntarsiaError, match="holds no text"):
        sources([tmp_path])
    with pytest.raises(IntarsiaError, match="no input"):
        sources([])
