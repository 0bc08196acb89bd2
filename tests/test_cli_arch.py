"""`intarsia arch`: the catalog, a drawing, a folder, a slip."""

import subprocess
import sys

import pytest
from rich.console import Console

from intarsia import cli
from intarsia.arch import Architecture, Attention, FeedForward, catalog
from intarsia.commands import arch as command
from intarsia.formats import save
from intarsia.model import Decoder, initialise


def shown(capsys, *words):
    assert cli.main(["arch", *words]) == 0
    return capsys.readouterr().out


def test_alone_it_lists_the_catalog(capsys):
    lines = shown(capsys).splitlines()
    for name in catalog.names():
        assert sum(line.split()[:1] == [name] for line in lines) == 1
    line = next(line for line in lines if "nemotron-h-8b " in line)
    assert line.split() == ["nemotron-h-8b", "24", "24", "4", "8.101", "B", "16", "KiB", "97.41", "MiB"]


def test_a_drawing_says_what_the_facts_say(capsys):
    text = shown(capsys, "nemotron-h-56b", "--context", "66560")
    assert "M-M-M-M*-M-M-M-M-M*-M-M-M-M-M*-M-M-M-M-M*-M-M-M-M-M*-M-M-M-M-M*-" in text
    rows = [" ".join(line.split()) for line in text.splitlines()]
    assert "54 M Mamba-2 256x64, state 256, 8 groups 23.675 B 870.3 MiB" in rows
    assert "10 * attention 64q/8kv x 128 1.510 B 40 KiB" in rows
    assert "total 56.324 B 40 KiB 870.3 MiB" in rows
    assert "1 sequence of 66,560 tokens: cache 3.389 GiB, weights 104.9 GiB, together 108.3 GiB" in rows
    assert "The design rules of Nemotron-H are kept." in rows


def test_broken_rules_are_told_of_hybrids_only(capsys):
    assert "There are 45 Mamba-2 blocks and 48 FFNs" in shown(capsys, "nemotron-h-47b")
    assert "design rules" not in shown(capsys, "llama-3.1-8b", "--batch", "4")


def test_a_terminal_gets_colours_and_a_pipe_letters(capsys, monkeypatch):
    assert "\x1b" not in shown(capsys, "nemotron-h-8b")
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.delenv("NO_COLOR", raising=False)
    if not Console().is_terminal:
        pytest.skip("this rich does not let a test force colours")
    assert "\x1b[" in shown(capsys, "nemotron-h-8b")


def test_a_checkpoint_is_drawn_too(capsys, tmp_path):
    arch = Architecture.transformer(2, Attention(4, 2, 8), FeedForward(48), hidden_size=32, vocab_size=61)
    save(initialise(Decoder(arch)), tmp_path / "model")
    text = shown(capsys, str(tmp_path / "model"))
    assert "*-*-" in text and "2 * attention 4q/2kv x 8" in text and "no positions" not in text


def test_a_slip_is_a_sentence(capsys):
    assert cli.main(["arch", "nemotron-h-8"]) == 2
    err = capsys.readouterr().err
    assert err.startswith("intarsia: there is no model at 'nemotron-h-8'") and "Did you mean 'nemotron-h-" in err


def test_a_name_of_the_catalog_needs_no_torch():
    code = "import sys, intarsia.cli as c; c.main(['arch', 'nemotron-h-8b']); print(*sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert "intarsia.arch.catalog" in loaded
    assert not {"torch", "numpy", "transformers", "scipy"} & set(loaded)


@pytest.mark.parametrize(
    "number, text", [(0, ""), (512, "512 B"), (16 * 2**10, "16 KiB"), (int(1.5 * 2**20), "1.5 MiB"), (2**31, "2 GiB")]
)
def test_bytes_for_a_person(number, text):
    assert command.size(number) == text
