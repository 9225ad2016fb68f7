"""How much memory this process takes."""

from __future__ import annotations

import sys


def peak_resident_mib() -> float:
    """Largest resident size of this process so far, MiB; 0 where Python cannot tell (Windows)."""
    try:
        import resource
    except ImportError:
        return 0.0
    unit = 1 if sys.platform == "darwin" else 2**10  # macOS counts bytes, Linux KiB
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**20
