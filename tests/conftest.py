"""Every test runs on one thread, from its own seed, and with no network but this machine.

Helpers shared by tests live in `tests/support/` and are imported as `support.<module>`: pytest puts
`tests/` on sys.path (`pythonpath` in pyproject.toml), and support is the only package in it. Test
folders have no `__init__.py`, so two of them may hold files of one name.
"""

import os
import random
import socket
import sys
import zlib
from ipaddress import ip_address

import numpy as np
import pytest
import torch
from hypothesis import settings

torch.set_num_threads(1)  # workers share two cores

# Triton reads this when a kernel is defined, so it stands before any is imported.
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"

# The examples of a test depend on it alone, and a busy machine is no failure.
settings.register_profile("weft", derandomize=True, deadline=None)
settings.load_profile("weft")


@pytest.hookimpl(tryfirst=True)  # before fixtures of any scope draw random numbers
def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("gpu") and not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    seed = zlib.crc32(item.nodeid.encode())
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)


def _refuse_network(event: str, args: tuple) -> None:
    if event == "socket.connect" and isinstance(args[1], tuple):
        host = args[1][0]
    elif event == "socket.getaddrinfo":
        host = args[0]
    else:
        return
    if not _is_local(host):
        raise RuntimeError(f"a test reached for the network: {host}")


def _is_local(host: str | bytes | None) -> bool:
    name = host.decode() if isinstance(host, bytes) else host
    if not name or name in ("localhost", socket.gethostname()):
        return True
    try:
        address = ip_address(name)
    except ValueError:
        return False
    return address.is_loopback or address.is_unspecified


sys.addaudithook(_refuse_network)
