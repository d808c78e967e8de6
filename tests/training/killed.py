"""Ending a process, or failing a file operation, at any of the operations that a piece of work does."""

import errno
import os
import re
import sys
from collections.abc import Callable
from typing import Any

EVENTS = re.compile(r"open|os\.(chmod|link|mkdir|remove|rename|rmdir|symlink|truncate)|shutil\.copyfile")
"""What CPython's audit hooks tell of changes to files; a rename that replaces is os.rename too."""

KILLED, FAILED, CRASHED = 70, 71, 72


def run_in_child(work: Callable[[], object], stop_at: int, fail: bool = False, since: str = "") -> int:
    """Do some work in a forked process that ends just before one of its file operations.

    Args:
        work: what to do.
        stop_at: the operation, counted from 0, which is the first one that matches `since`.
        fail: raise "no space left on device" there instead.
        since: pattern of an event and its first argument, as "os.mkdir /a/folder".

    Returns:
        0 where the work was done before, KILLED, FAILED where it raised OSError, CRASHED where it raised another.
    """
    child = os.fork()
    if child == 0:
        code = CRASHED
        try:
            seen = 0

            def hook(event: str, arguments: tuple[Any, ...]) -> None:
                nonlocal seen
                if not EVENTS.fullmatch(event) or not (seen or re.match(since, f"{event} {arguments[0]}")):
                    return
                seen += 1
                if seen == stop_at + 1:
                    if not fail:
                        os._exit(KILLED)
                    raise OSError(errno.ENOSPC, "No space left on device")

            sys.addaudithook(hook)
            try:
                work()
                code = 0
            except OSError:
                code = FAILED
        finally:
            os._exit(code)
    _, status = os.waitpid(child, 0)
    return os.waitstatus_to_exitcode(status)
