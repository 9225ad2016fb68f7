"""What a machine computes in is told from what it says of itself."""

from pathlib import Path

import pytest

from pact_offline import machine
from pact_offline.settings.stages import FinetuneSettings, ScoreSettings


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        ("flags\t\t: fpu sse2 avx2 f16c fma", "float32"),
        ("flags\t\t: fpu avx2 avx512f avx512bw", "bfloat16"),
        ("flags\t\t: avx2 amx_bf16", "bfloat16"),
        ("Features\t: fp asimd bf16", "bfloat16"),
        ("Features\t: fp asimd", "float32"),
        ("", "float32"),
    ],
)
def test_the_default_dtype_is_one_that_the_cpu_has_products_for(
    flags: str, expected: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(machine, "_ACCELERATORS", ())
    monkeypatch.setattr(machine.platform, "system", lambda: "Linux")
    (tmp_path / "cpuinfo").write_text(f"processor\t: 0\n{flags}\n")
    assert machine.default_dtype(tmp_path / "cpuinfo") == expected


def test_an_accelerator_computes_in_bfloat16(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(machine, "_ACCELERATORS", (str(tmp_path),))
    assert machine.default_dtype(tmp_path / "none") == "bfloat16"


def test_stages_take_the_machines_dtype_unless_told_otherwise() -> None:
    assert ScoreSettings().dtype == FinetuneSettings().dtype == machine.default_dtype()
    assert ScoreSettings(dtype="float16").dtype == "float16"
