"""Conversations and pairs of answers as documents: what counts in the loss, rows of them, and how they are joined."""

import itertools
import json
import math
import random

import numpy as np
import pytest

from intarsia import cli
from intarsia.base.errors import IntarsiaError
from intarsia.data import Corpus, build, load_blend, mix
from intarsia.data.conversations import FIELDS, read_messages, read_pair
from intarsia.data.extend import Extension, extended, opening, reference
from intarsia.data.packing import IGNORED
from intarsia.formats import Tokenizer
from intarsia.formats.chat import chat_pieces, chat_text, with_template
from intarsia.train.dialogues import Dialogues
from tiny_compression import make_tokenizer

MESSAGES = [
    {"role": "system", "content": "be short"}, {"role": "user", "content": "import what?"},
    {"role": "assistant", "content": "import ast"}, {"role": "user", "content": "and then?"},
    {"role": "assistant", "content": "return self"},
]  # fmt: skip


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return make_tokenizer("<|im_start|>", "<|im_end|>")


def rows_of(folder, name, rows):
    folder.mkdir(exist_ok=True)
    (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder / f"{name}.jsonl"


def test_the_loss_is_on_what_the_assistant_says(tokenizer):
    dialogues = Dialogues(tokenizer, "conversations")
    made = dialogues.encode_documents([json.dumps({"messages": MESSAGES})])[0]
    said = [t for t, counts in zip(made.tokens, made.mask) if counts]
    assert tokenizer.decode(said) == "import ast<|im_end|>return self<|im_end|>" and made.bytes == 41
    whole = chat_text(dialogues.tokenizer, MESSAGES, answer=False)
    assert tokenizer.decode(made.tokens) == whole and whole.endswith("return self<|im_end|>\n")
    # What stands before an answer is what a model reads when it is asked, token by token.
    asked = tokenizer.encode(chat_text(dialogues.tokenizer, MESSAGES[:2]))
    assert made.tokens[: len(asked)] == asked and not any(made.mask[: len(asked)]) and made.mask[len(asked)]
    assert dialogues.tokenizer.config["eos_token"] == "<|im_end|>" and dialogues.count(MESSAGES) == len(made.tokens)
    only_last = chat_pieces(dialogues.tokenizer, MESSAGES, first=3)
    assert [text for text, counts in only_last if counts] == ["return self<|im_end|>"]


def test_templates_that_cannot_be_used_are_sentences(tokenizer):
    with pytest.raises(IntarsiaError, match=r"no <\|im_start\|> and <\|im_end\|>"):
        with_template(make_tokenizer())
    last = "{% for m in messages %}{% if loop.last %}{{ m['role'] }}{% endif %}{{ m['content'] }}{% endfor %}"
    with pytest.raises(IntarsiaError, match="writes earlier turns anew"):
        chat_pieces(with_template(tokenizer, last), MESSAGES)
    with pytest.raises(IntarsiaError, match="no chat template /nowhere"):
        Dialogues(tokenizer, "conversations", "/nowhere")
    for row, why in (({"messages": "hi"}, "is no conversation"), ({"messages": MESSAGES[:2]}, "says nothing")):
        with pytest.raises(IntarsiaError, match=why):
            read_messages(json.dumps(row))
    with pytest.raises(IntarsiaError, match="'chosen' of the row"):
        read_pair(json.dumps({"prompt": "a"}))
    with pytest.raises(IntarsiaError, match="not two numbers"):
        read_pair(json.dumps({"prompt": "a", "chosen": "b", "rejected": "c", "rewards": [1]}))


def built(folder, tokenizer, kind, rows, length):
    build({"a": rows_of(folder, kind, rows)}, Dialogues(tokenizer, kind, length=length), folder / "corpus", heldout=0.1,
          field=FIELDS[kind], log=lambda line: None)  # fmt: skip
    return Corpus(folder / "corpus")


@pytest.mark.parametrize(("packing", "cross"), [("whole", False), ("split", False), ("split", True), ("whole", True)])
def test_rows_of_conversations_keep_only_targets_that_count(tokenizer, tmp_path, packing, cross):
    draw = random.Random(3)
    texts = ["import ast", "return self", "class A:", "def f(x): pass"]
    roles = ("user", "assistant") * 2
    rows = [{"messages": [{"role": role, "content": " ".join(draw.choices(texts, k=3))} for role in roles]}
            for _ in range(30)]  # fmt: skip
    corpus = built(tmp_path, tokenizer, "conversations", rows, 0)
    corpus.verify()
    data, mask = corpus.data("train", "a"), corpus.mask("train", "a")
    samples = mix(corpus, load_blend("all"), 1024, 128, packing=packing, cross=cross)
    plain = {int(s): (int(s), int(s + n)) for s, n in zip(data.starts, data.lengths)}
    seen = 0
    for number in range(len(samples.rows["a"])):
        row, at = samples.rows["a"][number], 0
        for piece in samples.rows["a"].pieces(number):
            start, stop = plain[int(data.edges[piece.document])]
            for place in range(start + piece.start, start + piece.stop):
                follows = place + 1 < stop and (not cross or place + 1 < start + piece.stop)
                if follows:
                    wanted = int(data.tokens[place + 1]) if mask[place + 1] else IGNORED
                    assert row.targets[at] == wanted
                    seen += wanted != IGNORED
                at += 1
    assert seen > 0.2 * len(data.tokens)
    masks = corpus.masks("heldout", "a", 2)
    assert [len(m) for m in masks] == [len(ids) for ids, _ in corpus.documents("heldout", "a", 2)]
    path = tmp_path / "corpus" / "a" / "train.mask"
    path.write_bytes(bytes(len(mask)))
    with pytest.raises(IntarsiaError, match=r"train\.mask is damaged"):
        corpus.verify()
    path.write_bytes(b"1")
    with pytest.raises(IntarsiaError, match=r"train\.mask has 1 bytes"):
        Corpus(tmp_path / "corpus").mask("train", "a")


def test_pairs_stand_side_by_side_with_their_rewards(tokenizer, tmp_path):
    rows = [{"prompt": f"import {n}", "chosen": f"yes {n}", "rejected": "no " * (n % 3 + 1), "rewards": [n, -1.0]}
            for n in range(30)]  # fmt: skip
    rows.append({"prompt": "long " * 200, "chosen": "a", "rejected": "b"})
    corpus = built(tmp_path, tokenizer, "preferences", rows, 128)
    samples = mix(corpus, load_blend("all"), 512, 128, packing="whole")
    found = []
    for number in range(len(samples.rows["a"])):
        row = samples.rows["a"][number]
        count = row.segments.max() // 2 * 2 if row.segments.max() % 2 == 0 else row.segments.max() + 1
        for segment in range(0, count, 2):
            texts, gaps = [], set()
            for each in (segment, segment + 1):
                own = row.segments == each
                texts.append(tokenizer.decode(row.targets[own & (row.targets != IGNORED)].tolist()))
                gaps |= set(row.gaps[own].tolist())
                assert row.positions[own].tolist() == list(range(own.sum()))
            assert len(gaps) == 1
            found.append((*texts, gaps.pop()))
    wanted = {(f"yes {n}<|im_end|>", "no " * (n % 3 + 1) + "<|im_end|>", n + 1.0) for n in range(30)}
    held = corpus.manifest["categories"]["a"]["heldout"]["documents"]
    assert set(found) <= wanted and len(found) == len(set(found)) >= 30 - held
    empty = (np.concatenate([corpus.data(s, "a").lengths for s in ("train", "heldout")]) == 0).sum()
    assert empty == 1  # the long one
    with pytest.raises(IntarsiaError, match="read whole and apart"):
        mix(corpus, load_blend("all"), 512, 128)
    with pytest.raises(IntarsiaError, match="longer than a sample"):
        mix(corpus, load_blend("all"), 512, 16, packing="whole")


def test_the_command_builds_them(tokenizer, tmp_path, capsys):
    tokenizer.save(tmp_path / "tokenizer")
    file = rows_of(tmp_path / "in", "talk", [{"messages": MESSAGES[:3]}, {"messages": MESSAGES[1:]}])
    words = ["data", "build", f"talk={file}", "--out", str(tmp_path / "out"), "--tokenizer"]
    words.append(str(tmp_path / "tokenizer"))
    assert cli.main([*words, "--kind", "conversations"]) == 0
    corpus = Corpus(tmp_path / "out")
    assert corpus.mask("train", "talk").any() and corpus.pairs("train", "talk") is None
    assert Tokenizer.from_folder(tmp_path / "out" / "tokenizer").chat_template
    assert cli.main([*words, "--kind", "preferences"]) == 2
    assert "talk.jsonl, line 1, has no text in a field 'prompt'" in capsys.readouterr().err


TOPICS = ("harbour vessel anchor", "violin sonata orchestra", "glacier moraine icefall")


def conversations():
    made = []
    for number in range(60):
        words = TOPICS[number % 3].split()
        question = f"Number {number}: about the {words[number % 2]} and the {words[2]}?"
        answer = f"It is {words[0]} {number}."
        made.append([{"role": "user", "content": question}, {"role": "assistant", "content": answer}])
    return made


def asked(sample):
    """The questions of the conversations themselves."""
    return [m["content"] for m in sample if m["role"] == "user" and m["content"].startswith("Number ")]


def words(messages):
    return sum(len(message["content"].split()) + 2 for message in messages)


def test_joined_conversations_fit_belong_together_and_are_there_once():
    settings = Extension(200, share=0.8, turns=0.7)
    made = list(extended(conversations(), words, settings))
    assert made == list(extended(conversations(), words, settings))
    assert made != list(extended(conversations(), words, Extension(200, share=0.8, turns=0.7, seed=1)))
    long = [sample for sample in made if len(sample) > 2]
    assert all(words(sample) <= 200 for sample in made) and len(long) > 3
    questions = [question for sample in made for question in asked(sample)]
    originals = [c[0]["content"] for c in conversations()]
    assert sorted(questions) == sorted(originals)
    assert 0.1 < sum(len(sample) == 2 for sample in made) / 60 < 0.35  # the share that stays alone
    neighbours = [pair for sample in long for pair in itertools.pairwise(asked(sample))]
    alike = [any(w in a and w in b for topic in TOPICS for w in topic.split()) for a, b in neighbours]
    assert sum(alike) > 0.85 * len(alike)


def test_questions_about_earlier_turns_are_answered_by_them():
    found = 0
    for sample in extended(conversations(), words, Extension(300, share=1.0, turns=1.0)):
        for place in range(0, len(sample), 2):
            question, answer = sample[place]["content"], sample[place + 1]["content"]
            exchanges = [(sample[p]["content"], sample[p + 1]["content"]) for p in range(0, place, 2)]
            if question.startswith("What was question number "):
                number = int(question.split("number ")[1].split()[0])
                assert exchanges[number - 1][0].startswith(answer)
                found += 1
            elif question.startswith("Earlier I wrote: "):
                quoted = question.split('"')[1]
                assert any(q.startswith(quoted) and a.startswith(answer) for q, a in exchanges)
                found += 1
    assert found > 20
    assert reference(MESSAGES[:2], random.Random(0)) == []
    assert opening("a  b\nc") == "a  b\nc" and opening("w " * 40) == ("w " * 24).strip()


def test_a_system_prompt_stands_once_and_only_its_own_are_joined():
    given = [[{"role": "system", "content": f"s{n % 2}"}, *each] for n, each in enumerate(conversations())]
    for sample in extended(given, words, Extension(200, share=1.0)):
        assert [m["role"] for m in sample].count("system") == 1 and sample[0]["role"] == "system"
        numbers = [int(question.split()[1][:-1]) for question in asked(sample)]
        assert {n % 2 for n in numbers} == {int(sample[0]["content"][1])}
    assert math.isnan(read_pair('{"prompt": "a", "chosen": "b", "rejected": "c"}').rewards[0])
