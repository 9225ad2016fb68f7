"""An output directory that is written whole or not at all."""

from __future__ import annotations

import os
import platform
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from pact_offline.errors import InputError

RUN_FILE = "pact_offline.json"


@contextmanager
def scratch_folder() -> Iterator[Path]:
    """Yield a folder of which nothing is kept."""
    with tempfile.TemporaryDirectory() as folder:
        yield Path(folder)


@contextmanager
def output_aside(output: Path) -> Iterator[Path]:
    """Yield a folder beside `output` that takes its place when the block ends well.

    Raises:
        InputError: `output` holds something that this project did not write.
    """
    if output.exists() and (not output.is_dir() or _is_foreign(output)):
        raise InputError(
            f"{output}: expected an empty or earlier output directory, found other files"
        )
    machine = platform.node() or "here"
    aside = output.with_name(f".{output.name}.{machine}.{os.getpid()}.partial")
    for left in output.parent.glob(f".{output.name}.{machine}.*.partial"):
        if not _is_running(left.name.split(".")[-2]):
            shutil.rmtree(left, ignore_errors=True)
    try:
        aside.mkdir(parents=True)
        yield aside
        if output.exists():
            shutil.rmtree(output)
        aside.rename(output)
    except OSError as error:
        raise InputError(f"{output}: cannot be written: {error.strerror or error}") from None
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def _is_running(pid: str) -> bool:
    try:
        if os.name != "nt":  # where signal 0 is Ctrl-C
            os.kill(int(pid), 0)
    except (ProcessLookupError, ValueError):
        return False
    except OSError:
        pass
    return True


def _is_foreign(folder: Path) -> bool:
    return any(folder.iterdir()) and not (folder / RUN_FILE).is_file()
