"""Outputs are whole or absent, whenever the job that writes them is killed."""

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from pact_offline.errors import InputError
from pact_offline.folders import output_aside, require_place

MARK = "done.json"

# Version after version of an output of two files, until killed: at random, or right before the
# N-th rename of a version.
WRITER = """
import os, signal, sys
from pathlib import Path
from pact_offline.folders import output_aside
output, kill_at = Path(sys.argv[1]), int(sys.argv[2])
renames, rename = [], Path.rename
def counted(self, target):
    renames.append(target)
    if len(renames) == kill_at:
        os.kill(os.getpid(), signal.SIGKILL)
    return rename(self, target)
if kill_at:
    Path.rename = counted
version = 0
while not kill_at or version == 0:
    version += 1
    with output_aside(output, "done.json") as aside:
        (aside / "answers").write_text(str(version) * 5000)
        (aside / "done.json").write_text(str(version) * 5000)
    print(version, flush=True)
"""


def write(output: Path, text: str) -> None:
    with output_aside(output, MARK) as aside:
        (aside / "answers").write_text(text)
        (aside / MARK).write_text(text)


def versions(output: Path) -> set[str]:
    return {path.read_text() for path in output.iterdir()}


def writer(output: Path, kill_at: int = 0) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", WRITER, str(output), str(kill_at)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True)


@pytest.mark.parametrize("kill_at", [1, 2, 3])
def test_an_output_killed_between_its_renames_is_the_old_or_the_new_one_whole(
    tmp_path: Path, kill_at: int
) -> None:
    output = tmp_path / "out[1]"  # no pattern
    write(output, "old")
    process = writer(output, kill_at)
    assert process.wait() == -signal.SIGKILL
    assert output.exists() == (kill_at != 2)
    with pytest.raises(KeyboardInterrupt), output_aside(output, MARK):
        raise KeyboardInterrupt  # the next job puts it back, and ends as well
    assert versions(output) == {"old" if kill_at < 3 else "1" * 5000}
    assert [path.name for path in tmp_path.iterdir()] == [output.name]


def test_an_output_killed_at_any_time_is_whole(tmp_path: Path) -> None:
    output, draw = tmp_path / "out", random.Random(7)
    write(output, "old")
    for _ in range(6):
        process = writer(output)
        assert process.stdout is not None
        process.stdout.readline()
        time.sleep(draw.random() * 0.03)
        process.kill()
        process.communicate()
        assert not output.exists() or len(versions(output)) == 1
        with pytest.raises(KeyboardInterrupt), output_aside(output, MARK):
            raise KeyboardInterrupt
        assert len(versions(output)) == 1
        assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_two_jobs_that_write_one_output_both_end_well(tmp_path: Path) -> None:
    output = tmp_path / "out"
    processes = [writer(output) for _ in range(2)]
    for process in processes:
        assert process.stdout is not None
        assert process.stdout.readline() == "1\n"
    time.sleep(0.5)
    for process in processes:
        assert process.poll() is None
        process.kill()
        process.communicate()
    write(output, "new")
    assert versions(output) == {"new"}


def test_an_error_leaves_the_old_output_as_it_was(tmp_path: Path) -> None:
    write(tmp_path / "out", "old")
    with pytest.raises(RuntimeError), output_aside(tmp_path / "out", MARK) as aside:
        (aside / MARK).write_text("new")
        raise RuntimeError
    assert versions(tmp_path / "out") == {"old"}
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_an_output_that_is_a_link_is_replaced_where_it_points(tmp_path: Path) -> None:
    write(tmp_path / "real", "old")
    (tmp_path / "link").symlink_to("real")
    write(tmp_path / "link", "new")
    assert versions(tmp_path / "real") == {"new"}
    assert (tmp_path / "link").is_symlink()


def test_places_that_no_output_can_take_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    here = tmp_path / "here" / "below"
    here.mkdir(parents=True)
    monkeypatch.chdir(here)
    (tmp_path / "file").write_text("")
    (tmp_path / "foreign").mkdir()
    (tmp_path / "foreign" / "thesis.txt").write_text("mine")
    (tmp_path / "loop").symlink_to("loop")
    places = [Path(), Path("/"), Path(".."), here, here.parent, tmp_path / "file"]
    places += [tmp_path / "file" / "x", tmp_path / "foreign", tmp_path / "loop", Path("x" * 300)]
    for place in places:
        with pytest.raises(InputError):
            require_place(place, MARK)
    assert require_place(Path("new")) == Path(os.path.realpath("new"))
    assert (tmp_path / "foreign" / "thesis.txt").read_text() == "mine"


def test_what_cannot_take_its_place_is_kept_beside_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise OSError(28, "No space left on device")

    for number in ("", "1"):
        with monkeypatch.context() as patch, pytest.raises(InputError) as raised:
            patch.setattr("pact_offline.folders._put_in_place", fail)
            with output_aside(tmp_path / "out") as aside:
                (aside / "weights").write_text("dear")
        kept = tmp_path / f"out.unsaved{number}"
        assert str(raised.value) == (
            f"{tmp_path / 'out'}: cannot be saved: No space left on device; what there is of it is "
            f"in {kept}"
        )
        assert (kept / "weights").read_text() == "dear"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out.unsaved", "out.unsaved1"]
