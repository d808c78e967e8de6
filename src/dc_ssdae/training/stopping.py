"""Being asked to stop: SIGTERM of a cluster, SIGINT of Ctrl-C, SIGHUP of a terminal that is closed."""

import signal
import threading
from types import FrameType, TracebackType
from typing import Any

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
PATIENCE = 3
"""So many SIGINTs interrupt at once; two may be one wish, because launchers pass on what the terminal has sent too."""


class Stopped(Exception):
    """Some process was asked to end the run."""


class StopRequest:
    """While entered, SIGTERM, SIGINT and SIGHUP only set `name`, until the third SIGINT.

    A signal that is ignored, as SIGHUP under nohup, stays so. Outside the main thread, where Python cannot handle
    signals, this does nothing. Of two, one within the other, each hears of the other's wish.
    """

    def __init__(self) -> None:
        self.name: str | None = None
        self._interrupts = 0
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> "StopRequest":
        if threading.current_thread() is threading.main_thread():
            for number in SIGNALS:
                handler = signal.getsignal(number)
                if handler == signal.SIG_IGN:
                    continue
                self._previous[number] = signal.signal(number, self._note)
                outer = getattr(handler, "__self__", None)
                if isinstance(outer, StopRequest):
                    self.name = outer.name
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
