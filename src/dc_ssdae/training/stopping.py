"""Being asked to stop: SIGTERM of a cluster, SIGINT of Ctrl-C, SIGHUP of a terminal that is closed."""

import signal
import threading
from types import FrameType
from typing import Any

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
PATIENCE = 3
"""So many SIGINTs interrupt at once; two may be one wish, because launchers pass on what the terminal has sent too."""


class Stopped(Exception):
    """Some process was asked to end the run."""


class StopRequest:
    """While entered, SIGTERM, SIGINT and SIGHUP only set `name`, until the third SIGINT.

    A signal that is ignored, as SIGHUP under nohup, stays so. Outside the main thread, where Python cannot handle
    signals, this does nothing. Entered within another one, it gives that one.
    """

    def __init__(self) -> None:
        self.name: str | None = None
        self._interrupts = 0
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> "StopRequest":
        for number in SIGNALS:
            handler = signal.getsignal(number)
            outer = getattr(handler, "__self__", None)
            if isinstance(outer, StopRequest):
                return outer
            if handler != signal.SIG_IGN and threading.current_thread() is threading.main_thread():
                self._previous[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *error: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.name = signal.Signals(number).name
        self._interrupts += number == signal.SIGINT
        if self._interrupts >= PATIENCE:
            raise KeyboardInterrupt
