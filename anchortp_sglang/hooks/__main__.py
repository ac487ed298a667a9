"""``python -m anchortp_sglang.hooks``: compare the manifest with the installed SGLang, or write it (``--write``).

For a fork of SGLang, install it first: what is written is named after its version, and used from then on.
"""

import argparse
import sys
from collections.abc import Sequence

from anchortp_sglang.hooks.flags import write_flags
from anchortp_sglang.hooks.manifest import compare, write_manifest
from anchortp_sglang.hooks.seams import write_patch
from anchortp_sglang.hooks.source import MissingSymbolError
from anchortp_sglang.platforms.cpu import sgl_kernel_stub


def main(argv: Sequence[str] | None = None) -> int:
    """Compare, or regenerate the manifest. Return the exit status, 1 on drift."""
    parser = argparse.ArgumentParser(prog="python -m anchortp_sglang.hooks", description=__doc__)
    parser.add_argument("--write", action="store_true", help="write manifest, flags and patch for the installed SGLang")
    write = parser.parse_args(argv).write
    sgl_kernel_stub.install()  # the hooks' modules import SGLang, also without a GPU
    from anchortp_sglang.hooks.table import HOOKS

    if write:
        try:
            print(f"{len(HOOKS)} hooks written to {write_manifest(HOOKS)}, flags to {write_flags()}")
            print(f"their seams, as a patch of the source, to {write_patch(HOOKS)}")
        except (MissingSymbolError, OSError) as error:
            print(f"anchortp: cannot write: {error}", file=sys.stderr)
            return 1
        return 0
    drifts = compare(HOOKS)
    for drift in drifts:
        print(drift, file=sys.stderr)
    return 1 if drifts else 0


if __name__ == "__main__":
    sys.exit(main())
