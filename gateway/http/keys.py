"""API keys. A file has a line `name role hash` for each; the key itself is shown once, when it is made.

Keys are random, 256 bits: a plain SHA-256 of one cannot be turned back, and takes a microsecond a request.
"""

from __future__ import annotations

import hashlib
import hmac
import re
import secrets
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from weft.runtime.errors import ConfigError

Role = Literal["user", "admin"]
_PREFIX = "weft-"
_NAME = re.compile(r"[A-Za-z0-9._-]{1,64}")


@dataclass(frozen=True)
class Caller:
    """Who asks. namespace: of the KV that it can find and be found by. key: its name; empty without keys."""

    key: str = ""
    role: Role = "admin"

    @property
    def namespace(self) -> str:
        return self.key


class Keys:
    """Those that may call; none at all lets everyone in, as an admin."""

    def __init__(self, lines: str = "", source: str = "keys") -> None:
        self._known: dict[str, Caller] = {}
        for number, line in enumerate(lines.splitlines(), 1):
            if line.strip() and not line.startswith("#"):
                self._add(line, f"{source}:{number}")

    @classmethod
    def load(cls, path: Path) -> Keys:
        try:
            keys = cls(path.read_text(encoding="utf-8"), str(path))
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError("api-keys", str(path), f"cannot be read: {error}") from None
        if not keys:  # who names a file of keys does not mean to let everyone in
            raise ConfigError("api-keys", str(path), "has no key")
        return keys

    def __bool__(self) -> bool:
        return bool(self._known)

    def find(self, key: str) -> Caller | None:
        """Whose key it is. The comparison takes the same time whatever the key."""
        digest, found = _hash(key), None
        for known, caller in self._known.items():
            if hmac.compare_digest(known, digest):
                found = caller
        return found

    def _add(self, line: str, where: str) -> None:
        parts = line.split()
        if len(parts) != 3 or not _NAME.fullmatch(parts[0]) or not re.fullmatch("[0-9a-f]{64}", parts[2]):
            raise ConfigError("api-keys", where, "a line is `name user|admin hash`, as `weft key` prints it")
        name, role, digest = parts
        if role not in ("user", "admin"):
            raise ConfigError("api-keys", where, f"role {role!r} is neither user nor admin")
        if any(name == caller.key for caller in self._known.values()):
            raise ConfigError("api-keys", where, f"{name!r} comes twice")
        self._known[digest] = Caller(name, "admin" if role == "admin" else "user")


def make_key(name: str, role: Role) -> tuple[str, str]:
    """A new key, and its line for the file."""
    if not _NAME.fullmatch(name):
        raise ConfigError("name", name, "letters, digits, '.', '_' and '-', up to 64")
    key = _PREFIX + secrets.token_urlsafe(32)
    return key, f"{name} {role} {_hash(key)}"


def _hash(key: str) -> str:
    return hashlib.sha256(key.encode(errors="surrogatepass")).hexdigest()
