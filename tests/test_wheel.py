"""What `pip install` gives: a wheel with everything that the package reads."""

import os
import shutil
import subprocess
import sys
import zipfile
from configparser import ConfigParser
from pathlib import Path

import pytest
from conftest import ROOT

BUILD = "import sys; from setuptools import build_meta; build_meta.build_wheel(sys.argv[1])"


@pytest.fixture(scope="module")
def unpacked(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A wheel built from a copy of the source, unpacked."""
    source, folder = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheel")
    shutil.copytree(
        ROOT / "pact_offline", source / "pact_offline", ignore=shutil.ignore_patterns("__pycache__")
    )
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    built = subprocess.run(
        [sys.executable, "-c", BUILD, str(folder)],
        cwd=source,
        capture_output=True,
        text=True,
        check=False,
    )
    assert built.returncode == 0, built.stderr
    (wheel,) = folder.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder / "unpacked")
    return folder / "unpacked"


def test_the_wheel_holds_every_file_of_the_package(unpacked: Path) -> None:
    own = {
        path.relative_to(ROOT).as_posix()
        for path in (ROOT / "pact_offline").rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    held = {path.relative_to(unpacked).as_posix() for path in unpacked.rglob("*")}
    assert {"pact_offline/py.typed", "pact_offline/report/report.html"} <= own
    assert not own - held
    assert not [name for name in held - own if name.startswith("tests")]


def test_the_wheel_names_its_command_and_plugin(unpacked: Path) -> None:
    (file,) = unpacked.glob("*.dist-info/entry_points.txt")
    points = ConfigParser()
    points.read(file)
    assert points["console_scripts"]["pact-offline"] == "pact_offline.cli:main"
    assert points["vllm.general_plugins"]["pact_offline"].startswith("pact_offline.scoring.")


def test_the_command_line_runs_from_the_wheel(unpacked: Path, tmp_path: Path) -> None:
    code = "import pact_offline.cli as c; print(c.__file__, flush=True); c.main()"
    ran = subprocess.run(
        [sys.executable, "-c", code, "--version"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(unpacked)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert ran.returncode == 0, ran.stderr
    assert Path(ran.stdout.splitlines()[0]).is_relative_to(unpacked)
