"""``python -m anchortp_sglang.cli`` is the command ``anchortp``."""

from anchortp_sglang.cli.app import main

main()
