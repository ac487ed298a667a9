"""Imports SGLang once and forks a child for each job: a start then costs 3 s instead of 18.

Reads one JSON job a line from stdin, answers on stdout. See forge.py for the other end.
"""

import importlib
import json
import os
import signal
import sys
import tempfile
import time
import traceback


def main() -> None:
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    from anchortp_sglang.startup import device

    device.prepare(device.choose_platform({}), {"tp_size": 8})  # as anchortp_sglang.engine does
    from anchortp_sglang.hooks import manifest, preload

    preload.import_sglang()
    manifest.installed_drift()  # keeps the sources that it has parsed
    _say(answers, ready=True, threads=len(os.listdir("/proc/self/task")))
    for line in sys.stdin:
        command = json.loads(line)
        if "wait" in command:
            _say(answers, code=_wait(command["wait"], command["timeout_s"]))
        elif "poll" in command:
            _say(answers, code=_poll(command["poll"]))
        else:
            _say(answers, pid=_fork(command))
    os._exit(0)  # a second less than taking all of SGLang apart


def _say(answers, **answer) -> None:
    answers.write(json.dumps(answer) + "\n")
    answers.flush()


def _fork(job) -> int:
    pid = os.fork()
    if pid == 0:
        code = 70
        try:
            code = _run(job)
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)
    return pid


def _run(job) -> int:
    os.setsid()
    for target, path, flags in (
        (0, os.devnull, os.O_RDONLY),
        (1, job["output"], os.O_WRONLY | os.O_CREAT | os.O_APPEND),
    ):
        os.dup2(os.open(path, flags, 0o600), target)
    os.dup2(1, 2)
    os.environ.update(job["env"])
    tempfile.tempdir = None  # TMPDIR may be another one now
    module, _, name = job["call"].partition(":")
    try:
        value = getattr(importlib.import_module(module), name)(**job["arguments"])
    except SystemExit as end:
        return end.code if isinstance(end.code, int) else 0 if end.code is None else 1
    except BaseException:
        traceback.print_exc()
        return 70
    with open(job["result"], "w") as result:
        json.dump(value, result)
    return 0


def _poll(pid: int) -> int | None:
    done, status = os.waitpid(pid, os.WNOHANG)
    return os.waitstatus_to_exitcode(status) if done else None


def _wait(pid: int, timeout_s: float) -> int | None:
    """The exit code as a shell has it; None (and the job's whole process group is killed) when time is up."""
    deadline = time.monotonic() + timeout_s
    while True:
        if (code := _poll(pid)) is not None:
            return code
        if time.monotonic() > deadline:
            os.killpg(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
            return None
        time.sleep(0.01)


if __name__ == "__main__":
    main()
