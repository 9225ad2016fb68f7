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


# Each layer's rooms may import those of the layers above, and nothing else of the package.
LAYERS = [
    ["arrow", "errors", "machine", "progress", "provenance", "texts"],
    ["files"],
    ["own_code"],
    ["folders", "settings", "models"],
    ["rows", "objectives", "fine_tuned"],
    ["made_from", "references"],
    ["safety_tokens"],
    ["cache"],
    ["scoring", "training", "evaluation"],
    ["report", "bench", "demo"],
    ["cli"],
    ["__main__"],
]


def room(module: str) -> str:
    return module.partition(".")[2].partition(".")[0]


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("*.py")), ids=lambda path: path.stem)
def test_rooms_know_only_what_is_below_them(path: Path) -> None:
    own = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
    if own == "__init__":
        return
    (layer,) = [number for number, rooms in enumerate(LAYERS) if own in rooms]
    below = {name for rooms in LAYERS[:layer] for name in rooms} | {own, ""}
    for name in imports(path):
        if name.split(".")[0] == "pact_offline":
            assert room(name) in below, f"{path} imports {name}"


def test_no_module_of_the_cache_needs_torch() -> None:
    for path in (PACKAGE / "cache").rglob("*.py"):
        assert not {"torch", "transformers"} & {name.split(".")[0] for name in imports(path)}


@pytest.mark.parametrize(
    ("library", "homes"),
    [
        (
            "vllm",
            {
                "bench/score.py",  # what vLLM does on its own
                "models/vllm_answers.py",
                "models/vllm_engine.py",
                "scoring/vllm.py",
                "scoring/vllm_model.py",
                "scoring/vllm_plugin.py",
                "scoring/vllm_ways.py",
            },
        ),
        ("zarr", {"cache/shard.py"}),
        (
            "pyarrow",
            {
                "arrow.py",
                "cache/format.py",
                "cache/plain_arrow.py",
                "cache/row_keys.py",
                "cache/shard.py",
                "cache/store.py",
                "cache/targets.py",
                "rows/files.py",
                "rows/subset.py",
                "rows/tokenized.py",
                "rows/tokenizing.py",
                "scoring/dataset.py",
                "scoring/fill.py",
            },
        ),
        ("fsspec", {"cache/storage.py"}),
        ("lm_eval", {"evaluation/lm_eval_tasks.py"}),
        ("rouge_score", {"evaluation/task_scores.py"}),
        ("matplotlib", {"report/drawing.py"}),
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
        "import sys, pact_offline.cli; "
        "print({'torch', 'vllm', 'transformers', 'matplotlib'} & set(sys.modules))"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "set()"
