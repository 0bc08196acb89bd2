"""The FP8 recipe: what is converted and what is left, and a training that stays near its bfloat16 self."""

import pytest
import torch

from intarsia.arch import catalog
from intarsia.base.files import read_json
from intarsia.base.runfolder import losses
from intarsia.formats import load
from intarsia.model import Decoder
from intarsia.train.fp8 import Fp8Projection, convert, told
from intarsia.train.loop import train
from tiny_training import read, shared_recipe, undisturbed


def converted(name, **options):
    model = Decoder(catalog.get(name), device="meta")
    return model, convert(model, **options)


def test_the_published_recipe_leaves_four_products_at_each_end():
    model, layers = converted("nemotron-h-8b")
    left = [layer.name for layer in layers if layer.why]
    assert left == [f"blocks.{n}.mixer.{leaf}" for n, leaf in (
        (0, "in_proj"), (0, "out_proj"), (1, "up"), (1, "down"), (50, "in_proj"), (50, "out_proj"), (51, "up"),
        (51, "down"))]  # fmt: skip
    assert len(layers) == 24 * 2 + 24 * 2 + 4 * 4
    inside = [name for name, module in model.named_modules() if isinstance(module, Fp8Projection)]
    assert set(inside) == {layer.name for layer in layers if not layer.why}
    assert all(".mixer." in name for name in inside)  # neither the head nor anything outside the blocks
    assert {name for name, _ in model.named_parameters()} == {
        name for name, _ in Decoder(catalog.get("nemotron-h-8b"), device="meta").named_parameters()
    }
    assert "104 of 112 linear layers" in told(layers)


def test_queries_keys_and_values_are_one_product():
    _, layers = converted("nemotron-t-nano", keep=1)
    left = [layer.name.removeprefix("blocks.") for layer in layers if layer.why]
    assert left == ["0.mixer.q", "0.mixer.k", "0.mixer.v", "23.mixer.down"]


def test_what_does_not_divide_is_left_and_told():
    _, layers = converted("nemotron-h-187m", keep=0)
    why = {layer.name: layer.why for layer in layers if layer.why}
    assert set(why.values()) == {"5,144 outputs are no multiple of 16"}  # 2 x 1536 + 2 x 8 x 128 + 24
    assert "left as they are (5,144 outputs are no multiple of 16): blocks.0.mixer.in_proj" in told(layers)
    _, shared = converted("nemotron-h-nano", keep=0, share=2)
    assert {layer.why for layer in shared if "in_proj" in layer.name} == {"648 outputs are no multiple of 16"}


def test_a_training_in_fp8_stays_near_and_resumes(tmp_path, capsys):
    train(read(shared_recipe(), "precision.fp8=true", "precision.fp8_keep=1"), tmp_path / "run")
    assert "linear layers" in capsys.readouterr().err
    names = [layer["name"] for layer in read_json(tmp_path / "run" / "fp8.json") if not layer["why"]]
    assert "blocks.3.mixer.q" in names and "blocks.0.mixer.in_proj" not in names
    rows, plain = losses(tmp_path / "run"), losses(undisturbed())
    assert [r["loss"] for r in rows] == pytest.approx([r["loss"] for r in plain], rel=0.02)
    assert [r["loss"] for r in rows] != [r["loss"] for r in plain]
    model, _ = load(tmp_path / "run" / "model")
    assert model.dtype == torch.float32  # weights stay what they are
