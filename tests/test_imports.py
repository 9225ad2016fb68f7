"""The package's rooms and which may know which (design: imports go one way)."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "pact_offline"


def imports(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found.add(node.module)
    return found


def modules(folder: str) -> list[Path]:
    place = PACKAGE / folder
    return sorted(place.rglob("*.py")) if place.is_dir() else [place.with_suffix(".py")]


@pytest.mark.parametrize(
    ("room", "forbidden"),
    [
        ("errors", ["pact_offline"]),
        ("config", ["pact_offline.cache", "pact_offline.scoring", "pact_offline.training"]),
        ("objectives", ["pact_offline.cache", "pact_offline.scoring", "pact_offline.training"]),
        ("cache", ["pact_offline.scoring", "pact_offline.training", "torch", "transformers"]),
        ("scoring", ["pact_offline.training", "pact_offline.evaluation", "pact_offline.report"]),
        ("training", ["pact_offline.scoring", "pact_offline.evaluation", "pact_offline.report"]),
        ("evaluation", ["pact_offline.scoring", "pact_offline.training", "pact_offline.report"]),
    ],
)
def test_rooms_know_only_what_is_below_them(room: str, forbidden: list[str]) -> None:
    for path in modules(room):
        for name in imports(path):
            for other in forbidden:
                assert name != other, f"{path} imports {name}"
                assert not name.startswith(f"{other}."), f"{path} imports {name}"


@pytest.mark.parametrize(
    ("library", "homes"),
    [
        (
            "vllm",
            {
                "bench/score.py",  # what vLLM does on its own
                "scoring/vllm.py",
                "scoring/vllm_model.py",
                "scoring/vllm_plugin.py",
            },
        ),
        ("zarr", {"cache/shard.py"}),
        ("pyarrow", {"cache/shard.py"}),
        ("fsspec", {"cache/storage.py"}),
        ("pickle", set()),
    ],
)
def test_a_library_is_imported_in_its_home_only(library: str, homes: set[str]) -> None:
    found = {
        path.relative_to(PACKAGE).as_posix()
        for path in PACKAGE.rglob("*.py")
        if any(name == library or name.startswith(f"{library}.") for name in imports(path))
    }
    assert found == homes


def test_the_command_line_starts_without_heavy_libraries() -> None:
    code = (
        "import sys, pact_offline.cli; print({'torch', 'vllm', 'transformers'} & set(sys.modules))"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "set()"
