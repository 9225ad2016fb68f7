"""What this machine computes in, told without loading torch."""

from __future__ import annotations

import os
import platform
from functools import cache
from pathlib import Path
from typing import Literal

_ACCELERATORS = ("/dev/nvidia0", "/dev/kfd", "/dev/dxg")
# oneDNN's bfloat16 kernels need one of these; without them a product takes a hundred times longer.
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
