"""docs/programs.md runs as it stands."""

from __future__ import annotations

from typing import Any

from support.programs import guarded
from support.tree import ROOT


def test_the_guide_runs() -> None:
    text = (ROOT / "docs" / "programs.md").read_text()
    blocks = [part.split("```")[0] for part in text.split("```python\n")[1:]]
    assert len(blocks) == 7
    names: dict[str, Any] = {"__name__": "guide"}

    def work() -> None:
        for block in blocks:
            exec(compile(block, "programs.md", "exec"), names)

    guarded(work)
