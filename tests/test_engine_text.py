"""Text as it comes: whole characters, stop strings across tokens, stop ids."""

import pytest

from byte_tokenizer import Bytes
from engine_toys import LLAMA, engine, prompt, tiny
from intarsia.engine import Request, Sampling
from intarsia.engine.text import Stops, TextStream
from intarsia.formats import Tokenizer

TOKENIZER = Tokenizer(Bytes().tokenizer, eos_id=256)


def test_a_character_waits_for_the_last_of_its_tokens():
    text = "aé€😀 z" * 20
    stream = TextStream(TOKENIZER, TOKENIZER.encode("before "))
    told = [stream.add(i) for i in TOKENIZER.encode(text)]
    assert "".join(told) + stream.end() == text and "\ufffd" not in "".join(told)
    stream = TextStream(TOKENIZER)
    assert stream.add(TOKENIZER.encode("é")[0]) == "" and stream.end() == "\ufffd"


@pytest.mark.parametrize("cut", [1, 2, 3, 5])
def test_stop_strings_are_found_across_pieces_and_never_told(cut):
    text, stops, told = "one two STOP three", Stops(("STOP", "never")), ""
    for at in range(0, len(text), cut):
        certain, stopped = stops.add(text[at : at + cut])
        told += certain
        assert "S" not in told
        if stopped:
            break
    assert stopped and told == "one two "


def test_what_only_looked_like_a_stop_is_told_in_the_end():
    stops = Stops(("abcd",))
    assert stops.add("xxabc") == ("xx", False)
    assert stops.add("ab") == ("abc", False)
    assert stops.end() == "ab" and stops.end() == ""


def test_an_answer_ends_before_its_stop_string():
    model = tiny(LLAMA)
    ask = {"prompt": prompt(10), "max_new_tokens": 40, "sampling": Sampling(temperature=1.0, seed=5)}
    whole = engine(model, tokenizer=TOKENIZER).generate([Request(**ask)])[0].answers[0]
    assert whole.finish == "length" and whole.text == TOKENIZER.decode(whole.tokens)
    stop = whole.text[10:13]
    pieces = []
    running = engine(model, tokenizer=TOKENIZER)
    handle = running.submit(Request(**ask, stop=(stop, "not there")), pieces.append)
    while running.step():
        pass
    answer = handle.answers[0]
    assert answer.finish == "stop" and answer.text == whole.text[: whole.text.index(stop)]
    assert "".join(p.text for p in pieces) == answer.text and len(answer.tokens) < 40
    assert running.stats()["running"] == 0


def test_a_stop_id_ends_an_answer_and_stays_out_of_its_text():
    model = tiny(LLAMA)
    ask = {"prompt": prompt(10), "max_new_tokens": 30, "sampling": Sampling(temperature=1.0, seed=5)}
    whole = engine(model, tokenizer=TOKENIZER).generate([Request(**ask)])[0].answers[0]
    end = whole.tokens[12]
    cut = engine(model, tokenizer=TOKENIZER).generate([Request(**ask, stop_ids=(end,))])[0].answers[0]
    first = whole.tokens.index(end)
    assert cut.tokens == whole.tokens[: first + 1] and cut.finish == "stop"
    assert cut.text == TOKENIZER.decode(whole.tokens[:first])
