"""anchortp-sglang: an SGLang server that outlives the ranks and the devices it runs on.

Nothing heavy is imported here, so that ``anchortp`` and the anchors start in milliseconds;
``Engine`` (which imports SGLang) is resolved on first use.
"""

from typing import Any

__version__ = "0.1.0"
__all__ = ["Engine", "__version__"]


def __getattr__(name: str) -> Any:
    if name == "Engine":
        from anchortp_sglang.engine import Engine

        return Engine
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
