"""One offline page per run, drawn from the files of its run folder alone. No torch, no network, no scripts needed."""

from intarsia.report.mosaic import mosaic_svg
from intarsia.report.page import render

__all__ = ["mosaic_svg", "render"]
