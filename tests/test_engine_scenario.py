"""Scenarios and their timing."""

import pytest

from intarsia.arch import Architecture, Attention, FeedForward
from intarsia.base.errors import IntarsiaError
from intarsia.engine import Scenario, compare_speed, run_scenario
from intarsia.engine.scenario import spread
from intarsia.model import Decoder, initialise


def build(layers, width):
    arch = Architecture.transformer(
        layers, Attention(4, 2, 16), FeedForward(width), hidden_size=64, vocab_size=128, max_positions=128
    )
    return initialise(Decoder(arch)).eval()


def test_parse_and_refuse():
    assert Scenario.parse("2,32,8") == Scenario(2, 32, 8)
    for text in ("1,512", "a,b,c", "1,2,3,4", ""):
        with pytest.raises(IntarsiaError, match="batch,prompt,generated"):
            Scenario.parse(text)
    for text in ("0,1,1", "1,0,1", "1,1,-1"):
        with pytest.raises(IntarsiaError, match="at least"):
            Scenario.parse(text)


def test_a_scenario_longer_than_the_context_is_refused():
    model = build(1, 64)
    with pytest.raises(IntarsiaError, match="context is 128"):
        run_scenario(model, Scenario(1, 120, 9))
    assert run_scenario(model, Scenario(1, 120, 8)).total > 0


def test_every_step_is_run(monkeypatch):
    """One pass over the prompt with its cache, then as many passes of one token as are to be generated."""
    model, lengths = build(1, 64), []
    hidden = model.hidden

    def watched(ids, cache):
        lengths.append((*ids.shape, cache.length))
        return hidden(ids, cache)

    monkeypatch.setattr(model, "hidden", watched)
    run_scenario(model, Scenario(3, 20, 4))
    assert lengths == [(3, 20, 0), (3, 1, 20), (3, 1, 21), (3, 1, 22), (3, 1, 23)]


def test_a_deeper_model_is_slower_and_ratios_are_paired():
    calls = []
    small, large = build(2, 64), build(16, 256)
    found = compare_speed({"large": large, "small": small}, Scenario(1, 32, 8), 5, advance=lambda: calls.append(1))
    assert len(calls) == 12
    assert found["large"]["speedup"]["median"] == 1
    assert found["small"]["speedup"]["median"] > 1.5
    ratios = [a / b for a, b in zip(found["large"]["runs"], found["small"]["runs"])]
    assert found["small"]["speedup"] == spread(ratios)


def test_spread():
    assert spread([3.0]) == {"median": 3.0, "iqr": 0.0, "low": 3.0, "high": 3.0}
    assert spread([1.0, 2.0, 3.0, 4.0, 5.0]) == {"median": 3.0, "iqr": 2.0, "low": 2.0, "high": 4.0}
