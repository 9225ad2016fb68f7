"""Threads that take turns: one runs at a time, and a seed draws who goes on at each step.

And a place in memory for stores, whose every call is a step.
"""

import hashlib
import random
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, ClassVar

from pact_offline.errors import DamagedError, StoreError


class Killed(BaseException):
    """Ends a thread as SIGKILL ends a process: no later call of the storage is answered."""


class Schedule:
    """Runs functions as threads that change turns where `step` or `wait` is called."""

    def __init__(self, seed: int, *, seconds: float = 0.0, kills: float = 0.0) -> None:
        """Start the clock.

        Args:
            seed: draws the turns.
            seconds: that pass at each step.
            kills: share of the threads that are killed at a step of theirs.
        """
        self.draw = random.Random(seed)
        self._seconds, self._kills = seconds, kills
        self._killed_at: dict[threading.Thread, int] = {}
        self._change = self.draw.choice([1.0, 0.5, 0.2, 0.05])
        self._turns: dict[threading.Thread, Any] = {}
        self._failures: list[BaseException] = []
        self.steps = 0

    def run(self, functions: list[Callable[[], None]]) -> None:
        """Run them all to their ends; what one raises is raised here."""
        done = threading.Lock()
        done.acquire()
        for function in functions:
            turn = threading.Lock()
            turn.acquire()
            thread = threading.Thread(target=self._work, args=(function, turn, done), daemon=True)
            self._turns[thread] = turn
            if self.draw.random() < self._kills:
                self._killed_at[thread] = self.draw.randrange(200)
        threads = list(self._turns)
        for thread in threads:
            thread.start()
        self._turns[self.draw.choice(threads)].release()
        done.acquire()
        for thread in threads:
            thread.join()
        if self._failures:
            raise self._failures[0]

    def _work(self, function: Callable[[], None], turn: Any, done: Any) -> None:
        turn.acquire()
        try:
            function()
        except Killed:
            pass
        except BaseException as error:
            self._failures.append(error)
        del self._turns[threading.current_thread()]
        if self._turns:
            self.draw.choice(list(self._turns.values())).release()
        else:
            done.release()

    def step(self) -> None:
        """Perhaps let another thread go on; nothing in a thread that is not of the schedule."""
        if threading.current_thread() in self._turns:
            self.steps += 1
            if self.steps > self._killed_at.get(threading.current_thread(), self.steps):
                raise Killed
            if self.draw.random() < self._change:
                self._give(self.draw.choice(list(self._turns.values())))

    def age(self, step: int) -> float:
        """Seconds since a step."""
        return (self.steps - step) * self._seconds

    def wait(self, seconds: float) -> None:
        """Let another thread go on, as one does that sleeps."""
        self.steps += 1
        own = self._turns.get(threading.current_thread())
        others = [turn for turn in self._turns.values() if turn is not own]
        assert others or self._seconds, "waits for what nobody ends"
        if others:
            self._give(self.draw.choice(others))

    def _give(self, turn: Any) -> None:
        own = self._turns[threading.current_thread()]
        if turn is not own:
            turn.release()
            own.acquire()


class TurnStorage:
    """A `Storage` at turns://..., in a dictionary; a step before all that others could see.

    Like a disk, where a folder comes and goes at once, or like objects, file by file.
    """

    files: ClassVar[dict[str, bytes]] = {}
    times: ClassVar[dict[str, int]] = {}
    turns: ClassVar[Schedule]
    is_disk: ClassVar[bool] = True
    scratch: ClassVar[Path]

    def __init__(self, url: str) -> None:
        self.url = url
        self._root = url.partition("://")[2]

    @classmethod
    def restart(cls, files: dict[str, bytes], turns: Schedule, *, is_disk: bool) -> None:
        """Hold these files, and be seen by the threads of a schedule."""
        cls.files, cls.times, cls.turns, cls.is_disk = {**files}, {}, turns, is_disk

    def _in(self, folder: str) -> list[str]:
        start = f"{self._root}/{folder}/" if folder else f"{self._root}/"
        return [name for name in self.files if name.startswith(start)]

    def _bytes(self, name: str) -> bytes:
        self.turns.step()
        try:
            return self.files[f"{self._root}/{name}"]
        except KeyError:
            raise DamagedError(f"{self.url}/{name}: cannot be used: no such file") from None

    def _put(self, name: str, data: bytes) -> None:
        self.files[f"{self._root}/{name}"] = data
        self.times[f"{self._root}/{name}"] = self.turns.steps

    def names(self, folder: str = "") -> list[str]:
        self.turns.step()
        skip = len(f"{self._root}/{folder}/" if folder else f"{self._root}/")
        return sorted({name[skip:].split("/")[0] for name in self._in(folder)})

    def has(self, name: str) -> bool:
        self.turns.step()
        return f"{self._root}/{name}" in self.files

    def size(self, name: str) -> int:
        self.turns.step()
        every = [*self._in(name), f"{self._root}/{name}"]
        return sum(len(self.files.get(file, b"")) for file in every)

    def age(self, name: str) -> float:
        self.turns.step()
        every = [*self._in(name), f"{self._root}/{name}"]
        if not any(file in self.files for file in every):
            raise DamagedError(f"{self.url}/{name}: cannot be used: no such file")
        return self.turns.age(max(self.times.get(file, 0) for file in every))

    def read(self, name: str, limit: int) -> bytes:
        return self._bytes(name)

    def write(self, name: str, data: bytes) -> None:
        self.turns.step()
        self._put(name, data)

    def commit(self, name: str, files: Mapping[str, bytes], last: str) -> None:
        self.turns.step()
        if self.is_disk and self._in(name):
            raise StoreError(f"{self.url}/{name}: cannot be used: Directory not empty")
        for file in sorted(files, key=lambda file: file == last):
            if not self.is_disk:
                self.turns.step()
            self._put(f"{name}/{file}", files[file])

    def remove(self, name: str, first: str) -> None:
        self.turns.step()
        if not self.is_disk:
            self.files.pop(f"{self._root}/{name}/{first}", None)
            self.turns.step()
        for file in self._in(name):
            if not self.is_disk:
                self.turns.step()
            self.files.pop(file, None)

    def remove_file(self, name: str) -> None:
        self.turns.step()
        self.files.pop(f"{self._root}/{name}", None)

    def local(self, folder: str, names: tuple[str, ...]) -> Path:
        found = {name: self._bytes(f"{folder}/{name}") for name in names}
        copy = self.scratch / hashlib.sha256(repr(found).encode()).hexdigest()
        for name, data in found.items():
            if not (copy / name).exists():
                (copy / name).parent.mkdir(parents=True, exist_ok=True)
                (copy / name).write_bytes(data)
        return copy

    def release(self, folder: str) -> None: ...
