"""Being asked to stop: SIGTERM of a cluster that wants its machine back, SIGINT of Ctrl-C."""

import signal
import threading
from types import FrameType, TracebackType
from typing import Any

SIGNALS = (signal.SIGTERM, signal.SIGINT)
PATIENCE = 3
"""So many SIGINTs interrupt at once; two may be one wish, because launchers pass on what the terminal has sent too."""


class StopRequest:
    """While entered, SIGTERM and SIGINT only set `name`, until the third SIGINT.

    Outside the main thread, where Python cannot handle signals, it does nothing. Of two, one within the other, the
    outer one hears of the wish when the inner one is left.
    """

    def __init__(self) -> None:
        self.name: str | None = None
        self._interrupts = 0
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> "StopRequest":
        if threading.current_thread() is threading.main_thread():
            self._previous = {number: signal.signal(number, self._note) for number in SIGNALS}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)
            outer = getattr(handler, "__self__", None)
            if self.name is not None and isinstance(outer, StopRequest):
                outer.name = self.name
        self._previous = {}

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.name = signal.Signals(number).name
        self._interrupts += number == signal.SIGINT
        if self._interrupts >= PATIENCE:
            raise KeyboardInterrupt
