"""`weft key`: a new API key. The key is printed once; what stands in the file is its hash."""

from __future__ import annotations

import argparse
import sys

from weft.gateway.http.keys import make_key


def run(args: argparse.Namespace) -> int:
    key, line = make_key(args.name, "admin" if args.admin else "user")
    print(line)
    print(f"weft: the key, shown this once: {key}", file=sys.stderr)
    return 0
