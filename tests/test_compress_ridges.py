"""A last matrix moved by least squares: against float64, against every other mixture, and where nothing is told."""

import pytest
import torch

from intarsia.compress.ridges import RIDGES, checked_rows, fits, fitted, moments, proportions


@torch.no_grad()
def test_a_fit_is_the_ridge_regression_in_float64():
    generator = torch.Generator().manual_seed(3)
    c = torch.randn(200, 12, generator=generator)
    e = c @ torch.randn(12, 5, generator=generator) + torch.randn(200, 5, generator=generator)
    gram = c.T @ c
    for ridge, found in zip(RIDGES, fits((gram, c.T @ e)), strict=True):
        weight = (ridge * gram.diagonal().mean()).double().sqrt()
        rows = torch.cat([c.double(), weight * torch.eye(12, dtype=torch.float64)])
        wanted = torch.linalg.lstsq(rows, torch.cat([e.double(), torch.zeros(12, 5, dtype=torch.float64)])).solution
        torch.testing.assert_close(found.double(), wanted, rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_no_other_mixture_of_the_fits_leaves_less_on_the_checked_text():
    generator = torch.Generator().manual_seed(4)
    true = torch.randn(30, 5, generator=generator)
    c, other = (torch.randn(n, 30, generator=generator) for n in (60, 40))
    e, beside = (x @ true + 4 * torch.randn(len(x), 5, generator=generator) for x in (c, other))
    fitting, checking = (c.T @ c, c.T @ e), (other.T @ other, other.T @ beside)
    shares = proportions(fits(fitting), checking)

    def left(mix):
        moved = sum(share * fit for share, fit in zip(mix, fits(fitting)))
        return float((beside - other @ moved).double().square().sum())

    read = torch.stack([(other @ fit).flatten() for fit in fits(fitting)], 1).double()
    best = torch.linalg.lstsq(read, beside.double().flatten()[:, None]).solution[:, 0].tolist()
    assert left(shares) == pytest.approx(left(best), rel=1e-5)
    alone = [[float(i == k) for i in range(len(RIDGES))] for k in range(len(RIDGES))]
    assert all(left(shares) <= left(one) + 1e-6 for one in alone)


def test_nothing_moves_where_nothing_is_told():
    generator = torch.Generator().manual_seed(5)
    c, other = (torch.randn(n, 8, generator=generator) for n in (500, 500))
    zero = torch.zeros(8, 3)
    assert proportions(fits((c.T @ c, zero)), (other.T @ other, zero)) is None
    assert proportions(fits((zero @ zero.T, zero)), (other.T @ other, torch.full((8, 3), float("nan")))) is None


@torch.no_grad()
def test_several_errors_at_once_are_fitted_as_each_alone():
    generator = torch.Generator().manual_seed(6)
    c, beside = torch.randn(8, 20, 6, generator=generator), torch.randn(8, 20, 4, generator=generator)
    told = [c @ torch.randn(6, 4, generator=generator), torch.randn(8, 20, 4, generator=generator)]
    unknown = torch.full((8, 20, 4), float("nan"))
    rows = checked_rows(8, c.device)
    assert rows.sum() == 2 and checked_rows(2, c.device).tolist() == [False, True]
    together = fitted(c, [*told, told[0]], beside, rows)
    for error, found in zip([*told, told[0]], together):
        alone = fitted(c, [error], beside, rows)[0]
        assert (found is None) == (alone is None)
        if found is not None:
            torch.testing.assert_close(found, alone, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(c @ together[0], told[0], rtol=0.05, atol=0.05)
    assert fitted(c, [unknown], beside, rows) == [None]


@torch.no_grad()
def test_a_token_counts_relative_to_its_stream():
    generator = torch.Generator().manual_seed(7)
    c, e = torch.randn(4, 10, 3, generator=generator), torch.randn(4, 10, 2, generator=generator)
    beside = torch.ones(4, 10, 2)
    beside[:, 0] = 64.0  # the first token of a text
    gram, cross = moments(c, e, beside)
    weight, near = beside[..., :1].double() ** -2, {"rtol": 1e-5, "atol": 1e-5}
    torch.testing.assert_close(gram.double(), (c.double() * weight).flatten(0, 1).T @ c.double().flatten(0, 1), **near)
    torch.testing.assert_close(cross.double(), (c.double() * weight).flatten(0, 1).T @ e.double().flatten(0, 1), **near)
