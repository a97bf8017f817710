"""What conftest.py promises: own seeds, one thread, no network."""

import random
import socket
import sys
import zlib

import pytest
import torch


def test_seed_comes_from_the_name(request: pytest.FixtureRequest) -> None:
    seed = zlib.crc32(request.node.nodeid.encode())
    assert random.random() == random.Random(seed).random()
    assert torch.initial_seed() == seed


def test_one_thread() -> None:
    assert torch.get_num_threads() == 1


def test_other_hosts_are_refused() -> None:
    with pytest.raises(RuntimeError, match="reached for the network"):
        socket.getaddrinfo("host.invalid", 80)
    with pytest.raises(RuntimeError, match="reached for the network"):
        sys.audit("socket.connect", None, ("192.0.2.1", 80))  # announced only, never opened


def test_this_machine_is_reached() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        socket.create_connection(("localhost", server.getsockname()[1]), timeout=5).close()
