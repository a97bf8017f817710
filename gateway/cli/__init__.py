"""The `weft` command."""

from weft.gateway.cli.main import main

__all__ = ["main"]
