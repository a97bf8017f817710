"""`weft kernels`: every op, what runs it for an architecture, and why a library does not."""

from __future__ import annotations

import pytest

from weft.gateway.cli import main
from weft.kernels.gpu.base import GLUON
from weft.kernels.gpu.ops import OPS


@pytest.mark.parametrize("arch", ["cpu", "sm90", "sm100"])
def test_every_op_is_listed_with_its_choice(
    arch: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "300")
    assert main(["kernels", "--arch", arch]) == 0
    lines = capsys.readouterr().out.splitlines()
    for op in OPS:
        for example in op.examples:
            choice = example.choose(arch, frozenset({"triton", GLUON}))  # type: ignore[arg-type]
            line = next(line for line in lines if example.label in line and choice.op in line)
            assert choice.implementation in line and choice.why in line
    assert any(line.startswith("flash_mla: ") for line in lines)


def test_an_unknown_architecture_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["kernels", "--arch", "sm70"])
    assert "sm70" in capsys.readouterr().err
