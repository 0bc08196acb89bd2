"""The Mamba mixers: a short convolution, a scan, a gate.

Shape letters: B batch, L length, D model, H heads, P head dim, G groups, N state, K conv kernel, C channels of the
convolution, E channels of Mamba-1, R rank of its time steps.
"""

from __future__ import annotations

from functools import partial

import torch
import torch.nn.functional as F
from torch import nn

from intarsia.arch import Mamba1, Mamba2
from intarsia.model.cache import Memory
from intarsia.model.parts import Float32Parameters, Scale, Tables
from intarsia.model.rows import Rows
from intarsia.ops.conv import causal_conv, causal_conv_step
from intarsia.ops.gated_norm import gated_norm
from intarsia.ops.linear import Projection
from intarsia.ops.selective import selective_scan, selective_step
from intarsia.ops.ssd import ssd, ssd_step, time_steps


class Conv(nn.Module):
    """The causal depthwise convolution with its SiLU: weight (C, K), bias (C,)."""

    def __init__(self, channels: int, kernel: int, bias: bool, dtype: torch.dtype, device=None):
        super().__init__()
        like = {"dtype": dtype, "device": device}
        self.weight = nn.Parameter(torch.empty(channels, kernel, **like))
        self.register_parameter("bias", nn.Parameter(torch.empty(channels, **like)) if bias else None)

    def forward(
        self, x: torch.Tensor, held: torch.Tensor | None, rows: Rows | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """x (B, L, C), padding first; held (B, K-1, C), the inputs before it -> y (B, L, C) and the last inputs."""
        if rows is not None and rows.keep is not None:
            x, held = self._without_padding(x, held, rows)
        return causal_conv(x, self.weight, self.bias, held, None if rows is None else rows.scan_segments)

    def _without_padding(
        self, x: torch.Tensor, held: torch.Tensor | None, rows: Rows
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Padding becomes zeros, and what is held moves over it, next to the first real token."""
        x = x.masked_fill(~rows.real[..., None], 0)
        if held is None:
            return x, None
        before = held.shape[1]
        place = torch.arange(before + x.shape[1], device=x.device)
        source = torch.where(place >= before + rows.pads, place, place - rows.pads)  # (B, K-1 + L)
        batch = torch.arange(len(x), device=x.device)[:, None]
        seen = torch.cat([held, x], 1)[batch, source.clamp(min=0)].masked_fill((source < 0)[..., None], 0)
        return seen[:, before:], seen[:, :before]

    def step(self, x: torch.Tensor, held: torch.Tensor) -> torch.Tensor:
        """One token, x (B, C) -> (B, C); `held` moves on."""
        return causal_conv_step(x, self.weight, self.bias, held)


class Mamba2Mixer(Float32Parameters):
    """State space duality with a gated norm (arXiv 2405.21060; Nemotron-H, arXiv 2504.03624, section 2.1).

    in_proj (2HP + 2GN + H, D) with rows z, x, B, C, dt; conv over x, B and C; A_log, D and dt_bias (H,), float32; norm
    (HP,); out_proj (D, HP).
    """

    FLOAT32 = ("A_log", "D", "dt_bias")

    def __init__(self, spec: Mamba2, hidden_size: int, norm_eps: float, dtype: torch.dtype, device=None):
        super().__init__()
        self.spec, self.eps = spec, norm_eps
        like = {"dtype": dtype, "device": device}
        self.in_proj = Projection(hidden_size, spec.in_size, bias=spec.proj_bias, **like)
        self.conv = Conv(spec.conv_size, spec.conv_kernel, spec.conv_bias, **like)
        self.norm = Scale(spec.inner_size, **like)
        self.out_proj = Projection(spec.inner_size, hidden_size, bias=spec.proj_bias, **like)
        for name in self.FLOAT32:
            setattr(self, name, nn.Parameter(torch.empty(spec.num_heads, dtype=torch.float32, device=device)))

    def forward(
        self,
        x: torch.Tensor,
        tables: Tables | None = None,
        cache: Memory | None = None,
        index: int = 0,
        rows: Rows | None = None,
    ) -> torch.Tensor:
        """x (B, L, D), already normalised -> (B, L, D)."""
        return self.out_proj(self.channels(x, cache, index, rows))

    def channels(
        self, x: torch.Tensor, cache: Memory | None = None, index: int = 0, rows: Rows | None = None
    ) -> torch.Tensor:
        """What `out_proj` reads, (B, L, HP)."""
        z, xbc, dt = self.in_proj(x).split([self.spec.inner_size, self.spec.conv_size, self.spec.num_heads], -1)
        run = partial(self._mix, rows=rows)
        y = run(xbc, dt) if cache is None else cache.scan(index, run, xbc, dt)
        return gated_norm(y, z, self.norm.weight, self.spec.groups_of_norm, self.eps)

    def _mix(
        self,
        xbc: torch.Tensor,
        dt: torch.Tensor,
        states: tuple[torch.Tensor, torch.Tensor] | None = None,
        rows: Rows | None = None,
    ) -> torch.Tensor:
        """Convolution and scan: xbc (B, L, C), dt (B, L, H) -> (B, L, HP); the states move on."""
        if states is not None and xbc.shape[1] == 1 and (rows is None or rows.keep is None):
            return self._step(xbc[:, 0], dt[:, 0], *states)[:, None]
        return self._scan(xbc, dt, states, rows)

    def _scan(
        self, xbc: torch.Tensor, dt: torch.Tensor, states: tuple[torch.Tensor, torch.Tensor] | None, rows: Rows | None
    ) -> torch.Tensor:
        """xbc (B, L, C) before the convolution, dt (B, L, H) -> y (B, L, HP); the states move on."""
        padded = rows is not None and rows.keep is not None
        if padded:
            xbc, dt = rows.pads_first(xbc), rows.pads_first(dt)
        held, state = states or (None, None)
        xbc, last_held = self.conv(xbc, held, rows)
        x, b, c = self._parts(xbc)
        dt = self._time_steps(dt)
        if padded:
            dt = dt * rows.real[..., None]  # no time passes over padding
        segments = None if rows is None else rows.scan_segments
        y, last_state = ssd(x, dt, self._decay(dt), b, c, self.D, state, segments, self.spec.chunk_size)
        if states is not None:
            held.copy_(last_held)
            state.copy_(last_state)
        y = y.flatten(-2)
        return rows.pads_back(y) if padded else y

    def _step(self, xbc: torch.Tensor, dt: torch.Tensor, held: torch.Tensor, state: torch.Tensor) -> torch.Tensor:
        """One token: xbc (B, C), dt (B, H) -> y (B, HP)."""
        x, b, c = self._parts(self.conv.step(xbc, held))
        dt = self._time_steps(dt)
        return ssd_step(x, dt, self._decay(dt), b, c, self.D, state).flatten(-2)

    def _parts(self, xbc: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """(..., C) -> x (..., H, P), B and C (..., G, N)."""
        s = self.spec
        width = s.num_groups * s.state_size
        x, b, c = xbc.split([s.inner_size, width, width], -1)
        return x.unflatten(-1, (s.num_heads, -1)), *(t.unflatten(-1, (s.num_groups, -1)) for t in (b, c))

    def _time_steps(self, dt: torch.Tensor) -> torch.Tensor:
        return time_steps(dt, self.dt_bias, self.spec.dt_min, self.spec.dt_max)

    def _decay(self, dt: torch.Tensor) -> torch.Tensor:
        """A (H,), negative, in the dtype of the time steps."""
        return -self.A_log.to(dt.dtype).exp()


class Mamba1Mixer(Float32Parameters):
    """The selective scan S6 (arXiv 2312.00752, section 3.4).

    in_proj (2E, D) with rows x, z; conv over x; x_proj (R + 2N, E) with rows dt, B, C; dt_proj (E, R) with a bias;
    A_log (E, N) and D (E,), float32; out_proj (D, E).
    """

    FLOAT32 = ("A_log", "D")

    def __init__(self, spec: Mamba1, hidden_size: int, dtype: torch.dtype, device=None):
        super().__init__()
        self.spec = spec
        like, inner = {"dtype": dtype, "device": device}, spec.inner_size
        self.in_proj = Projection(hidden_size, 2 * inner, bias=spec.proj_bias, **like)
        self.conv = Conv(inner, spec.conv_kernel, spec.conv_bias, **like)
        self.x_proj = Projection(inner, spec.time_step_rank + 2 * spec.state_size, bias=False, **like)
        self.dt_proj = Projection(spec.time_step_rank, inner, **like)
        self.A_log = nn.Parameter(torch.empty(inner, spec.state_size, dtype=torch.float32, device=device))
        self.D = nn.Parameter(torch.empty(inner, dtype=torch.float32, device=device))
        self.out_proj = Projection(inner, hidden_size, bias=spec.proj_bias, **like)

    def forward(
        self,
        x: torch.Tensor,
        tables: Tables | None = None,
        cache: Memory | None = None,
        index: int = 0,
        rows: Rows | None = None,
    ) -> torch.Tensor:
        """x (B, L, D), already normalised -> (B, L, D)."""
        x, z = self.in_proj(x).chunk(2, -1)
        run = partial(self._mix, rows=rows)
        y = run(x) if cache is None else cache.scan(index, run, x)
        return self.out_proj(y * F.silu(z))

    def _mix(
        self, x: torch.Tensor, states: tuple[torch.Tensor, torch.Tensor] | None = None, rows: Rows | None = None
    ) -> torch.Tensor:
        """Convolution and scan: x (B, L, E) -> (B, L, E); the states move on."""
        if states is None or x.shape[1] != 1 or (rows is not None and rows.keep is not None):
            return self._scan(x, states, rows)
        held, state = states
        x = self.conv.step(x[:, 0], held)
        dt, b, c = self._parameters_of(x)
        return selective_step(x, dt, self._decay(dt), b, c, self.D, state)[:, None]

    def _scan(
        self, x: torch.Tensor, states: tuple[torch.Tensor, torch.Tensor] | None, rows: Rows | None
    ) -> torch.Tensor:
        """x (B, L, E) before the convolution -> y (B, L, E); the states move on."""
        padded = rows is not None and rows.keep is not None
        if padded:
            x = rows.pads_first(x)
        held, state = states or (None, None)
        x, last_held = self.conv(x, held, rows)
        dt, b, c = self._parameters_of(x)
        if padded:
            dt = dt * rows.real[..., None]  # no time passes over padding
        segments = None if rows is None else rows.scan_segments
        y, last_state = selective_scan(x, dt, self._decay(dt), b, c, self.D, state, segments)
        if states is not None:
            held.copy_(last_held)
            state.copy_(last_state)
        return rows.pads_back(y) if padded else y

    def _parameters_of(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """x (..., E) -> dt (..., E) float32, B and C (..., N): what makes the scan selective."""
        rank, width = self.spec.time_step_rank, self.spec.state_size
        dt, b, c = self.x_proj(x).split([rank, width, width], -1)
        return time_steps(F.linear(dt, self.dt_proj.weight), self.dt_proj.bias), b, c

    def _decay(self, dt: torch.Tensor) -> torch.Tensor:
        """A (E, N), negative, in the dtype of the time steps."""
        return -self.A_log.to(dt.dtype).exp()
