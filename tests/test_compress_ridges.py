"""A last matrix moved by least squares: against float64, against every other mixture, and where nothing is told."""

import itertools

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

    steps = range(21)  # every mixture in twentieths
    grid = [mix for mix in itertools.product(steps, repeat=len(RIDGES)) if sum(mix) <= 20]
    assert left(shares) <= min(left([n / 20 for n in mix]) for mix in grid) * (1 + 1e-6)
    assert min(shares) >= 0 and sum(shares) <= 1 + 1e-6


@torch.no_grad()
def test_a_mixture_lies_between_its_fits_where_they_are_nearly_one():
    generator = torch.Generator().manual_seed(8)
    c, other = (torch.randn(n, 12, generator=generator) for n in (40, 30))
    for tokens in (c, other):
        tokens[:2, 0] = 1e4  # what a few tokens hold of one channel is all that the fits see
    true = torch.randn(12, 5, generator=generator)
    e, beside = (x @ true + 3 * torch.randn(len(x), 5, generator=generator) for x in (c, other))
    shares = proportions(fits((c.T @ c, c.T @ e)), (other.T @ other, other.T @ beside))
    assert min(shares) >= 0 and sum(shares) <= 1 + 1e-6
    # A mixture of wholes does no worse on yet other text than the worst of its fits, or than none.
    new = torch.randn(100, 12, generator=generator)
    wrong = [float((new @ (true - fit)).square().sum()) for fit in [*fits((c.T @ c, c.T @ e)), 0 * true]]
    moved = sum(share * fit for share, fit in zip(shares, fits((c.T @ c, c.T @ e))))
    assert float((new @ (true - moved)).square().sum()) <= max(wrong)


def test_what_rounding_has_left_indefinite_is_mixed_all_the_same():
    made = [torch.diag(torch.tensor(found)) for found in ((1.0, 0.0), (0.0, 1.0)) * 2]
    shares = proportions(made, (torch.diag(torch.tensor([1.0, -0.5])), torch.eye(2)))
    assert min(shares) >= 0 and 0.99 < sum(shares) < 1.01


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
