"""`generate`, `export` and `data` on a small random model with a real tokenizer."""

import json

import pytest
import torch

from byte_tokenizer import byte_tokenizer
from intarsia import cli
from intarsia.arch import Architecture, Attention, FeedForward
from intarsia.base.errors import IntarsiaError
from intarsia.base.files import read_json
from intarsia.commands.generate import Writer
from intarsia.formats import load, save
from intarsia.formats.chat import chat_text
from intarsia.model import Decoder, initialise

TEMPLATE = (
    "{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}{{ eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory):
    sizes = {"hidden_size": 32, "vocab_size": 257, "max_positions": 64, "tied_embeddings": True}
    arch = Architecture.transformer(2, Attention(4, 2, 8), FeedForward(48), **sizes)
    folder = tmp_path_factory.mktemp("models") / "tiny"
    save(initialise(Decoder(arch), std=0.3), folder, byte_tokenizer())
    return folder


def generated(capsys, *words: str) -> str:
    assert cli.main(["generate", *words]) == 0
    return capsys.readouterr().out


def test_the_text_is_the_models_own(model_folder, capsys):
    model, tokenizer = load(model_folder)
    ids = tokenizer.encode("The sea")
    expected = list(ids)
    for _ in range(12):  # greedy, without a cache
        expected.append(int(model(torch.tensor([expected]))[0, -1].argmax()))
        if expected[-1] == tokenizer.eos_id:
            break
    out = generated(capsys, str(model_folder), "--prompt", "The sea", "--max-new-tokens", "12")
    assert out == "The sea" + tokenizer.decode(expected[len(ids) :], skip_special_tokens=True) + "\n"


def test_sampling_follows_the_seed(model_folder, capsys):
    words = [str(model_folder), "--prompt", "a", "--temperature", "1.5", "--max-new-tokens", "24"]
    first, again, other = (generated(capsys, *words, "--seed", seed) for seed in ("1", "1", "2"))
    assert first == again != other
    assert generated(capsys, *words, "--top-k", "1") == generated(capsys, *words[:3], *words[5:])


def test_several_models_stand_side_by_side_and_an_export_is_the_same_model(model_folder, tmp_path, capsys):
    assert cli.main(["export", str(model_folder), str(tmp_path / "own"), "--to", "intarsia"]) == 0
    capsys.readouterr()
    out = generated(capsys, str(model_folder), str(tmp_path / "own"), "--prompt", "Once", "--max-new-tokens", "8")
    _, first, second = out.split("\n--- ")
    assert first.split("\n", 1)[1].strip("\n") == second.split("\n", 1)[1].strip("\n") != ""


def test_export_overwrites_nothing(model_folder, tmp_path, capsys):
    (tmp_path / "mine.txt").write_text("mine")
    assert cli.main(["export", str(model_folder), str(tmp_path)]) == 2
    assert "will not be overwritten" in capsys.readouterr().err


def test_a_request_beyond_the_context_prints_no_text(model_folder, capsys):
    assert cli.main(["generate", str(model_folder), "--prompt", "The sea", "--max-new-tokens", "60"]) == 2
    out, err = capsys.readouterr()
    assert out == "" and "context is 64" in err


def test_chat_needs_a_template_and_follows_it(model_folder, capsys):
    assert cli.main(["generate", str(model_folder), "--prompt", "Hi", "--chat"]) == 2
    assert "no chat template" in capsys.readouterr().err
    messages = [{"role": "user", "content": "Hi"}]
    assert chat_text(byte_tokenizer(chat_template=TEMPLATE), messages) == "<|user|>Hi<end><|assistant|>"
    for template in ("{{ raise_exception('only in pairs') }}", "{% if %}"):
        with pytest.raises(IntarsiaError, match="chat template"):
            chat_text(byte_tokenizer(chat_template=template), messages)


def test_a_character_over_several_tokens_waits_for_its_last(capsys):
    tokenizer = byte_tokenizer()
    writer, shown = Writer(tokenizer, "> "), []
    for token in [*tokenizer.encode("é🪵."), tokenizer.eos_id]:
        writer.add(token)
        shown.append(capsys.readouterr().out)
    writer.end()
    assert shown == ["> ", "é", "", "", "", "🪵", ".", ""] and capsys.readouterr().out == "\n"


def test_data_is_built_and_shown(model_folder, tmp_path, capsys):
    (tmp_path / "texts").mkdir()
    for name in "abcd":
        (tmp_path / "texts" / f"{name}.txt").write_text(f"A text about {name}. " * 20)
    command = ["data", "build", str(tmp_path / "texts"), "--tokenizer", str(model_folder), "--out", str(tmp_path / "c")]
    assert cli.main(command) == 0
    built = capsys.readouterr().out
    assert cli.main(["data", "show", str(tmp_path / "c")]) == 0
    shown = capsys.readouterr().out
    assert shown in built and "texts" in shown and "vocabulary of 257" in shown
    train, heldout = next(row for row in shown.splitlines() if " all " in row).replace(",", "").split()[1:]
    assert int(train) + int(heldout) == 4 * (len("A text about a. ") * 20 + 1)  # a token a byte, and the end of each


def test_a_model_is_measured_beside_its_parent(model_folder, tmp_path, capsys):
    (tmp_path / "texts").mkdir()
    for name in "abcdef":
        (tmp_path / "texts" / f"{name}.txt").write_text(f"A text about {name}. " * 20)
    corpus = str(tmp_path / "c")
    assert cli.main(["data", "build", str(tmp_path / "texts"), "--tokenizer", str(model_folder), "--out", corpus]) == 0
    capsys.readouterr()
    same = [str(model_folder), "--parent", str(model_folder), "--tasks", "", "--data", corpus]
    assert cli.main(["eval", *same, "--json", str(tmp_path / "result.json")]) == 0
    lines = {line.split("  ")[0].strip(): line for line in capsys.readouterr().out.splitlines()}
    result = read_json(tmp_path / "result.json")
    value = f"{result['bits_per_byte']['all']['value']:.3f}"
    assert lines["bits per byte, all"].count(value) == 2  # the model and its parent
    assert result["kl"]["value"] < 1e-5 and "0.000" in lines["kl"]
    assert cli.main(["eval", *same, "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == result
    assert cli.main(["eval", str(model_folder), "--tasks", "piqua"]) == 2
    assert "'piqua'" in capsys.readouterr().err
