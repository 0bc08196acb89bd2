"""The thread that steps an engine while others submit to it."""

from __future__ import annotations

import logging
import threading

from intarsia.engine.engine import Engine

log = logging.getLogger(__name__)


class Driver:
    """Steps until `stop`. A step that raises ends the requests that were on their way with that error, not the thread.

        with Driver(engine):
            handle = engine.submit(request, on_delta)
    """

    def __init__(self, engine: Engine):
        self.engine = engine
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)

    def __enter__(self) -> Driver:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def stop(self) -> None:
        """Finish the step at hand and end; what is still on its way stays unanswered."""
        self._stopping.set()
        self.engine.wake()
        self._thread.join()

    def _run(self) -> None:
        while not self._stopping.is_set():
            try:
                if not self.engine.step():
                    self.engine.wait(1.0)
            except Exception as error:  # whatever it is, those who wait must hear of it
                log.exception("a step of the engine failed")
                self.engine.fail(error)
