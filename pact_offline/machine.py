"""What this machine gives a process: cores, a dtype to compute in, memory. Loads no torch."""

from __future__ import annotations

import math
import os
import platform
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path, PurePosixPath
from typing import Literal

_ACCELERATORS = ("/dev/nvidia0", "/dev/kfd", "/dev/dxg")
# oneDNN's bfloat16 kernels need one of these; without them products are far slower than in float32.
_CPU_FLAGS = {"avx512bw", "amx_bf16", "bf16", "svebf16"}


@cache
def default_dtype(cpuinfo: Path = Path("/proc/cpuinfo")) -> Literal["bfloat16", "float32"]:
    """bfloat16 where an accelerator or the CPU computes in it, else float32."""
    if platform.system() != "Linux" or any(map(os.path.exists, _ACCELERATORS)):
        return "bfloat16"
    try:
        lines = cpuinfo.read_text(encoding="ascii", errors="replace").splitlines()
    except OSError:
        return "bfloat16"
    flags = next((line for line in lines if line.lower().startswith(("flags", "features"))), "")
    return "bfloat16" if _CPU_FLAGS & set(flags.split()) else "float32"


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


def peak_resident_mib() -> float:
    """Largest resident size of this process so far, MiB; 0 where Python cannot tell (Windows)."""
    try:
        import resource
    except ImportError:
        return 0.0
    unit = 1 if sys.platform == "darwin" else 2**10  # macOS counts bytes, Linux KiB
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**20
