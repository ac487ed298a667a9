"""What every kind of anchor memory promises, by real anchors and processes that use them and are killed."""

from __future__ import annotations

import contextlib
import secrets
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from anchor_rig import AnchorRig, kill
from arena_platforms import BUDGET_BYTES, share
from arena_user import ArenaUser

from anchortp_sglang.anchor.client import AnchorRefused

NBYTES = 5 << 20  # no multiple of a GPU's granularity

Use = Callable[[], ArenaUser]


@pytest.fixture(
    params=["memfd", pytest.param("vmm", marks=pytest.mark.gpu), pytest.param("ipc", marks=pytest.mark.gpu)]
)
def sharing(request: pytest.FixtureRequest) -> str:
    if request.param != "memfd" and share(request.param) is None:
        pytest.skip("no CUDA device")
    return request.param


@pytest.fixture
def rig(tmp_path: Path, sharing: str) -> Iterator[AnchorRig]:
    with AnchorRig(tmp_path, None if sharing == "memfd" else share(sharing)) as rig:
        yield rig


@pytest.fixture
def use(rig: AnchorRig) -> Iterator[Use]:
    with contextlib.ExitStack() as stack:

        def start() -> ArenaUser:
            user = ArenaUser(rig.run, rig.gpu)
            stack.callback(user.kill)
            return user

        yield start


@pytest.fixture
def name() -> str:
    return f"segment-{secrets.token_hex(8)}"


def test_what_one_process_writes_another_reads(rig: AnchorRig, use: Use, name: str) -> None:
    rig.start()
    assert rig.client().allocate(0, name, NBYTES).created
    writer, reader = use(), use()
    assert writer.open(name, 0, True) is False
    reader.open(name, 0, False)
    writer.write(0, "first")
    writer.write(NBYTES - 4, "last")
    assert (reader.read(0, 5), reader.read(NBYTES - 4, 4)) == ("first", "last")


def test_memory_outlives_the_process_that_wrote_it(rig: AnchorRig, use: Use, name: str) -> None:
    rig.start()
    rig.client().allocate(0, name, NBYTES)
    writer = use()
    writer.open(name, 0, True)
    writer.write(NBYTES - 4, "kept")
    writer.kill()
    reader = use()
    reader.open(name, 0, False)
    assert reader.read(NBYTES - 4, 4) == "kept"


def test_memory_outlives_its_anchor_and_is_taken_back(rig: AnchorRig, use: Use, name: str, sharing: str) -> None:
    anchor = rig.start()
    rig.client().allocate(0, name, NBYTES)
    rank = use()
    rank.open(name, 0, True)
    rank.write(0, "kept")
    kill(anchor)
    if sharing != "ipc":  # there it dangles
        assert rank.read(0, 4) == "kept"
    rig.start(generation=3)
    if sharing == "ipc":
        with pytest.raises(RuntimeError, match="cannot be given back"):
            rank.give_back(name, 3)
        return
    rank.give_back(name, 3)
    rank.give_back(name, 3)  # two ranks may have it
    rank.kill()
    again = use()
    again.open(name, 3, False)
    assert again.read(0, 4) == "kept"
    assert rig.client().status().segments[0].nbytes == NBYTES


def test_what_is_given_back_must_be_such_memory(rig: AnchorRig, tmp_path: Path) -> None:
    rig.start()
    with open(tmp_path / "file", "wb+") as file, pytest.raises(AnchorRefused) as error:
        rig.client().adopt_handle(0, "kv", file.fileno(), NBYTES, sealed=False)
    assert error.value.code == "bad_handle"
    assert rig.client().status().segments == []


def test_a_restarted_anchor_without_its_memory_does_not_pretend_to_have_it(rig: AnchorRig, name: str) -> None:
    first = rig.start()
    rig.client().allocate(0, name, NBYTES)
    kill(first)
    rig.start()
    with pytest.raises(AnchorRefused) as error:
        rig.client().open_handle(0, name)
    assert error.value.code == "unknown_segment"
    assert rig.client().allocate(0, name, NBYTES).created


def test_sealed_memory_is_read_only_for_all_who_open_it_so(rig: AnchorRig, use: Use, name: str, sharing: str) -> None:
    rig.start()
    rig.client().allocate(0, name, NBYTES)
    filler = use()
    filler.open(name, 0, True)
    filler.write(0, "weights")
    rig.client().seal(0, name)
    rank = use()
    assert rank.open(name, 0, False) is True
    if sharing != "ipc":  # which knows no protection
        with pytest.raises((RuntimeError, BrokenPipeError)):  # refused, or ended by a fault
            rank.write(0, "spoiled")
    reader = use()
    reader.open(name, 0, False)
    assert reader.read(0, 7) == "weights"


def test_released_memory_can_be_had_again(rig: AnchorRig, sharing: str) -> None:
    rig.start()
    client = rig.client()
    for round_ in range(3):
        client.allocate(0, f"kv-{round_}", BUDGET_BYTES * 3 // 4)
        client.release(0, f"kv-{round_}")
    assert client.status().segments == []


def test_more_memory_than_there_is_is_refused_and_the_anchor_goes_on(rig: AnchorRig, sharing: str) -> None:
    rig.start()
    client = rig.client()
    too_much = 1 << 45 if sharing == "memfd" else BUDGET_BYTES + 1
    with pytest.raises(AnchorRefused) as error:
        client.allocate(0, "huge", too_much)
    assert error.value.code == "no_memory"
    assert client.allocate(0, "kv", NBYTES).created


def test_a_superseded_generation_gets_no_handle(rig: AnchorRig, use: Use, name: str) -> None:
    rig.start()
    rig.client().allocate(1, name, NBYTES)
    rig.client().fence(2)
    with pytest.raises(RuntimeError, match="stale_generation"):
        use().open(name, 1, True)
