"""Every Triton kernel, compiled for Hopper (sm_90) as it would be launched at the shapes of Nemotron-H; needs no GPU.

The ops run on tensors without storage; what they would launch is recorded and compiled ahead of time.
"""

import re
import subprocess
from pathlib import Path

import pytest
import torch

triton = pytest.importorskip("triton", reason="Triton is not installed: pip install 'intarsia[gpu]', on Linux")

from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.compiler import ASTSource  # noqa: E402

from intarsia.ops import triton as ops  # noqa: E402
from intarsia.ops.triton import launcher  # noqa: E402

SHARED_BYTES = 227 * 1024  # what a program may use on sm_90
REGISTERS = 65536  # of a multiprocessor
TYPES = {torch.bfloat16: "*bf16", torch.float32: "*fp32", torch.int32: "*i32", int: "i32", float: "fp32"}


@pytest.fixture(scope="module")
def cache(tmp_path_factory) -> Path:
    """What one test has compiled, another need not; but nothing from before counts."""
    return tmp_path_factory.mktemp("compiled")


@pytest.fixture
def launches(monkeypatch, cache):
    """What the ops would have launched: (kernel, arguments, config), nothing started."""
    seen = []
    monkeypatch.setattr(launcher, "launch", lambda kernel, grid, *args, **config: seen.append((kernel, args, config)))
    monkeypatch.setenv("TRITON_CACHE_DIR", str(cache))
    return seen


def compile_for_hopper(kernel, args: tuple, config: dict):
    """As Triton's launcher would specialise it: ones and None are constants, multiples of 16 are known as such."""
    options = {k: v for k, v in config.items() if k in ("num_warps", "num_stages")}
    constants = {k: v for k, v in config.items() if k not in options}
    signature, attrs = {}, {}
    for index, (name, value) in enumerate(zip(kernel.arg_names, args)):
        if value is None or (isinstance(value, int) and value == 1):
            signature[name], constants[name] = "constexpr", value
            continue
        signature[name] = TYPES[value.dtype if isinstance(value, torch.Tensor) else type(value)]
        if isinstance(value, torch.Tensor) or value % 16 == 0:
            attrs[(index,)] = [["tt.divisibility", 16]]
    signature |= dict.fromkeys(constants, "constexpr")
    ordered = {name: signature[name] for name in kernel.arg_names}
    source = ASTSource(kernel, ordered, constants, attrs)
    return triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)


def usage(binary, folder: Path) -> tuple[int, int]:
    """Registers a thread and bytes spilled to the stack, read off the binary by the tool in Triton's own package."""
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    cubin = folder / "kernel.cubin"
    cubin.write_bytes(binary.asm["cubin"])
    text = subprocess.run([tool, "--dump-resource-usage", cubin], capture_output=True, text=True, check=True).stdout
    return int(re.search(r"REG:(\d+)", text)[1]), int(re.search(r"STACK:(\d+)", text)[1])


def check(launches: list, folder: Path, kernels: int) -> None:
    assert len(launches) == kernels
    for kernel, args, config in launches:
        binary = compile_for_hopper(kernel, args, config)
        registers, stack = usage(binary, folder)
        name = kernel.fn.__module__.split(".")[-1] + "." + kernel.__name__
        warps, shared = config["num_warps"], binary.metadata.shared
        print(f"{name:32} {warps:2} warps {shared / 1024:6.1f} KiB shared {registers:4} registers, stack {stack}")
        assert shared <= SHARED_BYTES, f"{name} asks for {shared} bytes of shared memory"
        assert stack == 0 or args[0].dtype == torch.float32, f"{name} spills {stack} bytes a thread"
        assert registers * 32 * warps <= REGISTERS


def meta(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def differentiable(*tensors: torch.Tensor) -> list[torch.Tensor]:
    return [t.requires_grad_() for t in tensors]


def test_conv(launches, tmp_path):
    x = meta(2, 8192, 18560)[..., 8192:18432]  # cut out of a projection's output
    weight, bias, state = meta(10240, 4), meta(10240), meta(2, 3, 10240)
    ops.causal_conv(x, weight, bias)
    ops.causal_conv_step(x[:, 0], weight, bias, state)
    x, weight, bias = differentiable(x, weight, bias)
    y, _ = ops.causal_conv(x, weight, bias, state, meta(2, 8192, dtype=torch.int32))
    y.backward(meta(*y.shape))
    check(launches, tmp_path, 4)


@pytest.mark.parametrize("channels, groups", [(8192, 8), (1536, 8), (8192, 1)])
def test_gated_norm(launches, tmp_path, channels, groups):
    y, z, weight = differentiable(meta(2, 8192, channels), meta(2, 8192, channels), meta(channels))
    ops.gated_norm(y, z, weight, groups, 1e-5).backward(meta(2, 8192, channels))
    check(launches, tmp_path, 2)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_relu_squared(launches, tmp_path, dtype):
    (x,) = differentiable(meta(2, 8192, 21504, dtype=dtype))
    ops.relu_squared(x).backward(meta(2, 8192, 21504, dtype=dtype))
    check(launches, tmp_path, 2)


# Nemotron-H 8B, Llama-3.1 70B, SmolLM2 135M.
@pytest.mark.parametrize("heads, kv_heads, dim", [(32, 8, 128), (64, 8, 128), (9, 3, 64)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_paged_attention(launches, tmp_path, heads, kv_heads, dim, dtype):
    pages = [meta(4096, 32, kv_heads, dim, dtype=dtype) for _ in "kv"]
    tables, lengths = meta(32, 4096, dtype=torch.int32), meta(32, dtype=torch.int32)
    for window in (None, 1024):
        ops.paged_attention(meta(32, heads, dim, dtype=dtype), *pages, tables, lengths, window)
    check(launches, tmp_path, 2)


# Nemotron-H 8B, 56B and Nano 2, and a check in float32: (H, P, G, N, dtype).
SHAPES = {
    "8b": (128, 64, 8, 128, torch.bfloat16),
    "56b": (256, 64, 8, 256, torch.bfloat16),
    "nano-2": (128, 80, 8, 128, torch.bfloat16),
    "float32": (24, 64, 8, 128, torch.float32),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", SHAPES)
def test_scan(launches, tmp_path, name):
    heads, size, groups, width, dtype = SHAPES[name]
    inner, keys = heads * size, groups * width
    rows = meta(2, 8192, inner + 2 * keys, dtype=dtype)  # the convolution's output, cut up
    x, B, C = rows[..., :inner], rows[..., inner : inner + keys], rows[..., inner + keys :]
    x, B, C = x.unflatten(-1, (heads, size)), B.unflatten(-1, (groups, width)), C.unflatten(-1, (groups, width))
    dt, A, D = (meta(*shape, dtype=torch.float32) for shape in ((2, 8192, heads), (heads,), (heads,)))
    state, ids = meta(2, heads, size, width, dtype=torch.float32), meta(2, 8192, dtype=torch.int32)
    ops.ssd_step(x[:, 0], dt[:, 0], A, B[:, 0], C[:, 0], D, state)
    y, last = ops.ssd(*differentiable(x, dt, A, B, C, D, state), segments=ids)
    torch.autograd.backward((y, last), (meta(*y.shape, dtype=dtype), meta(*last.shape, dtype=torch.float32)))
    check(launches, tmp_path, 7)


def test_sizes_of_one(launches, tmp_path):
    """Triton makes constants of them, which take other ways through a kernel."""
    x, dt, A, B = meta(1, 1, 1, 16), meta(1, 1, 1), meta(1), meta(1, 1, 1, 16)
    dt, A = dt.float(), A.float()
    ids = meta(1, 1, dtype=torch.int32)
    y, _ = ops.ssd(*differentiable(x, dt, A, B), B, segments=ids)
    y.backward(meta(*y.shape))
    x, weight = differentiable(meta(1, 1, 16), meta(16, 4))
    y, _ = ops.causal_conv(x, weight, segments=ids)
    y.backward(meta(*y.shape))
    check(launches, tmp_path, 8)
