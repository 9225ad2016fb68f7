"""What judges said is found again, whatever became of other lines of the file."""

import json
from pathlib import Path

import pytest

from pact_offline.evaluation.verdicts import KnownVerdicts


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def test_what_is_added_after_a_cut_line_is_found_again() -> None:
    known = KnownVerdicts("a-judge")
    known.add({"one": "safe"})
    with known.path.open("a") as file:
        file.write('["two", "sa')  # killed here
    KnownVerdicts("a-judge").add({"three": "safe", "four": "unsafe"})
    KnownVerdicts("a-judge").add({"two": "unsafe"})
    again = KnownVerdicts("a-judge")
    assert [again[key] for key in ("one", "two", "three", "four")] == [
        "safe", "unsafe", "safe", "unsafe",
    ]  # fmt: skip
    assert known.path.read_bytes().count(b"\n") == 5


@pytest.mark.parametrize(
    "line",
    [b"\xff\xfe", b'["two", "\xff"]', b"\0" * 64, b"[" * 5000, b"3", b"null", b'["two"]',
     b'["two", 2]', b'[["two"], "safe"]', b'{"two": 1, "three": 2}', b'"ab"', b"", b"9" * 5000],
)  # fmt: skip
def test_a_line_that_is_no_verdict_loses_no_other(line: bytes) -> None:
    known = KnownVerdicts("a-judge")
    known.path.parent.mkdir(parents=True)
    known.path.write_bytes(b'["one", "safe"]\n' + line + b'\n["last", "\\ud83d"]')
    again = KnownVerdicts("a-judge")
    assert (again["one"], again["last"]) == ("safe", "\ud83d")
    assert not {"two", "a"} & again._known.keys()
    again.add({"next": "safe"})
    assert json.loads(known.path.read_bytes().splitlines()[-1]) == ["next", "safe"]


def test_a_directory_in_its_place_is_no_cache() -> None:
    known = KnownVerdicts("a-judge")
    known.path.mkdir(parents=True)
    again = KnownVerdicts("a-judge")
    again.add({"one": "safe"})
    assert again["one"] == "safe"
