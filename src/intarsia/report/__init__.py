"""One offline page per run, drawn from the files of its run folder alone. No torch, no network, no scripts needed."""

from intarsia.report.mosaic import mosaic_svg
from intarsia.report.page import render
from intarsia.report.training import draw

__all__ = ["draw", "mosaic_svg", "render"]
