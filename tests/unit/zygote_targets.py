"""What forked children do in test_recovery_zygote and test_recovery_handover."""

import os
import time

from anchortp_sglang.rank import handover


def answer(number, pipe):
    pipe.send(number + 1)
    time.sleep(60)


def leave(_, pipe):
    pipe.send("bye")


def hold(texts, pipe):
    """A rank with a memfd of each text, and one more descriptor that is not to be handed out.

    Sends their numbers, and then something else.
    """
    numbers = []
    for text in texts:
        numbers.append(os.memfd_create(text))
        os.pwrite(numbers[-1], text.encode(), 0)
    pipe.send((*numbers, os.memfd_create("secret")))
    handover.answer_on(pipe, lambda: numbers)
    pipe.send("last words")
    time.sleep(60)
