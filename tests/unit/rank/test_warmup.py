"""What spares do ahead of time runs, and leaves nothing behind that a rank's start would trip over."""

import subprocess
import sys

CODE = """
import torch.distributed as dist
from anchortp_sglang.rank.warmup import warm_up

warm_up()
warm_up()
assert not dist.is_initialized()
dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
print(dist.get_world_size())
"""


def test_a_process_can_join_its_group_after_warming_up():
    done = subprocess.run([sys.executable, "-c", CODE], capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stdout.split(), done.stderr) == (0, ["1"], "")
