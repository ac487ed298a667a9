#!/usr/bin/env python3
"""Compare a tiny checkpoint of each served architecture with stock SGLang, and keep the results in docs/models.json.

PYTHONPATH=. python tools/compare_models.py [olmo2 deepseek_v3:4 qwen3_moe:3:ep …]    (family[:devices[:tp|ep]])

Each comparison is `anchortp parity … --json` in a process of its own, some 30 s on two cores. Results of the same
name are replaced. Without names everything of ``comparisons`` that the file lacks is run.
"""

import json
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import date
from importlib.metadata import version
from pathlib import Path
from typing import Any

from anchortp_sglang.planning.model.families import FAMILIES
from anchortp_sglang.planning.model.wrappers import WRAPPERS
from anchortp_sglang.testing import tiny_families
from anchortp_sglang.testing.tiny_checkpoint import write_checkpoint

RESULTS = Path(__file__).parent.parent / "docs" / "models.json"
DEVICES = (2, 3, 4)
LAYERS = {"gemma3_text": 6}
"""Where three are too few: only its sixth layer has no window."""
WIDEST, WIDEST_FAMILY = 5, "deepseek_v3"
EXPERT_PARALLEL = 3
LOST = {2: 0, 3: 1, 4: 3, 5: 2}
"""By the number of devices, the one that is lost."""


@dataclass(frozen=True)
class Compared:
    """A comparison: a tiny family, how many devices serve it, and how its experts are split."""

    family: str
    devices: int
    experts: str = "tp"

    @property
    def name(self) -> str:
        return f"{self.family}:{self.devices}:{self.experts}"

    def command(self, model: str) -> list[str]:
        split = ["--experts", "ep"] if self.experts == "ep" else []
        return ["parity", "--model", model, "--tp", str(self.devices), *split, "--lose", str(LOST[self.devices])]


def served() -> dict[str, str]:
    """Architecture of each tiny family that both this package and stock SGLang serve."""
    architectures = {name: family.architecture for name, family in tiny_families.FAMILIES.items()}
    return {name: one for name, one in architectures.items() if _has_both_sides(one)}


def _has_both_sides(architecture: str) -> bool:
    family = FAMILIES[WRAPPERS[architecture].architecture if architecture in WRAPPERS else architecture]
    return not (family.layout_only or family.without_stock)


def comparisons() -> Iterator[Compared]:
    for family, architecture in served().items():
        yield from (Compared(family, devices) for devices in DEVICES)
        if FAMILIES[architecture].experts:
            yield Compared(family, EXPERT_PARALLEL, "ep")
    yield Compared(WIDEST_FAMILY, WIDEST)


def run(compared: Compared, folder: Path) -> dict[str, Any]:
    """The result as it is kept. ``folder`` is for the checkpoint and stock's answers, once for each family. Raises
    SystemExit if one of the sides could not be served."""
    model = folder / compared.family
    if not model.exists():
        write_checkpoint(model, compared.family, num_layers=LAYERS.get(compared.family, 3))  # type: ignore[arg-type]
    kept = ["--json", "--stock-answers", str(folder / f"{compared.family}.json")]
    command = [sys.executable, "-m", "anchortp_sglang.cli", *compared.command(str(model)), *kept]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode not in (0, 1):
        sys.exit(f"{compared.name}: {done.stderr}")
    answer = json.loads(done.stdout)
    return {
        "family": compared.family,
        "architecture": served()[compared.family],
        "devices": compared.devices,
        "experts": compared.experts,
        "lost_device": LOST[compared.devices],
        "equal": answer["equal"],
        "rounds": {one["when"]: _summary(one["prompts"]) for one in answer["rounds"]},
        "date": date.today().isoformat(),
        "sglang": version("sglang"),
        "command": " ".join(["anchortp", *compared.command("DIR"), "--json"]),
    }


def _summary(prompts: Sequence[dict[str, Any]]) -> dict[str, Any]:
    deltas = [one[part] for one in prompts for part in ("prefill", "decode")]
    return {
        "answers": len(prompts),
        "answers_equal": sum(one["tokens_equal"] for one in prompts),
        "tokens": sum(one["decode"]["pairs"] for one in prompts),
        "max_delta_logprob": max(delta["max"] for delta in deltas),
        "unpaired_logprobs": sum(delta["unpaired"] for delta in deltas),
    }


def main(names: Sequence[str]) -> None:
    kept = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    with tempfile.TemporaryDirectory() as folder:
        for compared in _named(names) if names else [one for one in comparisons() if one.name not in kept]:
            kept[compared.name] = result = run(compared, Path(folder))
            RESULTS.write_text(json.dumps(dict(sorted(kept.items())), indent=1) + "\n")
            apart = max(one["max_delta_logprob"] for one in result["rounds"].values())
            print(compared.name, "equal" if result["equal"] else "DIFFERENT", f"{apart:.1e}", flush=True)


def _named(names: Sequence[str]) -> Iterator[Compared]:
    for name in names:
        family, devices, experts = (*name.split(":"), "", "")[:3]
        for one in comparisons():
            if one.family == family and devices in ("", str(one.devices)) and experts in ("", one.experts):
                yield one


if __name__ == "__main__":
    main(sys.argv[1:])
