"""Four bits in groups of 32 inputs: codes with a scale and a least number, and the few weights that they miss most.

Dense and sparse (SqueezeLLM, arXiv 2306.07629): W = D + S. Of every output a few entries stand in S, those without
which the codes of D do least harm; D is fitted to the others. Harm is a squared error times the importance of its
input.

What has been packed once is found again: a training that keeps weights as they will be packed (`model.rounding`) is
packed as it learned, though it may not use all the codes of a group any more, and a parent that was published in such
groups loses nothing.

Shape letters: O outputs, I inputs, G groups of 32 inputs.
"""

from __future__ import annotations

import torch

GROUP = 32  # inputs of a scale
RARE = 192  # of so many inputs, filling included, an output keeps one apart: 3 % of the bytes, a tenth of the error
LIKELY = 3  # groups that are tried for every entry that is kept apart: as good as all, in the time of two fits
TURNS = 2  # in which scales are fitted again to the codes that they gave
FLOOR = 0.01  # of the mean importance: what the text did not touch may yet matter
# What codes are tried for: the step and the part of a group's range, in its middle, that they cover. All codes for less
# than the range, and 9 to 15 steps for the whole of it, from the least weight up.
_TRIES = [(share / 15, share) for share in (0.7, 0.75, 0.8, 0.85, 0.9, 0.95)] + [(1 / n, 1.0) for n in range(15, 8, -1)]


def apart(inputs: int) -> int:
    """How many entries of each output stand apart, of inputs (a multiple of 32) with their filling."""
    return -(-inputs // RARE)


def quantise(
    groups: torch.Tensor, importance: torch.Tensor | None, inputs: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """groups (O, G, 32) float32 -> codes (O, G, 32), float32, and scales with least numbers (O, G, 2), rounded to
    bfloat16 before the codes are found: of several the best by the squared error of their group, times `importance`
    (I,) of the inputs. None: all alike; of the groups only `inputs` inputs are no filling."""
    if importance is None:
        lines = _best(groups, None)
        return _coded(groups, lines), lines
    return quantise_by(groups, _even(importance, groups), _filled(groups, inputs))


def quantise_by(
    groups: torch.Tensor, importance: torch.Tensor | None, kept: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """`quantise` of the entries that are `kept` (O, G, 32) bool, by their squared errors times importance (G, 32), or
    (O, G, 32): a group's add up to no more than with what would be taken by the errors alone (None)."""
    lines = _best(groups, kept.float())
    if importance is not None:
        counts = kept * importance
        lines = _better(groups, counts, lines, _best(groups, counts))
        for _ in range(TURNS):
            lines = _better(groups, counts, lines, _weighed_line(_coded(groups, lines), groups, counts))
    return _coded(groups, lines), lines


def dense_and_sparse(
    groups: torch.Tensor, importance: torch.Tensor | None, inputs: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Codes and scales as `quantise` gives them of groups (O, G, 32), and what they lack at `apart` inputs of each
    output, (O, apart) int32: the input above, the difference in bfloat16 below."""
    matters = None if importance is None else _even(importance, groups)
    kept = _filled(groups, inputs)
    places = _outliers(groups, matters, kept)
    codes, lines = quantise_by(groups, matters, kept.flatten(1).scatter(1, places, False).view_as(groups))
    lacking = (groups - decoded(codes, lines)).flatten(1).gather(1, places)
    return codes, lines, places.int() << 16 | lacking.bfloat16().view(torch.int16).int() & 0xFFFF


def _outliers(groups: torch.Tensor, importance: torch.Tensor | None, kept: torch.Tensor) -> torch.Tensor:
    """Where the entries of each output stand that are kept apart, (O, apart) int64: of a group its greatest or its
    least one, whichever the others are better without, and of the groups those that gain most by it."""
    count = apart(kept[0].numel())
    # No group gains more than all its harm, so those of little harm are not tried.
    whole, tried = _harm(groups, importance, kept).topk(min(groups.shape[1], LIKELY * count), -1)
    within = tried[..., None].expand(-1, -1, GROUP)
    groups, kept = groups.gather(1, within), kept.gather(1, within)
    importance = None if importance is None else importance[tried]
    ends = torch.stack([
        groups.masked_fill(~kept, -torch.inf).argmax(-1, keepdim=True),
        groups.masked_fill(~kept, torch.inf).argmin(-1, keepdim=True),
    ])  # fmt: skip
    without, which = torch.stack([_harm(groups, importance, kept.scatter(-1, end, False)) for end in ends]).min(0)
    gains = (whole - without).masked_fill(~kept.any(-1), -torch.inf)
    inputs = ends.squeeze(-1).gather(0, which[None])[0] + GROUP * tried
    return inputs.gather(1, gains.topk(count, -1).indices).sort(-1).values


def _harm(groups: torch.Tensor, importance: torch.Tensor | None, kept: torch.Tensor) -> torch.Tensor:
    """What the codes of D do to the entries of each group that are `kept`, (O, G)."""
    off = (decoded(*quantise_by(groups, importance, kept)) - groups).square()
    return (off * (kept if importance is None else kept * importance)).sum(-1)


def rounded(groups: torch.Tensor, lines: torch.Tensor, places: torch.Tensor | None = None) -> torch.Tensor:
    """Weights (O, G, 32) float32 as the nearest codes of `lines` stand for them; those at `places` are kept apart."""
    found = decoded(_coded(groups, lines), lines)
    if places is None:
        return found
    lacking = (groups - found).flatten(1).gather(1, places).bfloat16().float()
    return found.flatten(1).scatter_add(1, places, lacking).view_as(groups)


def _filled(groups: torch.Tensor, inputs: int) -> torch.Tensor:
    """(O, G, 32) bool: what is a weight and no filling."""
    return (torch.arange(groups[0].numel()) < inputs).view(groups.shape[1:]).expand_as(groups)


def entries(words: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """What `dense_and_sparse` keeps apart: the inputs, int64, and what is added there, float32."""
    return words.long() >> 16 & 0xFFFF, (words << 16).view(torch.float32)


def decoded(codes: torch.Tensor, lines: torch.Tensor) -> torch.Tensor:
    """Codes (..., G, 32) with scales and least numbers (..., G, 2) -> weights (..., G, 32)."""
    return codes * lines[..., :1] + lines[..., 1:]


def nearest(groups: torch.Tensor, scales: torch.Tensor, least: torch.Tensor | int, low: int, high: int) -> torch.Tensor:
    """The codes from low to high that stand for groups (..., 32) with scales (..., 1) and least numbers."""
    scales = scales.float()
    return ((groups - least) / torch.where(scales == 0, 1, scales)).round().clamp(low, high)


def _coded(groups: torch.Tensor, lines: torch.Tensor) -> torch.Tensor:
    return nearest(groups, lines[..., :1], lines[..., 1:], 0, 15)


def _best(groups: torch.Tensor, counts: torch.Tensor | None) -> torch.Tensor:
    """Scale and least number (O, G, 2) of groups (O, G, 32), whose squared errors count `counts` times (None: once)."""
    middle, half = _range(groups, counts)
    least_error, best = torch.full_like(half, torch.inf), torch.zeros(*half.shape[:-1], 2)
    for step, share in _TRIES:
        codes = nearest(groups, 2 * half * step, middle - half * share, 0, 15)
        fitted = _line(codes, groups) if counts is None else _weighed_line(codes, groups, counts)
        off = (decoded(codes, fitted) - groups).square()
        error = (off if counts is None else off * counts).sum(-1, keepdim=True)
        best = torch.where(error < least_error, fitted, best)
        least_error = torch.minimum(error, least_error)
    return best


def _better(groups: torch.Tensor, counts: torch.Tensor, lines: torch.Tensor, others: torch.Tensor) -> torch.Tensor:
    """Of two for every group (O, G, 2) that of less error, as it counts, with the codes that fit it best."""
    first, second = (
        (counts * (decoded(_coded(groups, each), each) - groups).square()).sum(-1, keepdim=True)
        for each in (lines, others)
    )
    return torch.where(second < first, others, lines)


def _range(groups: torch.Tensor, counts: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
    """Middle and half width (..., 1) of what counts; zeros where nothing does."""
    out = torch.zeros((), dtype=torch.bool) if counts is None else counts == 0
    low = groups.masked_fill(out, torch.inf).amin(-1, keepdim=True)
    high = groups.masked_fill(out, -torch.inf).amax(-1, keepdim=True)
    return ((high + low) / 2).nan_to_num(0.0), ((high - low) / 2).nan_to_num(0.0, neginf=0.0)


def _even(importance: torch.Tensor, groups: torch.Tensor) -> torch.Tensor:
    """(I,) -> (G, 32), with a mean of about one and nothing quite without importance."""
    mean = importance.mean().clamp_min(torch.finfo(torch.float32).tiny)
    found = torch.ones(groups.shape[1:])
    found.view(-1)[: len(importance)] = importance.float() / mean + FLOOR
    return found


def _line(codes: torch.Tensor, groups: torch.Tensor) -> torch.Tensor:
    """Scale and least number (..., 2), rounded to bfloat16, that bring codes (..., 32) closest to the weights."""
    spread = codes - codes.mean(-1, keepdim=True)
    scale = (spread * groups).sum(-1, keepdim=True) / spread.square().sum(-1, keepdim=True).clamp_min(1)
    scale = scale.bfloat16().float()
    return torch.cat([scale, (groups - codes * scale).mean(-1, keepdim=True).bfloat16().float()], -1)


def _weighed_line(codes: torch.Tensor, groups: torch.Tensor, counts: torch.Tensor) -> torch.Tensor:
    """`_line` by squared errors that count `counts` times, (..., 32)."""
    total = counts.sum(-1, keepdim=True).clamp_min(1e-30)
    spread = codes - (counts * codes).sum(-1, keepdim=True) / total
    scale = (counts * spread * groups).sum(-1, keepdim=True)
    scale = (scale / (counts * spread.square()).sum(-1, keepdim=True).clamp_min(1e-12)).bfloat16().float()
    least = (counts * (groups - codes * scale)).sum(-1, keepdim=True) / total
    return torch.cat([scale, least.bfloat16().float()], -1)
