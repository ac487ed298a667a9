"""Only what pyproject.toml cannot say: patches/ at the repository root is installed inside the package.

The files stay at the root for those who keep a fork of SGLang; an installed anchortp-sglang reads the same
files as `anchortp_sglang/_patches`.
"""

from setuptools import find_packages, setup

setup(
    packages=[*find_packages(include=["anchortp_sglang*"]), "anchortp_sglang._patches"],
    package_dir={"anchortp_sglang._patches": "patches"},
    package_data={"anchortp_sglang._patches": ["*.toml", "*.patch"]},
)
