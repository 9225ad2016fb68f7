"""How many CPU cores this process may keep busy, also in a container with a quota."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from pathlib import Path, PurePosixPath


def allowed_cores() -> int:
    """Cores that the system may put this process on, without regard to a quota of their time."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def usable_cores(root: Path = Path("/")) -> int:
    """Cores that this process may keep busy: those it is allowed, or its quota of their time.

    A quota is a control group's, or of one that this is in (`cpu.max`, `cpu.cfs_quota_us`), and is
    rounded up.

    Args:
        root: where `proc` and `sys` are.
    """
    return max(1, min([allowed_cores(), *map(math.ceil, _quotas(root))]))


def _quotas(root: Path) -> Iterator[float]:
    """Cores of each quota that holds for this process."""
    groups = root / "sys/fs/cgroup"
    for line in _read(root / "proc/self/cgroup").splitlines():
        _, _, rest = line.partition(":")
        controllers, _, own = rest.partition(":")
        if not controllers:  # version 2; in its own folder where both are there
            mounts = [groups, groups / "unified"]
        elif "cpu" in controllers.split(","):
            mounts = [groups / controllers, groups / "cpu"]
        else:
            continue
        for mount in mounts:
            path = PurePosixPath(own)
            for group in (path, *path.parents):  # inside a container, the last is its own
                yield from _quota(mount / str(group).lstrip("/"))


def _quota(group: Path) -> Iterator[float]:
    files = ("cpu.cfs_quota_us", "cpu.cfs_period_us")
    texts = _read(group / "cpu.max").split() or [_read(group / name).strip() for name in files]
    try:
        quota, period = map(float, texts)
    except ValueError:  # "max", or no such files
        return
    if quota > 0 and period > 0:
        yield quota / period


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, ValueError):
        return ""
