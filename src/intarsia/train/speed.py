"""What the machine could compute at best: what the share that a training uses of it (MFU) is measured by."""

from __future__ import annotations

import time

import torch

# Dense bfloat16 TFLOP/s by the vendors' data sheets; what is not here is measured.
PEAKS = {"H200": 989, "H100 PCIe": 756, "H100": 989, "GH200": 989, "B200": 2250, "A100": 312, "L40S": 362, "4090": 165}
TRIAL = 1024  # width of the product that measures a processor


def peak_flops(device: torch.device, dtype: torch.dtype, seconds: float = 0.2) -> float:
    """FLOP/s of matrix products in `dtype` here: of the data sheet, or the best of some that are timed."""
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
        for part, peak in PEAKS.items():
            if part in name and dtype == torch.bfloat16:
                return peak * 1e12
    a = torch.randn(TRIAL, TRIAL, device=device).to(dtype)
    best, end = float("inf"), time.perf_counter() + seconds
    while time.perf_counter() < end or best == float("inf"):
        began = time.perf_counter()
        a @ a
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        best = min(best, time.perf_counter() - began)
    return 2 * TRIAL**3 / best
