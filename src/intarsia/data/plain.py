"""Plain text out of what packages of documentation hold: pages, manuals, dictionaries, proofs, a dump of articles."""

from __future__ import annotations

import bz2
import gzip
import html
import re
import xml.etree.ElementTree as ET
from collections.abc import Callable, Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import BinaryIO

HIDDEN = frozenset(("script", "style", "head", "nav", "header", "footer", "aside", "button", "form", "svg"))
BREAKS = frozenset(("p", "div", "br", "li", "tr", "h1", "h2", "h3", "h4", "h5", "h6", "pre", "dt", "dd", "table", "ul",
                    "ol", "section", "blockquote"))  # fmt: skip
ENTRIES = 4000  # characters of a dictionary in one document, of whole entries
SIGNS = {"aq": "'", "dq": '"', "em": "-", "en": "-", "bu": "*", "co": "(c)", "lq": '"', "rq": '"', "ti": "~", "ha": "^"}
DIGITS = {c: n for n, c in enumerate("ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/")}


def texts(path: Path) -> Iterator[str]:
    """The documents of a file by its name, any of them packed as `.gz`; what is no UTF-8 is left out."""
    name = path.name.removesuffix(".gz")
    suffix = "." + name.rpartition(".")[2]
    if suffix == ".dz":
        yield from dictionary(path)
    else:
        data = path.read_bytes()
        try:
            text = (gzip.decompress(data) if path.suffix == ".gz" else data).decode()
        except UnicodeDecodeError:
            return
        yield from (READERS.get(suffix) or (manual if re.fullmatch(r"\.[1-8]\w*", suffix) else _itself))(text)


def _itself(text: str) -> Iterator[str]:
    yield text


def page(text: str) -> Iterator[str]:
    """What a reader of an HTML page sees of its content."""
    reader = _Page()
    reader.feed(text)
    reader.close()
    yield _tidy("".join(reader.parts))


class _Page(HTMLParser):
    def __init__(self):
        super().__init__(convert_charrefs=True)
        self.parts: list[str] = []
        self.hidden: list[str] = []
        self.literal = 0

    def handle_starttag(self, tag, attributes):
        if tag in HIDDEN:
            self.hidden.append(tag)
        self.literal += tag == "pre"
        if tag in BREAKS:
            self.parts.append("\n")

    def handle_endtag(self, tag):
        if tag in self.hidden:
            while self.hidden.pop() != tag:  # a tag that was never closed ends with the one around it
                pass
        self.literal = max(0, self.literal - (tag == "pre"))
        if tag in BREAKS:
            self.parts.append("\n")

    def handle_data(self, data):
        if not self.hidden:
            new_line = not self.parts or self.parts[-1].endswith("\n")
            words = data if self.literal else re.sub(r"\s+", " ", data)
            self.parts.append(words.lstrip(" ") if new_line and not self.literal else words)


def manual(text: str) -> Iterator[str]:
    """A manual page in roff: its words under its headings, without fonts, comments and layout."""
    lines, skipping = [], False
    for line in text.splitlines():
        if skipping or line.startswith((".de", ".ig")):
            skipping = not line.startswith("..")
            continue
        found = re.match(r"['.]\s*(\w*|\\\")\s*(.*)", line)
        if found and line[0] in ".'":
            name, rest = found[1], found[2].replace('"', "")
            if name in ("SH", "SS", "Sh", "Ss"):
                lines += ["", rest]
            elif name in ("PP", "P", "LP", "TP", "IP", "sp", "Pp", "It", "nf", "fi"):
                lines += ["", rest] if name in ("IP", "It") else [""]
            elif name in ("B", "I", "BR", "IR", "RB", "RI", "BI", "IB", "SM", "SB", "TH", "Dt", "Nd", "Nm", "Fl", "Ar"):
                lines.append(rest.replace(" ", "") if name in ("BR", "IR", "RB", "RI", "BI", "IB") else rest)
        else:
            lines.append(line)
    text = re.sub(r"\\f(\[\w*\]|\(..|.)|\\s[-+]?\d|\\[&/,|^]|\\\".*", "", "\n".join(lines))
    text = re.sub(r"\\(?:\(|\[)(\w\w)\]?", lambda found: SIGNS.get(found[1], ""), text)
    yield _tidy(text.replace("\\-", "-").replace("\\e", "\\").replace("\\ ", " "))


def dictionary(path: Path) -> Iterator[str]:
    """A dictionary of dictd: its entries in order, as many together as fill a document."""
    data = gzip.decompress(path.read_bytes())
    index = path.with_name(path.name.removesuffix(".dict.dz") + ".index").read_text(encoding="utf-8", errors="replace")
    rows = {tuple(map(_number, fields[1:3])) for line in index.splitlines()
            if len(fields := line.split("\t")) >= 3 and not line.startswith("00-")}  # fmt: skip
    parts, held = [], 0
    for start, size in sorted(rows):
        entry = data[start : start + size].decode(errors="replace").strip()
        if parts and held + len(entry) > ENTRIES:
            yield "\n\n".join(parts)
            parts, held = [], 0
        parts.append(entry)
        held += len(entry)
    if parts:
        yield "\n\n".join(parts)


def _number(digits: str) -> int:
    value = 0
    for digit in digits:
        value = value * 64 + DIGITS[digit]
    return value


def proofs(text: str) -> Iterator[str]:
    """What a Metamath database says of its theorems: comments and the statements behind them, not the proofs."""
    for found in re.finditer(r"\$\((.*?)\$\)\s*([\w.-]+ \$[ap] .*?)(?:\$=|\$\.)", text, re.DOTALL):
        comment = _tidy(found[1])
        if len(comment) > 100:
            yield f"{comment}\n{' '.join(found[2].split())}"


def encyclopedia(dump: BinaryIO) -> Iterator[str]:
    """The articles of a MediaWiki dump, packed as bz2, as plain text; redirections are none."""
    with bz2.open(dump) as handle:
        for _, element in ET.iterparse(handle):
            if element.tag.rpartition("}")[2] == "page":
                title, body = (element.find(f".//{{*}}{name}") for name in ("title", "text"))
                if body is not None and body.text and not body.text.lstrip().lower().startswith("#redirect"):
                    yield f"{title.text}\n\n{_unmarked(body.text)}"
                element.clear()


def _unmarked(text: str) -> str:
    """Wikitext without templates, tables, references and the brackets of links."""
    text = re.sub(r"<!--.*?-->|<ref[^>]*/>|<ref.*?</ref>", "", text, flags=re.DOTALL)
    for _ in range(8):  # from the inside outwards
        text, count = re.subn(r"\{\{[^{}]*\}\}|\{\|[^{}]*\|\}|\[\[(?:File|Image|Category):[^\[\]]*\]\]", "", text)
        text, more = re.subn(r"\[\[(?:[^\[\]|]*\|)?([^\[\]|]*)\]\]", r"\1", text)
        if not count + more:
            break
    text = re.sub(r"\[https?://\S+ ?([^\]]*)\]", r"\1", re.sub(r"'{2,}", "", text))
    return _tidy(html.unescape(re.sub(r"<[^<>]+>", "", text)))


def _tidy(text: str) -> str:
    """At most one empty line, no blanks at the ends of lines."""
    return re.sub(r"\n{3,}", "\n\n", "\n".join(line.rstrip() for line in text.splitlines())).strip()


READERS: dict[str, Callable[[str], Iterator[str]]] = {".html": page, ".htm": page, ".mm": proofs}
