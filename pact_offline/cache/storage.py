"""The directory that a store lives in: on a disk, or at any fsspec URL.

Names are relative, with forward slashes, and are made by this package, never read from a file.
"""

from __future__ import annotations

import shutil
import stat
import tempfile
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import Any, Protocol

from pact_offline.errors import DamagedError, StoreError
from pact_offline.files import to_disk, written_aside


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
        """Write a file, whole or not at all."""
        ...

    def aside(self) -> Path:
        """An empty local folder in which a folder can be made ready for `commit`."""
        ...

    def commit(self, folder: Path, name: str, last: str) -> None:
        """Make a local folder appear under `name`; without its file `last` it does not exist."""
        ...

    def remove(self, name: str, first: str) -> None:
        """Remove a folder, its file `first` before all others."""
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


def open_storage(place: str | Path) -> Storage:
    """The storage at a path or an fsspec URL (`s3://...`, `memory://...`, `file://...`)."""
    text = str(place)
    if "://" not in text:
        return LocalStorage(Path(text))
    if text.startswith("file://"):
        return LocalStorage(Path(text.removeprefix("file://")))
    return RemoteStorage(text)


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
        return self._inside(name).is_file()

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
            aside.write_bytes(data)

    def aside(self) -> Path:
        folder = self._inside("open") / uuid.uuid4().hex
        with _failures(self.path):
            folder.mkdir(parents=True)
        return folder

    def commit(self, folder: Path, name: str, last: str) -> None:
        target = self._inside(name)
        with _failures(target):
            for path in (*folder.rglob("*"), folder):
                to_disk(path)
            target.parent.mkdir(parents=True, exist_ok=True)
            folder.rename(target)
            to_disk(target.parent)

    def remove(self, name: str, first: str) -> None:
        path = self._inside(str(PurePosixPath(name).parent)) / PurePosixPath(name).name
        with _failures(path):
            if path.is_symlink():
                path.unlink()  # the link itself, not what it points to
                return
            (path / first).unlink(missing_ok=True)
            shutil.rmtree(path)

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
            if path.is_symlink():
                raise DamagedError(f"{path}: expected no symbolic link, found one")
        return path


class RemoteStorage:
    """Objects at an fsspec URL. A folder is committed by uploading its file `last` last."""

    def __init__(self, url: str) -> None:
        """Open the place.

        Raises:
            StoreError: no such protocol, or its package is not installed.
        """
        from fsspec.core import url_to_fs

        self.url = url.rstrip("/")
        with _failures(self.url):
            self._fs, self._root = url_to_fs(self.url, use_listings_cache=False)
        self._copies: dict[str, tempfile.TemporaryDirectory[str]] = {}

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
            return bool(self._fs.isfile(self._at(name)))

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
        with _failures(f"{self.url}/{name}"):
            self._fs.pipe_file(self._at(name), data)

    def aside(self) -> Path:
        return Path(tempfile.mkdtemp(prefix="pact-offline-"))

    def commit(self, folder: Path, name: str, last: str) -> None:
        files = [path.relative_to(folder).as_posix() for path in folder.rglob("*")]
        files = [file for file in sorted(files) if (folder / file).is_file()]
        with _failures(f"{self.url}/{name}"):
            for file in sorted(files, key=lambda file: file == last):
                self._fs.pipe_file(self._at(f"{name}/{file}"), (folder / file).read_bytes())
        shutil.rmtree(folder)

    def remove(self, name: str, first: str) -> None:
        with _failures(f"{self.url}/{name}"):
            self.remove_file(f"{name}/{first}")
            if self._fs.exists(self._at(name)):
                self._fs.rm(self._at(name), recursive=True)

    def remove_file(self, name: str) -> None:
        if self.has(name):
            with _failures(f"{self.url}/{name}"):
                self._fs.rm_file(self._at(name))

    def local(self, folder: str, names: tuple[str, ...]) -> Path:
        copy = self._copies.setdefault(folder, tempfile.TemporaryDirectory(prefix="pact-offline-"))
        with _failures(f"{self.url}/{folder}"):
            for name in names:
                path = Path(copy.name, name)
                if not path.exists():
                    path.parent.mkdir(parents=True, exist_ok=True)
                    self._fs.get_file(self._at(f"{folder}/{name}"), str(path))
        return Path(copy.name)

    def release(self, folder: str) -> None:
        if copy := self._copies.pop(folder, None):
            copy.cleanup()

    def __getstate__(self) -> dict[str, Any]:
        return {"url": self.url}

    def __setstate__(self, state: dict[str, Any]) -> None:
        RemoteStorage.__init__(self, state["url"])


@contextmanager
def _failures(place: object) -> Iterator[None]:
    try:
        yield
    except StoreError:
        raise
    except FileNotFoundError:
        raise DamagedError(f"{place}: cannot be used: No such file or directory") from None
    except Exception as error:  # what a filesystem raises is its own choice
        text = getattr(error, "strerror", None) or str(error) or type(error).__name__
        line = str(text).strip().splitlines()[0]
        raise StoreError(f"{place}: cannot be used: {line}") from error
