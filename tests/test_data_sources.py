import gzip
import importlib.util
import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from intarsia.base.errors import IntarsiaError
from intarsia.data.sources import documents, parts, sources


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
        ("a.jsonl.gz", gzip.compress(b'{"text": "x"}\n' * 500, mtime=0)[:-20], "damaged or cut short"),
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


def test_a_mapping_names_the_categories(tmp_path):
    (tmp_path / "web").mkdir()
    for name in ("part-0.jsonl", "part-1.jsonl"):
        (tmp_path / "web" / name).write_text(json.dumps({"text": name}) + "\n")
    found = sources({"crawl": tmp_path / "web"})
    assert [(s.category, t) for s in found for t in documents(s)] == [
        ("crawl", "part-0.jsonl"), ("crawl", "part-1.jsonl"),
    ]


@given(st.lists(st.text(alphabet="aé\u2028 ", max_size=9), min_size=1, max_size=30), st.integers(1, 200), st.booleans())
@settings(max_examples=60, deadline=None)
def test_every_line_belongs_to_one_part(tmp_path_factory, texts, size, ends):
    path = tmp_path_factory.mktemp("parts") / "a.jsonl"
    lines = "\n".join(json.dumps({"text": f"{i} {t}"}, ensure_ascii=False) for i, t in enumerate(texts))
    path.write_text(lines + "\n" * ends, encoding="utf-8")
    (source,) = sources(path)
    cut = parts(source, size)
    assert sum(part.bytes for part in cut) == path.stat().st_size
    assert [t for part in cut for t in documents(part)] == [f"{i} {t}" for i, t in enumerate(texts)]


def test_a_fault_in_a_part_is_named_by_its_byte(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "x"}\n' * 9 + "oops\n")
    with pytest.raises(IntarsiaError, match="line at byte 126, is not JSON"):
        [list(documents(part)) for part in parts(sources(path)[0], 50)]


@pytest.mark.parametrize(("name", "package"), [("a.jsonl.zst", "zstandard"), ("a.parquet", "pyarrow")])
def test_a_missing_package_is_named(tmp_path, name, package):
    if importlib.util.find_spec(package):
        pytest.skip(f"{package} is here")
    (tmp_path / name).write_bytes(b"anything")
    with pytest.raises(IntarsiaError, match=rf"needs the package {package}.*intarsia\[data\]"):
        read(tmp_path / name)


def test_zst(tmp_path):
    zstandard = pytest.importorskip("zstandard")
    rows = "".join(json.dumps({"text": f"row {i} " + "x" * (i % 50)}) + "\n" for i in range(5000)).encode()
    pack = zstandard.ZstdCompressor().compress
    whole = pack(rows[:1000]) + pack(rows[1000:])  # frames end anywhere, also within a line
    (tmp_path / "web.jsonl.zst").write_bytes(whole)
    assert [t.split()[1] for _, t in read(tmp_path / "web.jsonl.zst")] == [str(i) for i in range(5000)]
    for broken in (whole[:-9], b"not zstd", b""):
        (tmp_path / "web.jsonl.zst").write_bytes(broken)
        with pytest.raises(IntarsiaError, match=r"web\.jsonl\.zst is damaged or cut short"):
            read(tmp_path / "web.jsonl.zst")


def test_parquet(tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    path = tmp_path / "web.parquet"
    texts = [f"row {i}" for i in range(100)]
    parquet.write_table(pyarrow.table({"text": [*texts, None, " "], "id": range(102)}), path, row_group_size=7)
    assert read(path) == [("web", t) for t in texts]
    cut = parts(sources(path)[0], path.stat().st_size // 4)
    assert len(cut) > 2 and [t for part in cut for t in documents(part)] == texts
    with pytest.raises(IntarsiaError, match="no column 'body': it has text, id"):
        read(path, field="body")
    with pytest.raises(IntarsiaError, match="holds a int in 'id'"):
        read(path, field="id")
    path.write_bytes(path.read_bytes()[:-30])
    with pytest.raises(IntarsiaError, match="damaged or no parquet"):
        read(path)
