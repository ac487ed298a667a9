"""Marks the functions that anchortp-sglang changes in its own servers. In all others they are as they were.

The patch for forks of SGLang (``patches/sglang-<version>.patch``) adds this file to them. It imports nothing of
anchortp-sglang.
"""

# mypy: disable-error-code=attr-defined

import functools


def anchortp_seam(function):
    """Return ``function`` so that another can take its place later, even where it was imported by name before."""

    @functools.wraps(function)
    def seam(*args, **kwargs):
        return seam.anchortp_hooked(*args, **kwargs)

    seam.anchortp_hooked = function
    seam.anchortp_seam = seam  # a decorator around it would copy its attributes
    return seam
