"""The engine over HTTP, in the shape of OpenAI's interface. Needs the extra `serve`."""

from intarsia.engine.serve.limits import Limits

__all__ = ["Limits"]
