"""Intarsia: make language models cheaper to run without making them worse."""

__version__ = "0.1.0"
