"""Some of the inputs of `tests/fuzz.py`; `python tests/fuzz.py` runs thousands."""

from pathlib import Path

import fuzz
import pytest


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("made")
    fuzz.make_inputs(folder)
    return folder


def test_odd_input_is_taken_or_refused_in_one_line(made: Path, tmp_path: Path) -> None:
    tally = fuzz.run(200, 7, made, tmp_path / "scratch")
    assert not tally.findings, tally.findings[0]
    assert tally.counts.keys() == fuzz.COMMANDS.keys()
    for kind in ("taken", "refused"):
        assert sum(counts[kind] for counts in tally.counts.values()) > 20


def test_every_command_is_fuzzed_from_input_that_it_takes(made: Path, tmp_path: Path) -> None:
    fuzzed = {" ".join(w for w in name.split() if w[0] != "-") for name in fuzz.COMMANDS}
    assert fuzzed == {" ".join(words) for words in fuzz.all_commands()}
    fuzz.copy_inputs(made, tmp_path / "scratch")
    with fuzz.no_work(), fuzz.inside(tmp_path / "scratch"):
        for name, arguments in fuzz.COMMANDS.items():
            kind, found = fuzz.outcome(fuzz.Case(name, arguments.split()), verbose=False)
            assert kind == "taken", (name, found)
