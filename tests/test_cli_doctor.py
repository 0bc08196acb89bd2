"""`intarsia doctor` tells what is, and its advice follows from what it tells."""

import json

import pytest

from intarsia import cli, doctor
from intarsia.base import machine


@pytest.fixture(scope="module")
def facts():
    return doctor.examine(seconds=0.02)


def test_facts_are_plain_and_complete(facts):
    assert json.loads(json.dumps(facts)) == facts
    assert facts["cores"] >= 1 and facts["threads"] >= 1
    assert all(product["tflops"] > 0 for product in facts["matmul"].values())
    assert facts["copy_gigabytes_per_second"] > 0 and facts["free_disk_bytes"]["home"] > 0
    assert set(facts["fetched"]) == {"smollm2-135m", "text", "tasks", "conversations", "preferences"}


def test_the_path_is_the_one_that_runs(facts):
    bf16 = facts["matmul"]["bfloat16"]
    if "amx_bf16" in machine.cpu_flags():
        assert bf16["kind"] == "AMX tiles" and "amx" in bf16["path"]
        assert facts["compute_dtype"]["dtype"] == "bfloat16" and "amx_bf16" in facts["compute_dtype"]["why"]


@pytest.mark.parametrize(
    ("path", "kind"),
    [
        ("brg_matmul:avx10_1_512_amx", "AMX tiles"), ("brg_matmul:avx512_core_amx_fp16", "AMX tiles"),
        ("brg_matmul:avx512_core_bf16", "AVX512-BF16"), ("brg_matmul:avx512_core", "AVX-512"),
        ("gemm:jit:avx2", "AVX2"), ("ref:any", "reference loop (emulated)"), (None, "BLAS (not oneDNN)"),
        ("acl", "acl"),
    ],
)  # fmt: skip
def test_what_the_names_of_onednn_mean(path, kind):
    assert doctor.path_kind(path) == kind


def test_the_page_says_it_all(facts):
    text = doctor.describe(facts)
    for part in ("Python", "bfloat16 product", "TFLOP/s", "computes in", "smollm2-135m", "free disk", "GPU"):
        assert part in text
    assert facts["compute_dtype"]["why"] in text


def test_nothing_fetched_is_said(facts, tmp_path, monkeypatch):
    monkeypatch.setenv("INTARSIA_HOME", str(tmp_path / "empty"))
    assert set(doctor.fetched().values()) == {None}
    assert "not yet (intarsia fetch text)" in doctor.describe({**facts, "fetched": doctor.fetched()})


def test_the_command_prints_json(monkeypatch, facts, capsys):
    monkeypatch.setattr(doctor, "examine", lambda: facts)
    assert cli.main(["doctor", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == facts
