"""A link to a core's process ends in order, whatever its process does."""

from __future__ import annotations

import os
import signal
import threading
import time
from multiprocessing.connection import Connection

import pytest

from support.engine import wait_for
from weft.runtime.engine import link as module
from weft.runtime.engine import messages as m
from weft.runtime.engine.link import ProcessLink
from weft.runtime.errors import EngineDead


class Child:
    """Takes messages until it is told to stop, once it has loaded."""

    def __init__(self, load: float = 0.0) -> None:
        self.load = load

    def __call__(self, pipe: Connection) -> None:
        time.sleep(self.load)
        while b"Stop" not in pipe.recv_bytes():
            pass


def link_to(child: Child, deaths: list[tuple[EngineDead, bool]]) -> ProcessLink:
    return ProcessLink(child, lambda event: None, lambda reason, final: deaths.append((reason, final)), restarts=3)


def test_a_process_that_cannot_be_replaced_is_a_final_death(monkeypatch: pytest.MonkeyPatch) -> None:
    deaths: list[tuple[EngineDead, bool]] = []
    link = link_to(Child(), deaths)

    def no_more_files() -> None:
        raise OSError(24, "Too many open files")

    monkeypatch.setattr(link, "_spawn", no_more_files)
    os.kill(link.process.pid or 0, signal.SIGKILL)
    wait_for(lambda: bool(deaths) and deaths[-1][1])
    assert [final for _, final in deaths] == [False, True]
    assert "Too many open files" in str(deaths[-1][0])
    link.close()


@pytest.mark.parametrize("load", [0.0, 60.0])
def test_a_stuck_or_loading_process_does_not_keep_a_link_open(
    load: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_GRACE", 0.2)
    link = link_to(Child(load), [])
    os.kill(link.process.pid or 0, signal.SIGSTOP)
    closing = threading.Thread(target=link.close, daemon=True)
    closing.start()
    closing.join(20)
    assert not closing.is_alive()
    assert not link.process.is_alive()


def test_a_message_for_a_core_that_has_gone_is_no_error() -> None:
    link = link_to(Child(), [])
    link.close()
    link.send(m.Cancel(1))
