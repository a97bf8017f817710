"""Every example of docs/http.md does what it says, and every endpoint has one."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest

from support.gateway import Gateway
from support.tree import ROOT

TEXT = (ROOT / "docs" / "http.md").read_text()
BLOCKS = re.findall(r"```bash\n(.*?)```", TEXT, re.DOTALL)
REFUSED = {"/concate_and_append_request"}


@pytest.mark.parametrize("number", range(len(BLOCKS)))
def test_examples(gateway: Gateway, tmp_path: Path, number: int) -> None:
    script = f"set -euo pipefail\nURL={gateway.url}\n{BLOCKS[number]}"
    done = subprocess.run(["bash", "-c", script], capture_output=True, text=True, timeout=60, cwd=tmp_path)
    assert done.returncode == 0, (done.stdout[-2000:], done.stderr)
    assert done.stdout


def test_every_endpoint_has_one(gateway: Gateway) -> None:
    shown = "".join(BLOCKS)
    for route in gateway.state.routes:
        if route.path in REFUSED:
            assert route.path in TEXT
            continue
        pattern = re.sub(r"\\{[^}]*\\}", r"[^/ \"'?]+", re.escape(re.sub(r":\[[^]]*\]\+", "", route.path)))
        assert re.search(rf"\$URL{pattern}[\s?\"]", shown), route.path
