"""One command from a checkpoint to a child, its controls and a report; and the same command again."""

import json
import math
import re
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import intarsia
from intarsia.arch import parameters
from intarsia.base.files import read_json, read_jsonl
from intarsia.compress.assemble import with_blocks
from intarsia.formats import export, open_checkpoint, save
from intarsia.model import Decoder, initialise
from tiny_compression import ARCH, compress, make_parent, make_recipe, make_text

STAGES = [
    "data", "load", "cost", "importance", "library", "score", "search", "tournament", "distil", "speed", "evaluate",
    "controls",
]  # fmt: skip
FIGURES = ("speedup_measured", "speedup_predicted", "kl", "kl_se", "kl_before_distillation", "top1", "parameters")


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A run with controls, made by the command line in a process of its own."""
    folder = tmp_path_factory.mktemp("pipeline")
    parent, data = make_parent(folder / "parent"), make_text(folder / "text")
    recipe = make_recipe(folder / "tiny.toml", data)
    words = (parent, "--recipe", recipe, "--controls", "--out", folder / "run")
    began = time.monotonic()
    status, out, err = compress(*words)
    assert status == 0, err
    return SimpleNamespace(parent=parent, run=folder / "run", words=words, out=out, took=time.monotonic() - began)


@pytest.fixture(scope="module")
def summary(finished):
    # Strict JSON: neither NaN nor infinity.
    return json.loads((finished.run / "summary.json").read_text(), parse_constant=pytest.fail)


def test_the_summary_has_every_figure(summary, finished):
    for figures in (summary, *summary["controls"].values()):
        assert all(math.isfinite(figures[name]) for name in FIGURES)
        assert figures["kl"] > 0 and figures["kl_before_distillation"] > 0 and 0 <= figures["top1"] <= 1
    assert {"depth", "greedy", "random"} <= set(summary["controls"])
    for who in ("parent", "child"):
        assert set(summary["bits_per_byte"][who]) == {"command", "language", "all"}
        assert summary["bits_per_byte"][who]["all"]["value"] > 1
    assert all(set(c["bits_per_byte"]) == {"command", "language", "all"} for c in summary["controls"].values())
    assert summary["tasks"] == {} and all(c["tasks"] == {} for c in summary["controls"].values())
    assert list(summary["seconds"]) == STAGES and all(s >= 0 for s in summary["seconds"].values())
    assert sum(summary["seconds"].values()) < finished.took
    assert 5e7 < summary["peak_rss_bytes"] < 8e9
    assert summary["parameters"] < parameters(ARCH) == summary["parent"]["parameters"]
    assert f"{summary['speedup_measured']:.2f} x" in finished.out


def test_the_run_folder_says_what_was_done(finished, summary):
    assert {"recipe.toml", "run.json", "environment.json", "report.html"} <= {p.name for p in finished.run.iterdir()}
    rows = read_jsonl(finished.run / "metrics.jsonl")
    curve = [row for row in rows if row["stage"] == "distill-child"]
    assert [row["step"] for row in curve] == [0, 4, 8] == [row["step"] for row in summary["distillation"]]
    assert [row["kl"] for row in curve] == [row["kl"] for row in summary["distillation"]]
    scores = read_jsonl(finished.run / "stages" / "score" / "scores.0.jsonl")
    assert len(scores) == len({(r["layer"], r["attention"], r["ffn"]) for r in scores}) > 4
    assert not list(finished.run.rglob("*.tmp")) and not list(finished.run.rglob("state.*"))


def test_the_finalist_that_learns_best_is_the_child(finished, summary):
    held = summary["tournament"]
    rows = {row["name"]: row for row in held["finalists"]}
    assert len(rows) == 3 and held["by"] == "kl" and held["tokens"] == 1024
    assert held["chosen"] == min(rows, key=lambda name: rows[name]["after"]["kl"])
    assert all(row["after"]["kl"] > 0 and row["after"]["kl"] != row["before"]["kl"] for row in rows.values())
    for shown in (finished.out, (finished.run / "report.html").read_text()):
        assert f"{held['chosen']} (chosen)" in shown and all(name in shown for name in rows)
    assert not list((finished.run / "stages" / "tournament").glob("finalist_*"))


def test_the_child_is_a_checkpoint_for_transformers_and_for_us(finished, summary):
    import transformers

    import intarsia.hf

    folder = finished.run / "child"
    model, tokenizer = intarsia.load(folder)
    assert parameters(model.arch) == summary["parameters"]
    ids = torch.tensor([tokenizer.encode("def parse(text: str) -> dict:\n    return")])
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder).eval()
    with torch.no_grad():
        assert (theirs(ids).logits - model(ids)).abs().max() < 1e-4
    new = theirs.generate(ids, max_new_tokens=5, min_new_tokens=5, do_sample=False)
    assert new[0, ids.shape[1] :].tolist() == intarsia.generate(model, ids[0].tolist(), 5)
    assert transformers.AutoTokenizer.from_pretrained(folder)("return x")["input_ids"] == tokenizer.encode("return x")


def test_a_uniform_child_needs_nothing_of_ours(finished, summary):
    import transformers

    if "uniform" not in summary["controls"]:
        pytest.skip("on this machine no width alone was fast enough")
    folder = finished.run / "controls" / "uniform"
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder).eval()
    assert type(theirs).__name__ == "LlamaForCausalLM"
    ids = torch.arange(12)[None]
    with torch.no_grad():
        assert (theirs(ids).logits - intarsia.load(folder)[0](ids)).abs().max() < 1e-4
    assert theirs.config.intermediate_size < 192 and str(theirs.config.intermediate_size) in str(
        summary["controls"]["uniform"]["description"]
    )


def test_a_model_made_elsewhere_learns_beside_the_child(finished, summary, tmp_path):
    """A control that is a checkpoint: it begins as it is and is mended, and what it learns from is what the child
    does."""
    guest, out = finished.run / "child", tmp_path / "run"
    parent, tokenizer = intarsia.load(finished.words[0])
    short = save(with_blocks(parent, [b for n, b in enumerate(parent.blocks) if n != 4]), tmp_path / "short", tokenizer)
    guests = json.dumps([str(guest), str(short)])
    status, said, err = compress(
        *finished.words[:-1], out, "--set", "controls.kinds=[]", "--set", f"controls.models={guests}"
    )
    assert status == 0, err
    found = json.loads((out / "summary.json").read_text(), parse_constant=pytest.fail)["controls"]
    name = "-".join(guest.absolute().parts[1:])  # for "child" is taken
    assert list(found) == [name, "short"] and found[name]["description"] == f"made elsewhere: {guest}"
    curve = summary["distillation"]
    kept = curve[0] if curve[-1].get("undone") else curve[-1]  # what was saved: a training that did harm is undone
    assert found[name]["kl_assembled"] == kept["kl"] and found[name]["kl"] > 0
    assert found[name]["kl_before_distillation"] <= found[name]["kl_assembled"]
    assert found["short"]["kl_before_distillation"] < 0.98 * found["short"]["kl_assembled"]
    assert found[name]["speedup_predicted"] is None and found[name]["speedup_measured"] > 0
    assert name in said and name in (out / "report.html").read_text()


def test_a_model_of_another_vocabulary_is_no_control(finished, tmp_path):
    other = initialise(Decoder(ARCH.replace(vocab_size=ARCH.vocab_size + 16)))
    save(other, tmp_path / "other")
    more = ("--set", f"controls.models=[{json.dumps(str(tmp_path / 'other'))}]")
    status, _, err = compress(*finished.words[:-1], tmp_path / "run", *more)
    assert status != 0 and "other has another vocabulary than the parent" in err


def test_the_child_goes_to_nemotron_nas_and_back(finished, tmp_path):
    export(finished.run / "child", tmp_path / "nas", to="nemotron-nas")
    assert read_json(tmp_path / "nas" / "config.json")["model_type"] == "nemotron-nas"
    ids = torch.arange(20)[None]
    ours, back = (intarsia.load(path)[0] for path in (finished.run / "child", tmp_path / "nas"))
    with torch.no_grad():
        assert (ours(ids) - back(ids)).abs().max() < 1e-4


def test_the_report_is_one_small_page_that_asks_nobody(finished):
    page = (finished.run / "report.html").read_text()
    assert 10_000 < len(page.encode()) < 1_000_000
    assert not re.search(r"""(src|href|action)\s*=\s*["']?\s*(https?:)?//|url\(\s*["']?http|@import""", page)


def contents(run: Path) -> dict[str, tuple[int, int]]:
    """When every file of a run's stages and models was last written, and its inode."""
    files = [p for name in ("stages", "child", "controls") for p in (run / name).rglob("*") if p.is_file()]
    return {str(p.relative_to(run)): (p.stat().st_mtime_ns, p.stat().st_ino) for p in files if p.parent.name != "load"}


def test_the_same_command_again_does_nothing_again(finished, summary):
    before, metrics = contents(finished.run), (finished.run / "metrics.jsonl").read_bytes()
    began = time.monotonic()
    status, out, err = compress(*finished.words)
    assert status == 0, err
    assert time.monotonic() - began < max(10, finished.took / 2)
    assert contents(finished.run) == before and (finished.run / "metrics.jsonl").read_bytes() == metrics
    again = read_json(finished.run / "summary.json")
    moving = ("finished", "seconds")  # loading was timed anew
    assert {k: v for k, v in again.items() if k not in moving} == {
        k: v for k, v in summary.items() if k not in moving
    }
    assert "cost: already done" in out


def test_changed_settings_redo_what_depends_on_them(finished, tmp_path):
    """The moments are gone once the library is made; another library has to collect them again."""
    import shutil

    run = tmp_path / "run"
    shutil.copytree(finished.run, run)
    before = contents(run)
    status, _, err = compress(
        finished.parent, "--recipe", run / "recipe.toml", "--out", run, "--set", "library.tokens=512"
    )
    assert status == 0, err
    after = contents(run)
    kept = {name.split("/")[1] for name in before if name.startswith("stages/") and after.get(name) == before[name]}
    assert {"data", "cost"} <= kept and not {"library", "score", "distill-child"} & kept
    assert not list((run / "stages" / "importance").glob("*.safetensors"))


def test_a_child_can_be_compressed_again(finished, tmp_path):
    """Linear blocks, absent ones, widths that differ: a child is a parent like any other."""
    child = finished.run / "child"
    half = parameters(open_checkpoint(child).architecture) // 2
    recipe = make_recipe(tmp_path / "again.toml", finished.run.parent / "text", f"params = {half + 20_000}")
    status, _, err = compress(child, "--recipe", recipe, "--controls", "--out", tmp_path / "run")
    assert status == 0, err
    assert read_json(tmp_path / "run" / "summary.json")["parameters"] <= half + 20_000


def test_another_teacher_than_the_parent(finished, tmp_path):
    """The child of a child learns from the grandparent."""
    recipe, curves, prints = make_recipe(tmp_path / "tiny.toml", make_text(tmp_path / "text")), {}, []
    teacher = f"distill.teacher_model={json.dumps(str(finished.parent))}"
    for name, words in (("parent", ()), ("grandparent", ("--set", teacher))):
        settings = ("distill.tokens=8192", "distill.lr=3e-4", "tournament.finalists=1")
        out, more = tmp_path / name, (word for setting in settings for word in ("--set", setting))
        # Far from its teacher and in small steps: the clock chose `finished`, and of whatever it chose this one learns.
        words = ("--recipe", recipe, "--params", "60%", "--out", out, *more, *words)
        status, _, err = compress(finished.run, *words)
        assert status == 0, err
        curves[name] = [r["kl"] for r in read_jsonl(out / "metrics.jsonl") if r.get("stage") == "distill-child"]
        prints.append(read_json(out / "stages" / "distill-child" / "done.json")["fingerprint"])
    assert prints[0] != prints[1] and curves["parent"][0] != curves["grandparent"][0]
    assert curves["grandparent"][-1] < curves["grandparent"][0]
    strange = ("--set", 'distill.teacher_model="nowhere"')
    status, _, err = compress(finished.run, "--recipe", recipe, "--out", tmp_path / "x", *strange)
    assert status != 0 and "there is no model at 'nowhere'" in err
