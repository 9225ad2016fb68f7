"""Ending with another process, such as the workflow that started this one."""

from __future__ import annotations

import os
import signal
import threading
import time
from pathlib import Path

from pact_offline.errors import SettingError

VARIABLE = "PACT_OFFLINE_ENDS_WITH"
_LOOK_SECONDS = 1.0
_GRACE_SECONDS = 30.0


def end_with_another() -> None:
    """Where PACT_OFFLINE_ENDS_WITH names a process, end this one, as SIGTERM does, soon after it.

    Raises:
        SettingError: it names none.
    """
    text = os.environ.get(VARIABLE)
    if not text or os.name == "nt":
        return
    if not (text.isascii() and text.isdigit() and 0 < int(text[:20]) < 2**31):
        raise SettingError(f"{VARIABLE}: expected the number of a process, found {text!r:.40}")
    pid = int(text)
    started = _start_of(pid)

    def watch() -> None:
        while started is not None and _start_of(pid) == started:
            time.sleep(_LOOK_SECONDS)
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(_GRACE_SECONDS)
        os._exit(128 + signal.SIGTERM)

    threading.Thread(target=watch, daemon=True, name="ends-with").start()


def _start_of(pid: int) -> str | None:
    """When a process started, to tell it from a later one of its number; None where it is gone."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return None
    except PermissionError:
        pass
    try:
        text = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return "unknown" if not Path("/proc/self").exists() else None
    state, *fields = text.rpartition(")")[2].split()
    return None if state in "ZX" else fields[18]
