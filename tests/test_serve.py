"""`intarsia serve` in a process of its own, asked by OpenAI's client."""

import asyncio
import contextlib
import json
import os
import signal
import subprocess
import sys
import time

import httpx
import openai
import pytest
import torch

from byte_tokenizer import Bytes
from engine_toys import HYBRID, engine, tiny
from intarsia.engine import Request, Sampling
from intarsia.formats import Tokenizer, load, save

KEY = "secret-of-the-test"
TEMPLATE = (
    "{% for m in messages %}[{{ m['role'] }}]{{ m['content'] }}{{ eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    config = {"eos_token": "<end>", "tokenizer_class": "PreTrainedTokenizerFast", "chat_template": TEMPLATE}
    backend = Bytes().tokenizer
    backend.add_special_tokens(["<end>"])
    path = tmp_path_factory.mktemp("models") / "tiny"
    save(tiny(HYBRID, max_positions=4096), path, Tokenizer(backend, config))
    return path


@contextlib.contextmanager
def server(folder, *options):
    command = [sys.executable, "-m", "intarsia", "serve", str(folder), "--port", "0", "--cache-mb", "64", *options]
    environment = {**os.environ, "INTARSIA_API_KEY": KEY, "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment)
    try:
        process.url = process.stdout.readline().split()[-1]
        process.client = openai.OpenAI(base_url=process.url, api_key=KEY, max_retries=0)
        yield process
    finally:
        process.kill()
        process.wait()
        process.stdout.close()


@pytest.fixture(scope="module")
def running(folder):
    with server(folder) as process:
        yield process


@pytest.fixture(scope="module")
def ask(running):
    return running.client.completions.create


def metric(process, name):
    text = httpx.get(process.url.removesuffix("/v1") + "/metrics", headers={"Authorization": f"Bearer {KEY}"}).text
    return float(next(line for line in text.splitlines() if line.startswith(f"intarsia_{name} ")).split()[1])


def until(condition):
    for _ in range(3000):
        if condition():
            return
        time.sleep(0.02)
    raise AssertionError("it did not come true")


def test_models_health_and_who_may_enter(running):
    assert [m.id for m in running.client.models.list()] == ["tiny"]
    assert running.client.models.retrieve("tiny").id == "tiny"
    root = running.url.removesuffix("/v1")
    assert httpx.get(root + "/health").json() == {"status": "ok"}
    assert httpx.get(root + "/metrics").status_code == 401
    with pytest.raises(openai.AuthenticationError):
        openai.OpenAI(base_url=running.url, api_key="wrong").models.list()


def test_a_completion_is_what_the_engine_gives(folder, ask):
    model, tokenizer = load(folder)
    ids = tuple(tokenizer.encode("The sea"))
    greedy, drawn = Sampling(), Sampling(temperature=0.9, top_p=0.9, top_k=30, seed=5)
    for sampling in (greedy, drawn):
        request = Request(ids, 12, sampling, stop_ids=(256,))
        expected = engine(model, tokenizer=tokenizer).generate([request])[0].answers[0]
        given = {"temperature": sampling.temperature, "top_p": sampling.top_p, "seed": sampling.seed}
        reply = ask(model="tiny", prompt="The sea", max_tokens=12, **given, extra_body={"top_k": sampling.top_k})
        assert reply.choices[0].text == expected.text and reply.choices[0].finish_reason == expected.finish
        assert reply.usage.completion_tokens == len(expected.tokens) and reply.usage.prompt_tokens == 7


def test_echo_with_logprobs_scores_a_text(folder, ask):
    model, tokenizer = load(folder)
    text = "Score this."
    reply = ask(model="tiny", prompt=[text, "And this one."], max_tokens=0, echo=True, logprobs=3, temperature=0)
    assert [c.text for c in reply.choices] == [text, "And this one."]
    told = reply.choices[0].logprobs
    ids = tokenizer.encode(text)
    with torch.no_grad():
        expected = model(torch.tensor([ids]))[0].log_softmax(-1)
    assert told.token_logprobs[0] is None and told.tokens == list(text)
    assert told.text_offset == list(range(len(text)))
    for place, (logprob, top) in enumerate(zip(told.token_logprobs[1:], told.top_logprobs[1:])):
        assert abs(logprob - expected[place, ids[place + 1]]) < 1e-4
        assert abs(max(top.values()) - expected[place].max()) < 1e-4 and len(top) == 3
    ids_given = ask(model="tiny", prompt=ids, max_tokens=1, echo=True, logprobs=1, temperature=0).choices[0]
    assert len(ids_given.logprobs.tokens) == len(ids) + 1 and ids_given.text.startswith(text)


def test_a_stream_says_what_the_whole_reply_says(ask):
    asked = {"model": "tiny", "prompt": "One, two", "max_tokens": 30, "seed": 3, "n": 3, "logprobs": 1}
    whole = ask(**asked)
    texts, scores, finished, usage = ["", "", ""], [[], [], []], [None] * 3, None
    for chunk in ask(**asked, stream=True, stream_options={"include_usage": True}):
        usage = chunk.usage or usage
        for choice in chunk.choices:
            texts[choice.index] += choice.text
            scores[choice.index] += choice.logprobs.token_logprobs
            finished[choice.index] = choice.finish_reason or finished[choice.index]
    assert texts == [c.text for c in whole.choices] and len(set(texts)) == 3
    assert scores == [c.logprobs.token_logprobs for c in whole.choices]
    assert finished == [c.finish_reason for c in whole.choices] and usage == whole.usage


def test_chat_goes_through_the_models_template(running, ask):
    chat = running.client.chat.completions.create
    user = [{"type": "text", "text": "Hi"}]
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": user}]
    asked = {"model": "tiny", "messages": messages, "temperature": 0.7, "seed": 1, "max_completion_tokens": 20}
    reply = chat(**asked, logprobs=True, top_logprobs=2)
    text = "[system]Be brief.<end>[user]Hi<end>[assistant]"
    bare = ask(model="tiny", prompt=text, temperature=0.7, seed=1, max_tokens=20)
    assert reply.choices[0].message.content == bare.choices[0].text
    assert len(reply.choices[0].logprobs.content) == reply.usage.completion_tokens
    assert len(reply.choices[0].logprobs.content[0].top_logprobs) == 2
    chunks = list(chat(**asked, stream=True))
    assert chunks[0].choices[0].delta.role == "assistant"
    assert "".join(c.choices[0].delta.content or "" for c in chunks) == reply.choices[0].message.content
    assert chunks[-1].choices[0].finish_reason == reply.choices[0].finish_reason
    stop = bare.choices[0].text[5:7]
    stopped = chat(**asked, stop=[stop]).choices[0]
    assert stopped.finish_reason == "stop" and stopped.message.content == bare.choices[0].text.split(stop)[0]


def test_many_at_once_get_what_each_gets_alone(running):
    client = openai.AsyncOpenAI(base_url=running.url, api_key=KEY, max_retries=0)
    asked = [{"prompt": "abc" * (1 + 9 * i), "seed": i, "max_tokens": 10 + i} for i in range(20)]

    async def text(given):
        return (await client.completions.create(model="tiny", **given)).choices[0].text

    async def together():
        return await asyncio.gather(*map(text, asked))

    alone = [running.client.completions.create(model="tiny", **given).choices[0].text for given in asked]
    assert asyncio.run(together()) == alone


@pytest.mark.parametrize(
    "wrong, error, sentence",
    [
        ({"model": "other"}, openai.NotFoundError, "there is 'tiny'"),
        ({"max_tokens": 5000}, openai.BadRequestError, "the model's context is 4096"),
        ({"temperature": -1}, openai.BadRequestError, "temperature"),
        ({"n": 17}, openai.BadRequestError, "more than the 16"),
        ({"logprobs": 21}, openai.BadRequestError, "more than the 20"),
        ({"prompt": []}, openai.BadRequestError, "0 prompts"),
        ({"prompt": {"a": 1}}, openai.BadRequestError, "prompt"),
        ({"prompt": "a" * 5_000_000}, openai.APIStatusError, "larger than the 4,194,304 bytes"),
        ({"extra_body": {"logit_bias": {"5": 1}}}, openai.BadRequestError, "'logit_bias' is not supported"),
    ],
)
def test_what_is_not_possible_is_said_in_a_sentence(ask, wrong, error, sentence):
    with pytest.raises(error, match=sentence):
        ask(**{"model": "tiny", "prompt": "a", "max_tokens": 5} | wrong)


def test_a_model_is_served_on_packed_weights(folder, tmp_path):
    model, tokenizer = load(folder, "bfloat16")
    save(model, tmp_path / "small", tokenizer)
    packed, _ = load(tmp_path / "small", weights="int8")
    expected = engine(packed, tokenizer=tokenizer).generate([Request(tuple(tokenizer.encode("The sea")), 12)])[0]
    with server(tmp_path / "small", "--weights", "int8", "--max-batch", "2") as process:
        reply = process.client.completions.create(model="small", prompt="The sea", max_tokens=12, temperature=0)
    assert reply.choices[0].text == expected.answers[0].text


def test_a_body_of_undeclared_length_is_cut_off(running):
    def body():
        for _ in range(5000):
            yield b"x" * 1024

    headers = {"Authorization": f"Bearer {KEY}"}
    with contextlib.suppress(httpx.TransportError):  # the server may hang up while we still send
        assert httpx.post(running.url + "/completions", content=body(), headers=headers).status_code == 413
    assert httpx.post(running.url + "/completions", content=b"{", headers=headers).status_code == 400


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_goes_away_frees_its_slot(running, stream):
    before = metric(running, "generated_tokens_total")
    body = {"model": "tiny", "prompt": "on and on", "max_tokens": 4000, "stream": stream, "ignore_eos": True}
    headers = {"Authorization": f"Bearer {KEY}"}
    with httpx.Client(timeout=60) as client:
        if stream:
            with client.stream("POST", running.url + "/completions", json=body, headers=headers) as reply:
                lines = reply.iter_lines()  # a stream is closed with its iterator
                assert json.loads(next(lines).removeprefix("data: "))["choices"]
                assert metric(running, "running") == 1
        else:
            with contextlib.suppress(httpx.ReadTimeout):
                client.post(running.url + "/completions", json=body, headers=headers, timeout=0.3)
    until(lambda: metric(running, "running") == 0)
    assert metric(running, "generated_tokens_total") - before < 4000


def test_a_full_queue_a_late_answer_and_an_orderly_end(folder):
    with server(folder, "--max-batch", "1", "--max-queue", "1", "--timeout", "30", "--drain", "50") as process:
        ask = process.client.completions.create
        endless = {"model": "tiny", "prompt": "a", "max_tokens": 4000, "extra_body": {"ignore_eos": True}}
        first = ask(**endless, stream=True)
        next(iter(first))
        waiting = ask(**{**endless, "max_tokens": 5}, stream=True)  # its head comes at once, its first token does not
        until(lambda: metric(process, "queued") == 1)
        with pytest.raises(openai.RateLimitError, match="wait already"):
            ask(**endless)
        first.close()
        process.send_signal(signal.SIGTERM)
        chunks = list(waiting)
        assert chunks[-1].choices[0].finish_reason == "length"
        assert process.wait(60) == 0
        with pytest.raises(openai.APIConnectionError):
            ask(**endless)


def test_a_request_that_takes_too_long_is_ended(folder):
    with server(folder, "--timeout", "1") as process:
        ask = process.client.completions.create
        endless = {"model": "tiny", "prompt": "a", "max_tokens": 4090, "extra_body": {"ignore_eos": True}}
        with pytest.raises(openai.APIStatusError, match="not complete within the 1 seconds"):
            ask(**endless)
        with pytest.raises(openai.APIError, match="not complete within"):
            list(ask(**endless, stream=True))
        until(lambda: metric(process, "running") == 0)
