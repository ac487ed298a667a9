"""When a process may become a zygote, and why it may not. (CUDA: ``platforms/cuda/test_stand_in.py``.)"""

from __future__ import annotations

import interpreter
import pytest

PRELUDE = """
    import ctypes, threading, time
    from anchortp_sglang.startup.fork_guard import unfit_to_fork

    def live(name):
        ctypes.CDLL(None).prctl(15, name.encode())  # PR_SET_NAME
        named.set()
        time.sleep(60)

    named = threading.Event()
    print(unfit_to_fork())
"""


@pytest.mark.parametrize(
    "thread, reason",
    [("worker", "it has 2 threads"), ("cuda00001800007", "None"), ("jemalloc_bg_thd", "None")],
)
def test_threads_make_a_process_unfit_unless_its_children_can_do_without(thread: str, reason: str) -> None:
    out = interpreter.run(
        PRELUDE,
        f"""
        threading.Thread(target=live, args=("{thread}",), daemon=True).start()
        assert named.wait(10)
        print(unfit_to_fork())
    """,
    )
    assert out.splitlines() == ["None", reason]
