"""The real parent, where `intarsia fetch smollm2-135m` has been run: its logits and tokenizer are transformers' own."""

import pytest
import torch

from intarsia import formats

pytestmark = pytest.mark.slow
TEXTS = [
    "The history of mathematics begins with counting on fingers in 1984. def f(x): return x",
    "naïve café — 数学 🙂 \t\n def f(x):\n    return x1**22   <|im_start|>user\nhi<|im_end|>",
]


@pytest.fixture(scope="module")
def path():
    from intarsia.data.home import home

    found = sorted((home() / "models" / "smollm2-135m").glob("*.gguf"))
    if not found:
        pytest.skip("the parent has not been fetched: `intarsia fetch smollm2-135m`")
    return found[0]


@pytest.fixture(scope="module")
def loaded(path):
    return formats.load(path, dtype="float32")


@torch.no_grad()
def test_logits_equal_transformers(path, loaded):
    from transformers import AutoModelForCausalLM

    model, tokenizer = loaded
    stock = AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32).eval()
    for text in TEXTS:
        ids = torch.tensor([tokenizer.encode(text)])
        assert float((model(ids) - stock(ids).logits).abs().max()) < 1e-4


@torch.no_grad()
def test_it_predicts_english(loaded):
    model, tokenizer = loaded
    ids = torch.tensor([tokenizer.encode("The capital of France is")])
    assert tokenizer.decode([int(model(ids)[0, -1].argmax())]) == " Paris"


def test_the_folder_written_from_it_is_whole(path, loaded, tmp_path):
    from transformers import AutoTokenizer

    model, tokenizer = loaded
    formats.save(model.to(torch.bfloat16), tmp_path / "child", source=path)
    model.float()
    theirs = AutoTokenizer.from_pretrained(tmp_path / "child")
    again, ours = formats.load(tmp_path / "child")
    assert again.dtype == torch.bfloat16 and again.arch == model.arch
    for text in TEXTS:
        assert theirs(text).input_ids == ours.encode(text) == tokenizer.encode(text)
        assert ours.decode(ours.encode(text)) == text
    assert (theirs.bos_token_id, theirs.eos_token_id) == (ours.bos_id, ours.eos_id) == (1, 2)
    assert ours.fingerprint == tokenizer.fingerprint
    chat = theirs.apply_chat_template([{"role": "user", "content": "hi"}], tokenize=False, add_generation_prompt=True)
    assert chat.endswith("<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n")
