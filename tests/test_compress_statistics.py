"""The calibration pass against sums in float64 over activations that hooks have seen."""

import copy
import dataclasses

import pytest
import torch

from compress_toys import ALL, PLAIN, relative, tokens, toy
from intarsia.arch import Attention, Linear
from intarsia.compress.statistics import collect
from intarsia.model import Decoder, ResidualBlock


def activations(model: Decoder, ids: torch.Tensor) -> dict[int, dict[str, torch.Tensor]]:
    """What goes into and out of the matrices of every block, (N, .) float64, by forward hooks."""
    seen: dict[int, dict[str, torch.Tensor]] = {}

    def watch(index, name, layer, before):
        def hook(_, given, result):
            value = given[0] if before else result
            if not before and name == "outputs" and layer.bias is not None:
                value = value - layer.bias
            seen.setdefault(index, {})[name] = value.detach().flatten(0, -2).double()

        return layer.register_forward_hook(hook)

    handles = []
    for i, block in enumerate(model.blocks):
        attention = isinstance(block.spec, Attention)
        first, last = (block.mixer.q, block.mixer.o) if attention else (block.mixer.up, block.mixer.down)
        wanted = [("inputs", first, True), ("inner", last, True), ("outputs", last, False)]
        wanted += [("keys", block.mixer.k, False), ("values", block.mixer.v, False)] if attention else []
        handles += [watch(i, *what) for what in wanted]
    with torch.no_grad():
        model(ids)
    for handle in handles:
        handle.remove()
    return seen


def check(found, seen, tolerance):
    assert found.keys() == seen.keys()
    for index, s in found.items():
        a = seen[index]
        assert s.tokens == len(a["inputs"])
        assert relative(s.inputs, a["inputs"].T @ a["inputs"]) < tolerance
        assert relative(s.cross, a["inputs"].T @ a["outputs"]) < tolerance
        assert relative(s.channels, a["inner"].T @ a["inner"]) < tolerance
        assert abs(s.power / float(a["outputs"].square().sum()) - 1) < tolerance
        for name in ("keys", "values"):
            assert (getattr(s, name) is None) == (name not in a)
            if name in a:
                assert relative(getattr(s, name), a[name].T @ a[name]) < tolerance


@pytest.mark.parametrize("arch", ALL.values(), ids=ALL)
def test_moments_equal_sums_in_float64(arch):
    model, ids = toy(arch), tokens()
    check(collect(model, [ids]), activations(copy.deepcopy(model).double(), ids), 1e-4)


@pytest.mark.parametrize("arch", ALL.values(), ids=ALL)
def test_bfloat16_loses_nothing_but_the_rounding_of_activations(arch):
    model, ids = toy(arch, dtype=torch.bfloat16), tokens()
    found = collect(model, [ids])
    assert all(t.dtype == torch.float32 for s in found.values() for t in s.tensors().values())
    check(found, activations(model, ids), 1e-3)  # the very activations of the bfloat16 model
    exact = copy.deepcopy(model).double()
    check(found, activations(exact, ids), 0.05)  # those of its weights


def test_batches_add_up():
    model = toy(PLAIN)
    parts, seen = [tokens(seed=n) for n in range(3)], []
    together = collect(model, [torch.cat(parts)])
    apart = collect(model, iter(parts), seen.append)
    assert seen == [parts[0].numel()] * 3
    for index, s in together.items():
        assert apart[index].tokens == s.tokens
        assert apart[index].power == pytest.approx(s.power, rel=1e-5)
        for name, value in s.tensors().items():
            assert relative(apart[index].tensors()[name], value) < 1e-5
    once = collect(model, parts[:1])
    assert relative(once[0].inputs, together[0].inputs) > 0.1  # a lost batch would show


def test_linear_blocks_are_passed_through_and_not_counted():
    model = toy(PLAIN)
    arch = PLAIN.replace(blocks=(*PLAIN.blocks[:2], Linear(), *PLAIN.blocks[2:]))
    other = Decoder(arch)
    blocks = list(model.blocks)
    linear = ResidualBlock(Linear(), arch, torch.float32)
    with torch.no_grad():
        linear.mixer.proj.weight.normal_(generator=torch.Generator().manual_seed(0))
    other.embed, other.norm = model.embed, model.norm
    other.blocks = torch.nn.ModuleList([*blocks[:2], linear, *blocks[2:]])
    found = collect(other.requires_grad_(False), [tokens()])
    assert list(found) == [0, 1, 3, 4]
    plain = collect(model, [tokens()])
    assert relative(found[1].inputs, plain[1].inputs) < 1e-6
    assert relative(found[3].inputs, plain[2].inputs) > 0.1  # the stream that the linear block left


def test_tensors_name_what_there_is():
    found = collect(toy(PLAIN), [tokens()])
    assert set(found[0].tensors()) == {"inputs", "cross", "channels", "keys", "values", "total"}
    assert set(found[1].tensors()) == {"inputs", "cross", "channels"}
    again = type(found[1])(tokens=found[1].tokens, power=found[1].power, **found[1].tensors())
    assert dataclasses.asdict(again).keys() == dataclasses.asdict(found[1]).keys()
