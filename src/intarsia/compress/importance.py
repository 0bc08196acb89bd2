"""Which inner channels of a block matter: three rankings of FFN channels and KV heads, all from one Gram matrix.

With G = sum c c^T over calibration tokens and W (C, D) the rows of the last matrix, dropping the set R of channels
changes the output by sum_{i in R} c_i W_i, whose mean square is a sum over R x R of M = G o (W W^T). That gives

- `independent`: each channel alone, sqrt(M_ii) (Puzzle, appendix A; root mean square in place of the mean norm);
- `iterative`: channels leave one after another, least first, each charged with what it adds to the error of those gone
  before (NVIDIA Model-Optimizer's iterative channel contribution, in its exact quadratic form);
- `refit`: as `iterative`, but the rows that stay are refitted by least squares after every removal, so a channel that
  others can stand in for is cheap (optimal brain surgeon on whole channels; cf. ZipLM, arXiv 2302.04089).
"""

from __future__ import annotations

import torch

from intarsia.base.errors import IntarsiaError

METHODS = ("independent", "iterative", "refit")
RIDGE = 1e-3  # of the mean diagonal: keeps directions that calibration never saw from being fitted


def rank_channels(gram: torch.Tensor, rows: torch.Tensor, method: str, step: int = 32) -> torch.Tensor:
    """Channel indices (C,) int64, most important first, from gram (C, C) and rows (C, D) of the last matrix.

    `step` channels leave at a time in the two sequential methods. Raises `IntarsiaError` for an unknown method.
    """
    if method == "independent":
        power = gram.diagonal() * rows.float().square().sum(1)
        return power.argsort(descending=True, stable=True)
    if method == "iterative":
        return _iterative(gram, rows.float(), step)
    if method == "refit":
        return _refit(gram, rows.float(), step)
    raise IntarsiaError(f"importance method {method!r} is not known; known: {', '.join(METHODS)}.")


def _iterative(gram: torch.Tensor, rows: torch.Tensor, step: int) -> torch.Tensor:
    coupling = gram * (rows @ rows.T)
    charge = coupling.diagonal().clone()
    gone: list[torch.Tensor] = []
    alive = torch.ones(len(charge), dtype=torch.bool)
    while alive.any():
        count = min(step, int(alive.sum()))
        leave = charge.masked_fill(~alive, torch.inf).topk(count, largest=False).indices
        alive[leave] = False
        charge += 2 * coupling[:, leave].sum(1)
        gone.append(leave)
    return torch.cat(gone).flip(0)


def _refit(gram: torch.Tensor, rows: torch.Tensor, step: int) -> torch.Tensor:
    """Blocked optimal brain surgeon: removing set B costs tr(W_B^T (P_BB)^-1 W_B), P the inverse Gram of those left."""
    left = torch.arange(len(gram))
    inverse, rows = ridge_inverse(gram), rows.clone()
    gone: list[torch.Tensor] = []
    while len(left):
        cost = rows.square().sum(1) / inverse.diagonal()
        leave = cost.topk(min(step, len(left)), largest=False).indices
        gone.append(left[leave])
        stay = torch.ones(len(left), dtype=torch.bool)
        stay[leave] = False
        pull = torch.linalg.solve(inverse[leave][:, leave], inverse[leave][:, stay]).T  # (stay, leave)
        rows = rows[stay] - pull @ rows[leave]
        inverse = inverse[stay][:, stay] - pull @ inverse[leave][:, stay]
        left = left[stay]
    return torch.cat(gone).flip(0)


def ridge(gram: torch.Tensor, share: float = RIDGE) -> torch.Tensor:
    """gram + `share` of its mean diagonal on the diagonal, float32."""
    return gram + share * gram.diagonal().mean().clamp_min(1e-12) * torch.eye(len(gram), device=gram.device)


def ridge_solve(gram: torch.Tensor, right: torch.Tensor, share: float = RIDGE) -> torch.Tensor:
    """W (C, D) with `ridge(gram, share)` W = `right`, float32: by Cholesky, at half the cost of an LU, which only takes
    over where rounding has left the matrix indefinite."""
    regular = ridge(gram, share)
    factor, failed = torch.linalg.cholesky_ex(regular)
    return torch.linalg.solve(regular, right) if failed else torch.cholesky_solve(right, factor)


def ridge_inverse(gram: torch.Tensor) -> torch.Tensor:
    """The inverse of `ridge(gram)`, by Cholesky."""
    return torch.cholesky_inverse(torch.linalg.cholesky(ridge(gram)))


def rank_kv_heads(gram: torch.Tensor, rows: torch.Tensor, num_kv_heads: int) -> torch.Tensor:
    """KV heads (K,) int64, most important first: what the query heads of each add to the stream, in mean square.

    gram (H*P, H*P) of the heads' outputs, rows (H*P, D) of the output projection (Model-Optimizer's KV-head score).
    """
    coupling = gram * (rows.float() @ rows.float().T)
    size = len(gram) // num_kv_heads
    own = [slice(g * size, (g + 1) * size) for g in range(num_kv_heads)]
    power = torch.stack([coupling[part, part].sum() for part in own])
    return power.argsort(descending=True, stable=True)


def refit_rows(gram: torch.Tensor, rows: torch.Tensor, keep: torch.Tensor) -> torch.Tensor:
    """Least-squares rows (len(keep), D) for the kept channels, so that they reproduce what all channels gave.

    Solves min |c W - c_keep W'|^2 with a ridge that pulls towards the old rows; W' = W_keep where nothing is lost.
    """
    rows = rows.float()
    dropped = torch.ones(len(gram), dtype=torch.bool)
    dropped[keep] = False
    regular = ridge(gram)
    pull = torch.linalg.solve(regular[keep][:, keep], gram[keep][:, dropped])
    return rows[keep] + pull @ rows[dropped]
