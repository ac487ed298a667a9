"""Tables that programs keep in pages of docs/, each between two marks that name its program."""

import sys
from collections.abc import Iterable
from pathlib import Path


def publish(program: str, lines: Iterable[str]) -> None:
    """Print the lines, or if the command line names a page put them between the program's marks in it."""
    text = "\n".join(lines)
    if len(sys.argv) < 2:
        return print(text)
    page = Path(sys.argv[1])
    before, _, rest = page.read_text(encoding="utf-8").partition(_begin(program))
    _, _, after = rest.partition(_end(program))
    if not after:
        sys.exit(f"{page} lacks the marks {_begin(program)} and {_end(program)}")
    page.write_text(f"{before}{_begin(program)}\n{text}\n{_end(program)}{after}", encoding="utf-8")


def published(program: str, page: Path) -> str:
    """What stands between the program's marks."""
    return page.read_text(encoding="utf-8").partition(_begin(program))[2].partition(_end(program))[0].strip()


def _begin(program: str) -> str:
    return f"<!-- {program}: begin -->"


def _end(program: str) -> str:
    return f"<!-- {program}: end -->"
