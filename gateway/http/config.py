"""How to serve. Parsed once, from the command line; nothing else is read."""

from __future__ import annotations

import ipaddress
from dataclasses import dataclass, field

from weft.gateway.http.keys import Keys
from weft.runtime.errors import ConfigError


@dataclass(frozen=True)
class Bounds:
    """What a server holds at most.

    queue: requests under way, those that wait included. share: of it, what one key may have under way, 0..1.
    body: bytes of a request, small: of one that carries no prompt. keepalive: seconds of silence in a stream
    before a comment is sent. slow: seconds that a reader may let a stream wait. drain: seconds that requests under
    way have after SIGTERM. kept: responses and runs to keep for retrieval; kept_bytes: of them and of drawn turns.
    sessions: conversations whose KV is leased between their turns; lease: seconds of that.
    """

    queue: int = 1024
    share: float = 1.0
    body: int = 32 << 20
    small: int = 64 << 10
    keepalive: float = 10.0
    slow: float = 60.0
    drain: float = 30.0
    kept: int = 4096
    kept_bytes: int = 256 << 20
    sessions: int = 16
    lease: float = 60.0

    def __post_init__(self) -> None:
        for name in ("queue", "share", "body", "small", "keepalive", "slow", "kept", "kept_bytes"):
            if getattr(self, name) <= 0:
                raise ConfigError(name, getattr(self, name), "must be positive")
        for name in ("drain", "sessions", "lease"):
            if getattr(self, name) < 0:
                raise ConfigError(name, getattr(self, name), "must not be negative")
        if self.share > 1:
            raise ConfigError("share", self.share, "must be in (0, 1]")


@dataclass(frozen=True)
class ServeConfig:
    """host: an address of this machine; one that others can reach needs keys. names: what clients call the model,
    "*" for anything. thinking: turns think unless a request says otherwise. programs, tools: as
    `module[:attribute][@tag]`."""

    host: str = "127.0.0.1"
    port: int = 30000
    names: tuple[str, ...] = ("deepseek-v4",)
    thinking: bool = False
    programs: tuple[str, ...] = ()
    keys: Keys = field(default_factory=Keys)
    bounds: Bounds = field(default_factory=Bounds)

    def __post_init__(self) -> None:
        if not 0 <= self.port < 1 << 16:
            raise ConfigError("port", self.port, "not in 0..65535")
        if not is_loopback(self.host) and not self.keys:
            raise ConfigError("host", self.host, "others can reach it: give --api-keys, or serve on 127.0.0.1")


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach the address."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:  # a name: anybody's
        return False
