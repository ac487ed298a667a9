"""What forked children do in test_recovery_zygote."""

import time


def answer(number, pipe):
    pipe.send(number + 1)
    time.sleep(60)


def leave(_, pipe):
    pipe.send("bye")
