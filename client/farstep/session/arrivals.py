"""Parameters that are still on their way in while the script goes on.

The answer to a step says what became of it; its bytes follow, in the order of the arena. A thread receives them, and whoever
needs a parameter waits for it: the forward of the module that owns it, or anything else that is asked of the session.
"""

from __future__ import annotations

import threading
from collections.abc import Callable

from farstep.transports.base import Rest
from farstep_wire.errors import FarstepError


class Arrival:
    """One reply's bytes, received by the reply's deadline. ``settle`` is called when all have come."""

    def __init__(self, rest: Rest, settle: Callable[[], None]) -> None:
        self._rest = rest
        self._settle = settle
        self._news = threading.Condition()
        self._received = 0
        self._over = False
        self.error: FarstepError | None = None
        """Why they have not all come, once ``over``."""
        threading.Thread(target=self._run, name="farstep-arrival", daemon=True).start()

    def _run(self) -> None:
        try:
            self._rest(self._progress)
            self._settle()
        except FarstepError as error:
            self.error = error
        finally:
            with self._news:
                self._over = True
                self._news.notify_all()

    def _progress(self, received: int) -> None:
        with self._news:
            self._received = received
            self._news.notify_all()

    def wait_for(self, nbytes: int) -> bool:
        """Wait until that many bytes are there; return whether they are."""
        if self._received < nbytes:
            with self._news:
                self._news.wait_for(lambda: self._over or self._received >= nbytes)
        return self._received >= nbytes

    def finish(self) -> bool:
        """Wait for the end; return whether everything has come."""
        with self._news:
            self._news.wait_for(lambda: self._over)
        return self.error is None

    @property
    def over(self) -> bool:
        """Whether nothing more comes."""
        return self._over
