"""The directory that a store lives in: on a disk, or at any fsspec URL.

Names are relative, with forward slashes, and are made by this package, never read from a file.
"""

from __future__ import annotations

import os
import shutil
import stat
import tempfile
import time
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from multiprocessing.util import Finalize
from pathlib import Path, PurePosixPath
from typing import Any, Protocol

from pact_offline.errors import DamagedError, StoreError
from pact_offline.files import read_from_disk, to_disk, written_aside

OPEN = "open"  # on a disk: folders in the making, or being removed


class Storage(Protocol):
    """What a store needs of the place it lives in. Every failure is a `StoreError`."""

    url: str

    def names(self, folder: str = "") -> list[str]:
        """Names of the entries of a folder, sorted; none where there is no such folder."""
        ...

    def has(self, name: str) -> bool:
        """Whether there is such a file."""
        ...

    def size(self, name: str) -> int:
        """Bytes of a file, or of all files in a folder."""
        ...

    def age(self, name: str) -> float:
        """Seconds since a file in a folder, or an empty folder itself, was last written."""
        ...

    def read(self, name: str, limit: int) -> bytes:
        """A file's bytes, at most `limit` of them."""
        ...

    def write(self, name: str, data: bytes) -> None:
        """Write a file, whole or not at all; it is read back and compared before it counts."""
        ...

    def commit(self, name: str, files: Mapping[str, bytes], last: str) -> None:
        """Make a folder appear; without its file `last` it does not exist.

        Every file is read back and compared before that.

        Args:
            name: of the folder.
            files: relative path to bytes.
            last: the file that is written after all others.
        """
        ...

    def remove(self, name: str, first: str) -> None:
        """Remove a folder, if it is still there; its file `first` before all others."""
        ...

    def remove_file(self, name: str) -> None:
        """Remove a file, if it is still there."""
        ...

    def local(self, folder: str, names: tuple[str, ...]) -> Path:
        """A local folder with some files of a folder: the place itself, or a copy."""
        ...

    def release(self, folder: str) -> None:
        """Drop the copy that `local` made, if it made one."""
        ...


def is_local(place: str) -> bool:
    """Whether it is a path, or a URL of one."""
    return "://" not in place or place.startswith("file://")


def open_storage(place: str | Path) -> Storage:
    """The storage at a path or an fsspec URL (`s3://...`, `memory://...`, `file://...`)."""
    text = str(place)
    return (
        LocalStorage(Path(text.removeprefix("file://"))) if is_local(text) else RemoteStorage(text)
    )


def join(place: str | Path, *parts: str) -> str:
    """A path or URL below another."""
    if "://" in str(place):
        return "/".join([str(place).rstrip("/"), *parts])
    return str(Path(place, *parts))


class LocalStorage:
    """A directory on a disk. A folder is committed by one rename."""

    def __init__(self, path: Path) -> None:
        self.path, self.url = path, str(path)

    def names(self, folder: str = "") -> list[str]:
        place = self._inside(folder)
        with _failures(place):
            return sorted(entry.name for entry in place.iterdir()) if place.is_dir() else []

    def has(self, name: str) -> bool:
        path = self._inside(name)
        with _failures(path):
            return path.is_file()

    def size(self, name: str) -> int:
        path = self._inside(name)
        with _failures(path):
            files = [path] if path.is_file() else path.rglob("*")
            return sum(file.stat().st_size for file in files if file.is_file())

    def age(self, name: str) -> float:
        path = self._inside(name)
        with _failures(path):
            times = [file.stat().st_mtime for file in (path, *path.rglob("*"))]
        return time.time() - max(times)

    def read(self, name: str, limit: int) -> bytes:
        path = self._inside(name)
        with _failures(path):
            if stat.S_ISFIFO(path.stat().st_mode):  # which would be waited on
                raise DamagedError(f"{path}: expected a file, found a pipe")
            if path.stat().st_size > limit:
                raise StoreError(f"{path}: expected at most {limit} bytes, found more")
            return path.read_bytes()

    def write(self, name: str, data: bytes) -> None:
        path = self._inside(name)
        with _failures(path), written_aside(path) as aside:
            _write_checked(aside, data, path)

    def commit(self, name: str, files: Mapping[str, bytes], last: str) -> None:
        target, folder = self._inside(name), self._inside(OPEN) / uuid.uuid4().hex
        with _failures(target):
            try:
                for file, data in files.items():
                    (folder / file).parent.mkdir(parents=True, exist_ok=True)
                    _write_checked(folder / file, data, target / file)
                for path in (*folder.rglob("*/"), folder):
                    to_disk(path)
                target.parent.mkdir(parents=True, exist_ok=True)
                folder.rename(target)
                to_disk(target.parent)
            finally:
                shutil.rmtree(folder, ignore_errors=True)

    def remove(self, name: str, first: str) -> None:
        path = self._inside(str(PurePosixPath(name).parent)) / PurePosixPath(name).name
        with _failures(path):
            if path.is_symlink():
                path.unlink()  # the link itself, not what it points to
                return
            # At once, so that nobody finds half of it, and only for one of those who try.
            aside = self._inside(OPEN) / uuid.uuid4().hex
            aside.parent.mkdir(exist_ok=True)
            with suppress(FileNotFoundError):
                path.rename(aside)
            shutil.rmtree(aside, ignore_errors=True)

    def remove_file(self, name: str) -> None:
        path = self._inside(name)
        with _failures(path):
            path.unlink(missing_ok=True)

    def local(self, folder: str, names: tuple[str, ...]) -> Path:
        for name in names:
            self._inside(f"{folder}/{name}")
        return self.path / folder

    def release(self, folder: str) -> None:
        pass

    def _inside(self, name: str) -> Path:
        path = self.path
        for part in PurePosixPath(name).parts:
            path /= part
            with _failures(path):
                is_link = path.is_symlink()
            if is_link:
                raise DamagedError(f"{path}: expected no symbolic link, found one")
        return path


class RemoteStorage:
    """Objects at an fsspec URL. A folder is committed by uploading its file `last` last.

    What is read from disk is copied first; each process has copies of its own.
    """

    def __init__(self, url: str) -> None:
        """Open the place.

        Raises:
            StoreError: no such protocol, or its package is not installed.
        """
        self.url = url.rstrip("/")
        self._open()

    def _open(self) -> None:
        from fsspec.core import url_to_fs

        with _failures(self.url):
            self._filesystem, self._root = url_to_fs(self.url, use_listings_cache=False)
        self._process, self._copies = os.getpid(), ""

    def _open_after_fork(self) -> None:
        if self._process != os.getpid():  # connections and their threads are the parent's
            self._open()

    @property
    def _fs(self) -> Any:
        self._open_after_fork()
        return self._filesystem

    def _at(self, name: str) -> str:
        return f"{self._root.rstrip('/')}/{name}" if name else self._root

    def names(self, folder: str = "") -> list[str]:
        with _failures(f"{self.url}/{folder}"):
            self._fs.invalidate_cache()
            if not self._fs.isdir(self._at(folder)):
                return []
            found = self._fs.ls(self._at(folder), detail=False)
        here = PurePosixPath(self._at(folder)).name
        names = {PurePosixPath(entry.rstrip("/")).name for entry in found}
        return sorted(names - {here, ""})

    def has(self, name: str) -> bool:
        with _failures(f"{self.url}/{name}"):
            self._fs.invalidate_cache()
            try:
                return bool(self._fs.info(self._at(name))["type"] == "file")
            except FileNotFoundError:
                return False

    def size(self, name: str) -> int:
        with _failures(f"{self.url}/{name}"):
            return int(self._fs.du(self._at(name)))

    def age(self, name: str) -> float:
        with _failures(f"{self.url}/{name}"):
            times = [self._fs.modified(file) for file in self._fs.find(self._at(name))]
        return time.time() - max((moment.timestamp() for moment in times), default=0.0)

    def read(self, name: str, limit: int) -> bytes:
        with _failures(f"{self.url}/{name}"):
            data = bytes(self._fs.cat_file(self._at(name), start=0, end=limit + 1))
        if len(data) > limit:
            raise StoreError(f"{self.url}/{name}: expected at most {limit} bytes, found more")
        return data

    def write(self, name: str, data: bytes) -> None:
        place = f"{self.url}/{name}"
        with _failures(place):
            self._fs.pipe_file(self._at(name), data)
            if bytes(self._fs.cat_file(self._at(name))) != data:
                self._fs.rm_file(self._at(name))
                raise _written_otherwise(place)

    def commit(self, name: str, files: Mapping[str, bytes], last: str) -> None:
        for file in sorted(files, key=lambda file: file == last):
            self.write(f"{name}/{file}", files[file])

    def remove(self, name: str, first: str) -> None:
        with _failures(f"{self.url}/{name}"):
            self.remove_file(f"{name}/{first}")
            with suppress(FileNotFoundError):
                self._fs.rm(self._at(name), recursive=True)

    def remove_file(self, name: str) -> None:
        if self.has(name):
            with _failures(f"{self.url}/{name}"):
                self._fs.rm_file(self._at(name))

    def local(self, folder: str, names: tuple[str, ...]) -> Path:
        with _failures(f"{self.url}/{folder}"):
            for name in names:
                path = self._copy_of(folder) / name
                if path.exists():
                    continue
                path.parent.mkdir(parents=True, exist_ok=True)
                aside = path.with_name(f".{uuid.uuid4().hex}.part")
                try:
                    self._fs.get_file(self._at(f"{folder}/{name}"), str(aside))
                    aside.replace(path)
                finally:
                    aside.unlink(missing_ok=True)
        return self._copy_of(folder)

    def release(self, folder: str) -> None:
        shutil.rmtree(self._copy_of(folder), ignore_errors=True)

    def _copy_of(self, folder: str) -> Path:
        self._open_after_fork()
        if not self._copies:
            self._copies = tempfile.mkdtemp(prefix="pact-offline-")
            # Runs when this storage or this process ends, but not in a fork of it.
            Finalize(self, shutil.rmtree, (self._copies, True), exitpriority=0)
        return Path(self._copies, folder)

    def __getstate__(self) -> dict[str, Any]:
        return {"url": self.url}

    def __setstate__(self, state: dict[str, Any]) -> None:
        RemoteStorage.__init__(self, state["url"])


def _write_checked(path: Path, data: bytes, place: Path) -> None:
    """Write a file that will be at `place`, and compare it with what the disk then has."""
    path.write_bytes(data)
    if read_from_disk(path) != data:
        raise _written_otherwise(place)


def _written_otherwise(place: object) -> StoreError:
    return StoreError(
        f"{place}: expected the bytes that were written, found others when they were read back; "
        "the disk, the network or what serves it is at fault"
    )


@contextmanager
def _failures(place: object) -> Iterator[None]:
    try:
        yield
    except StoreError:
        raise
    except (FileNotFoundError, NotADirectoryError, IsADirectoryError) as error:
        line = os.strerror(error.errno) if error.errno else "No such file or directory"
        raise DamagedError(f"{place}: cannot be used: {line}") from None
    except Exception as error:  # what a filesystem raises is its own choice
        text = getattr(error, "strerror", None) or str(error) or type(error).__name__
        line = str(text).strip().splitlines()[0]
        raise StoreError(f"{place}: cannot be used: {line}") from error
