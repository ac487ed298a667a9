"""Where things are in the repository."""

from pathlib import Path

UNIT = Path(__file__).parent
ROOT = UNIT.parents[1]
CONFIGS = UNIT / "configs"
