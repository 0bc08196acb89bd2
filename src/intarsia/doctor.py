"""What `intarsia doctor` finds: the machine, the kernels that run on it and why, and what has been fetched.

Nothing is inferred where it can be asked: which matrix product runs is read from what oneDNN reports while one runs,
and speeds are measured.
"""

from __future__ import annotations

import os
import shutil
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from intarsia.base import machine
from intarsia.base.files import read_json
from intarsia.data.home import home

TOKENS, WIDTH = 512, 1536  # the shape of the trial product: a prompt through a layer of a small model
BFLOAT16_PAYS = 1.2  # bfloat16 is the better choice when it is this much faster than float32


def examine(seconds: float = 0.4) -> dict[str, Any]:
    """All facts, JSON-able. `seconds` are spent on each of the three measurements."""
    import torch

    load = os.getloadavg()[0]  # before our own work adds to it
    products = {name: _product(getattr(torch, name), seconds) for name in ("bfloat16", "float32")}
    return {
        **machine.environment(),
        "threads": torch.get_num_threads(),
        "load": round(load, 1),
        "matmul": products,
        "compute_dtype": _compute_dtype(products),
        "native": _native(),
        "kernels": _kernels(),
        "fp8": _fp8(),
        "copy_gigabytes_per_second": round(_copy_rate(seconds), 1),
        "gpus": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())],
        "fetched": fetched(),
        "home": str(home()),
        "free_disk_bytes": {"home": _free(home()), "here": _free(Path.cwd())},
    }


def fetched() -> dict[str, int | None]:
    """Everything that can be fetched: its bytes if it is in the home, else None."""
    from intarsia.data.fetch import ITEMS

    found: dict[str, int | None] = {}
    for name, item in ITEMS.items():
        manifest = home() / item.folder / "manifest.json"
        found[name] = sum(f["bytes"] for f in read_json(manifest)["files"]) if manifest.exists() else None
    return found


def _free(path: Path) -> int:
    while not path.exists():
        path = path.parent
    return shutil.disk_usage(path).free


def _product(dtype, seconds: float) -> dict[str, Any]:
    """Run (TOKENS, WIDTH) x (WIDTH, WIDTH) in `dtype`: TFLOP/s and the implementation that ran."""
    import torch

    x, w = (torch.randn(rows, WIDTH).to(dtype) for rows in (TOKENS, WIDTH))
    each = _best_seconds(lambda: torch.nn.functional.linear(x, w), seconds)
    path = _implementation(lambda: torch.nn.functional.linear(x, w))
    return {"path": path, "kind": path_kind(path), "tflops": round(2 * TOKENS * WIDTH**2 / each / 1e12, 3)}


def path_kind(path: str | None) -> str:
    """What oneDNN's name of an implementation means for a person."""
    if path is None:
        return "BLAS (not oneDNN)"
    if path.endswith("_amx") or "_amx_" in path:
        return "AMX tiles"
    if "ref" in path.split(":")[0]:
        return "reference loop (emulated)"
    names = {"avx10": "AVX10", "avx512_core_bf16": "AVX512-BF16", "avx512": "AVX-512", "avx2": "AVX2"}
    return next((name for part, name in names.items() if part in path), path)


def _implementation(product: Callable[[], Any]) -> str | None:
    """The implementation that oneDNN reports for a product, such as `brg_matmul:avx10_1_512_amx`; None if not oneDNN's.

    oneDNN reports on the process's standard output, below Python: for the moment that is turned into a file.
    """
    from torch.backends import mkldnn

    with tempfile.TemporaryFile() as report:
        saved = os.dup(1)
        try:
            os.dup2(report.fileno(), 1)
            with mkldnn.verbose(mkldnn.VERBOSE_ON):
                product()
        finally:
            os.dup2(saved, 1)
            os.close(saved)
        report.seek(0)
        lines = report.read().decode(errors="replace").splitlines()
    # onednn_verbose,v1,primitive,exec,cpu,matmul,brg_matmul:avx10_1_512_amx,...
    fields = [line.split(",") for line in lines if ",exec,cpu," in line]
    ran = [f[f.index("cpu") + 2] for f in fields if f[f.index("cpu") + 1] in ("matmul", "inner_product", "gemm")]
    return ran[0] if ran else None


def _best_seconds(work: Callable[[], Any], seconds: float) -> float:
    """The shortest of several repeats: what the machine can do, whoever else is using it now."""
    times: list[float] = []
    end = time.perf_counter() + seconds
    while time.perf_counter() < end or len(times) < 5:
        began = time.perf_counter()
        work()
        times.append(time.perf_counter() - began)
    return min(times)


def _copy_rate(seconds: float) -> float:
    """Gigabytes a second that a copy of 256 MiB reads and writes."""
    import torch

    source = torch.ones(64 * 2**20)
    target = torch.empty_like(source)
    return 2 * source.nbytes / _best_seconds(lambda: target.copy_(source), seconds) / 1e9


def _compute_dtype(products: dict[str, dict[str, Any]]) -> dict[str, str]:
    """The dtype that quantised weights are computed in by default, and why."""
    from intarsia.formats import native_bfloat16

    ratio = products["bfloat16"]["tflops"] / products["float32"]["tflops"]
    if native_bfloat16():
        native = [flag for flag in machine.cpu_flags() if "bf16" in flag]
        why = f"the processor has {', '.join(native)}; measured here, bfloat16 runs at {ratio:.1f} x float32"
        if ratio < BFLOAT16_PAYS:
            why += ", which is less than expected: is another process busy?"
        return {"dtype": "bfloat16", "why": why}
    why = f"the processor has no bfloat16 arithmetic; measured here, bfloat16 runs at {ratio:.1f} x float32"
    return {"dtype": "float32", "why": why}


def _native() -> str:
    """Which level of the compiled kernels runs on this processor, or why none does."""
    from intarsia.ops import native

    try:
        return native.describe()
    except ImportError as error:
        return f"none: {error}"


def _kernels() -> dict[str, dict[str, str]]:
    """Which implementation runs each op of the Mamba blocks in inference on this processor, and why."""
    from intarsia.ops import backends

    return {op: {"backend": name, "why": why} for op, (name, why) in backends.describe("cpu").items()}


def _fp8() -> str:
    """How FP8 training would compute here, and whether that is fast."""
    import torch

    from intarsia.ops import fp8

    return fp8.describe("cuda" if torch.cuda.is_available() else "cpu")


def _kernel_rows(kernels: dict[str, dict[str, str]]) -> list[tuple[str, str]]:
    """A line for every backend and reason, with its ops."""
    ops: dict[str, list[str]] = {}
    for op, chosen in kernels.items():
        ops.setdefault(f"{chosen['backend']} ({chosen['why']})", []).append(op)
    lines = [f"{which}: {', '.join(those)}" for which, those in ops.items()]
    return [("" if i else "ops of Mamba", line) for i, line in enumerate(lines)]


def describe(facts: dict[str, Any]) -> str:
    """The facts as lines for a person."""
    versions, products, chosen = facts["versions"], facts["matmul"], facts["compute_dtype"]
    packages = ", ".join(f"{name} {version}" for name, version in versions.items() if version and name != "intarsia")
    rows = [
        ("intarsia", f"{versions['intarsia'] or 'run from source'} on Python {facts['python']}, {facts['os']}"),
        ("packages", packages),
        ("processor", f"{facts['cpu']}, {facts['cores']} cores, torch uses {facts['threads']} threads"),
        ("instructions", " ".join(facts["cpu_flags"]) or "none of those that matter"),
        ("memory", f"{_size(facts['memory_bytes'])}, copies at {facts['copy_gigabytes_per_second']} GB/s"),
    ]
    for name, product in products.items():
        path = f" ({product['path']})" if product["path"] else ""
        rows.append((f"{name} product", f"{product['tflops']:.2f} TFLOP/s, {product['kind']}{path}"))
    if facts["load"] > 0.5:
        rows.append(("", f"other work is running (load {facts['load']}), so these speeds are lower than they could be"))
    rows += [
        ("computes in", f"{chosen['dtype']}: {chosen['why']}"),
        ("native kernels", facts["native"]),
        *_kernel_rows(facts["kernels"]),
        ("FP8 training", facts["fp8"]),
        ("GPU", ", ".join(facts["gpus"]) or "none that this torch can use"),
        ("fetched", f"in {facts['home']}"),
    ]
    for name, size in facts["fetched"].items():
        rows.append(("", f"{name}: {_size(size) if size is not None else f'not yet (intarsia fetch {name})'}"))
    free = facts["free_disk_bytes"]
    rows.append(("free disk", f"{_size(free['home'])} there, {_size(free['here'])} in this folder"))
    return "\n".join(f"{label:<18}{text}" for label, text in rows)


def _size(count: float) -> str:
    for unit in ("B", "KiB", "MiB"):
        if count < 1024:
            return f"{count:.0f} {unit}"
        count /= 1024
    return f"{count:.1f} GiB"
