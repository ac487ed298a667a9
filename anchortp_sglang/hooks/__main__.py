"""``python -m anchortp_sglang.hooks``: compare the manifest with the installed SGLang, or write it (``--write``).

For a fork of SGLang, install it first: what is written is named after its version, and used from then on.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from anchortp_sglang.hooks import manifest
from anchortp_sglang.hooks.flags import flags_path, flags_text
from anchortp_sglang.hooks.install import Hook
from anchortp_sglang.hooks.seams import is_patched, patch_text
from anchortp_sglang.hooks.source import MissingSymbolError
from anchortp_sglang.platforms.cpu import sgl_kernel_stub


def main(argv: Sequence[str] | None = None) -> int:
    """Compare, or write. Return the exit status: 1 on drift, or if something cannot be written."""
    parser = argparse.ArgumentParser(prog="python -m anchortp_sglang.hooks", description=__doc__)
    parser.add_argument("--write", action="store_true", help="write manifest, flags and patch for the installed SGLang")
    parser.add_argument(
        "--force", action="store_true", help="write although a hook lacks what it needs, or over others"
    )
    arguments = parser.parse_args(argv)
    sgl_kernel_stub.install()  # the hooks' modules import SGLang, also without a GPU
    from anchortp_sglang.hooks.table import HOOKS

    if not arguments.write:
        drifts = manifest.compare(HOOKS)
        for drift in drifts:
            print(drift, file=sys.stderr)
        return 1 if drifts else 0
    try:
        refusal = _accept()
        if refusal and not arguments.force:
            print(f"anchortp: nothing is written: {refusal}", file=sys.stderr)
            return 1
        texts = _texts(HOOKS)
        for path, text in texts.items():
            path.write_text(text, encoding="utf-8")
    except (MissingSymbolError, ValueError, OSError) as error:
        print(f"anchortp: cannot write: {error}", file=sys.stderr)
        return 1
    print(f"{len(HOOKS)} hooks: " + ", ".join(map(str, texts)))
    return 0


def _accept() -> str:
    """Print how the installed SGLang differs from the last manifest; return why it should not be written over."""
    written = [path for path in manifest.patches_folder().glob("sglang-*.toml") if not path.stem.endswith("-flags")]
    if not written:
        return ""
    path = manifest.manifest_path()
    drifts = manifest.installed_drift(path if path in written else max(written))
    for drift in drifts:
        print(f"accepted: {drift}", file=sys.stderr)
    version = manifest.installed_version()
    if any(drift.breaks for drift in drifts):
        return "the hooks lack what they need (above): adapt them first, or --force"
    if drifts and version == manifest.SGLANG_VERSION:
        return (
            f"this is another source than SGLang {version}: give it a version of its own ({version}+ours), or --force"
        )
    return ""


def _texts(hooks: Sequence[Hook]) -> dict[Path, str]:
    """Return what is to be written, by path. A patched SGLang needs no other patch."""
    version = manifest.installed_version()
    texts = {
        manifest.patches_folder() / f"sglang-{version}.toml": manifest.manifest_text(hooks),
        flags_path(version): flags_text(),
    }
    if not is_patched():
        texts[manifest.patches_folder() / f"sglang-{version}.patch"] = patch_text(hook.target for hook in hooks)
    return texts


if __name__ == "__main__":
    sys.exit(main())
