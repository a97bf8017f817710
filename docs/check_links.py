"""Check that links between the Markdown files of this repository lead somewhere.

Links to other files and to headings are checked, links to other hosts are not: the check has to
give the same answer on a machine without network. Usage: check_links.py [root]
"""

import re
import sys
from collections.abc import Iterator
from pathlib import Path

FENCE = re.compile(r"^\s*(```|~~~)")
HEADING = re.compile(r"^#{1,6}\s+(.*?)\s*#*$")
CODE = re.compile(r"`[^`]*`")
INLINE = re.compile(r"\]\(\s*<?([^)\s>]+)>?[^)]*\)")
REFERENCE = re.compile(r"^\s{0,3}\[[^\]]+\]:\s*<?([^\s>]+)>?")
OTHER_HOST = re.compile(r"^([a-z][a-z0-9+.-]*:|//)", re.IGNORECASE)


def prose(path: Path) -> Iterator[tuple[int, str]]:
    """Numbered lines outside code fences."""
    fenced = False
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        if FENCE.match(line):
            fenced = not fenced
        elif not fenced:
            yield number, line


def anchors(path: Path) -> set[str]:
    """Names that heading links may use, made as code hosts make them."""
    found: dict[str, int] = {}
    names = set()
    for _, line in prose(path):
        if match := HEADING.match(line):
            text = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", match[1]).lower()
            slug = re.sub(r"[^\w\- ]", "", text).replace(" ", "-")
            repeats = found.get(slug, 0)
            found[slug] = repeats + 1
            names.add(f"{slug}-{repeats}" if repeats else slug)
    return names


def broken(path: Path) -> Iterator[str]:
    for number, line in prose(path):
        plain = CODE.sub("", line)
        for link in [*INLINE.findall(plain), *REFERENCE.findall(plain)]:
            if OTHER_HOST.match(link):
                continue
            name, _, anchor = link.partition("#")
            target = path.parent / name if name else path
            if not target.exists():
                yield f"{path}:{number}: no file {name}"
            elif anchor and target.suffix == ".md" and anchor not in anchors(target):
                yield f"{path}:{number}: no heading #{anchor} in {target}"


def main(root: Path) -> int:
    inside = (path.relative_to(root) for path in root.rglob("*.md"))
    files = sorted(path for path in inside if not any(p.startswith(".") for p in path.parts))
    faults = [fault for path in files for fault in broken(root / path)]
    print(*faults, f"{len(files)} files, {len(faults)} broken links", sep="\n")
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).parents[1]))
