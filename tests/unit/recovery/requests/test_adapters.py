"""New ranks are told of the adapters that are loaded, whatever a fault interrupts, and a call gets its own answer."""

import asyncio
import os
from collections.abc import Awaitable, Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from sglang.srt.managers.communicator import FanOutCommunicator
from sglang.srt.managers.io_struct import LoadLoRAAdapterReqInput, LoRAUpdateOutput, UnloadLoRAAdapterReqInput

from anchortp_sglang import threads
from anchortp_sglang.recovery.requests.adapter_copies import AdapterCopies, copy_adapter
from anchortp_sglang.recovery.requests.adapters import Adapters
from anchortp_sglang.recovery.requests.records import decode, encode


class Main:
    """TokenizerManager's communicator, and what it has sent to ranks."""

    def __init__(self, folder: Path) -> None:
        self.served: set[str] = set()
        self.copies = AdapterCopies(folder / "copies")
        self.adapters = Adapters(self.copies, lambda: self.served)
        self.call: FanOutCommunicator[Any] = FanOutCommunicator(self._dispatch, 1)

    def _dispatch(self, message: Any) -> None:
        self.adapters.sent(message, encode(message))

    def begin(self, message: Any) -> Any:
        return asyncio.ensure_future(self.adapters.run(self.call, message))

    def repeated(self, held: bool = False) -> list[str]:
        messages = [decode(one) for one in self.adapters.repeat(self.call, held)]
        return [("+" if isinstance(one, LoadLoRAAdapterReqInput) else "-") + one.lora_id for one in messages]

    def answer(self, success: bool = True) -> None:
        self.call.handle_recv(LoRAUpdateOutput(success=success, error_message="", loaded_adapters={}))

    async def begun(self, message: Any) -> Any:
        call = self.begin(message)
        await settle()
        return call

    async def done(self, message: Any, success: bool = True) -> Any:
        call = await self.begun(message)
        self.answer(success)
        return await call


class InThisThread(ThreadPoolExecutor):
    """Runs what is for threads at once, so that rounds of the loop can be counted."""

    def submit(self, function: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        future: Future[Any] = Future()
        try:
            future.set_result(function(*args, **kwargs))
        except Exception as error:
            future.set_exception(error)
        return future


async def settle() -> None:
    for _ in range(5):
        await asyncio.sleep(0)


@pytest.fixture
def load(tmp_path: Path) -> Callable[[str], Any]:
    def made(name: str) -> Any:
        folder = tmp_path / name
        folder.mkdir()
        (folder / "adapter_config.json").write_text("{}")
        save_file({name: np.zeros(1)}, folder / "adapter_model.safetensors")
        return LoadLoRAAdapterReqInput(lora_name=name, lora_path=str(folder), lora_id=name)

    return made


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[[Main], Awaitable[None]]], None]:
    """Run a scenario, and check that there is a copy of each adapter that may be repeated, and of no other."""

    monkeypatch.setattr(threads, "_threads", InThisThread())

    async def main(scenario: Callable[[Main], Awaitable[None]], also: set[str]) -> None:
        made = Main(tmp_path)
        await scenario(made)
        copies = tmp_path / "copies"
        shown = sorted(os.listdir(copies)) if copies.exists() else []
        assert set(shown) == {name[1:] for name in made.repeated() if name.startswith("+")} | also
        assert all(list(load_file(copies / name / "adapter_model.safetensors")) == [name] for name in shown)

    return lambda scenario, also=frozenset(): asyncio.run(main(scenario, also))


def unload(name: str) -> Any:
    return UnloadLoRAAdapterReqInput(lora_name=name, lora_id=name)


def test_what_is_loaded_is_repeated_in_order(load: Any, run: Any) -> None:
    async def scenario(main: Main) -> None:
        for name in "abc":
            await main.done(load(name))
        await main.done(unload("b"))
        await main.done(load("broken"), success=False)
        assert main.repeated() == ["+a", "+c"]

    run(scenario)


def test_an_adapter_of_the_flags_that_was_unloaded_is_unloaded_again_and_its_copy_stays(load: Any, run: Any) -> None:
    async def scenario(main: Main) -> None:
        main.copies.keep("given", "given", copy_adapter(load("given").lora_path, 1), stays=True)
        await main.done(unload("given"), success=False)
        assert main.repeated() == []
        call = await main.begun(unload("given"))
        call.cancel()
        await settle()
        for _ in range(2):  # once more, as SGLang lets it be tried again
            await main.done(unload("given"))
            assert main.repeated() == ["-given"]
            main.answer()
        await main.done(load("a"))
        assert main.repeated() == ["-given", "+a"]
        assert main.copies.discard("given") is False

    run(scenario, also={"given"})


def test_a_call_gets_its_own_answer_after_those_of_what_was_repeated(load: Any, run: Any) -> None:
    async def scenario(main: Main) -> None:
        await main.done(load("a"))
        call = await main.begun(load("b"))
        assert main.repeated() == ["+a", "+b"]
        main.answer(success=True)
        await asyncio.sleep(0)
        assert not call.done()
        main.answer(success=False)
        (answer,) = await call
        assert not answer.success
        assert main.repeated() == ["+a"]

    run(scenario)


def test_a_message_of_an_outage_is_not_sent_twice(load: Any, run: Any) -> None:
    async def scenario(main: Main) -> None:
        await main.done(load("a"))
        call = await main.begun(unload("a"))
        assert main.repeated(held=True) == ["+a"]  # it is sent afterwards
        main.answer()
        main.answer()
        await call
        assert main.repeated() == []

    run(scenario)


def test_an_answer_that_nobody_has_read_before_the_next_ranks_counts(load: Any, run: Any) -> None:
    async def scenario(main: Main) -> None:
        call = await main.begun(load("a"))
        main.answer()
        assert main.repeated() == ["+a"]
        (answer,) = await call  # the ranks are not as fast as a round of the loop
        assert answer.success
        following = await main.begun(load("b"))
        main.answer()
        for _ in range(3):
            await asyncio.sleep(0)
        assert not following.done()
        main.answer()
        assert (await following)[0].success
        assert main.repeated() == ["+a", "+b"]

    run(scenario)


def test_a_second_fault_repeats_all_of_it(load: Any, run: Any) -> None:
    async def scenario(main: Main) -> None:
        await main.done(load("a"))
        call = await main.begun(load("b"))
        main.repeated()
        main.answer()
        assert main.repeated() == ["+a", "+b"]
        main.answer()
        main.answer()
        (answer,) = await call
        assert answer.success

    run(scenario)


def test_a_call_that_comes_after_the_fault_waits_for_the_answers_to_what_was_repeated(load: Any, run: Any) -> None:
    async def scenario(main: Main) -> None:
        for name in "ab":
            await main.done(load(name))
        assert main.repeated() == ["+a", "+b"]
        call = await main.begun(load("c"))
        main.answer()
        assert main.repeated() == ["+a", "+b"]  # other ranks are told again
        for _ in range(2):
            await asyncio.sleep(0)
            assert not call.done()
            main.answer()
        for _ in range(5):
            await asyncio.sleep(0)
        assert not call.done(), "it has taken an answer that was not for it"
        main.answer(success=False)
        (answer,) = await call
        assert not answer.success
        assert main.repeated() == ["+a", "+b"]

    run(scenario)


def test_one_that_is_loaded_or_cannot_be_read_is_refused_before_ranks_are_asked(load: Any, run: Any) -> None:
    async def scenario(main: Main) -> None:
        await main.done(load("a"))
        main.served.add("a")
        gone = LoadLoRAAdapterReqInput(lora_name="gone", lora_path="/no/such/folder", lora_id="gone")
        again = LoadLoRAAdapterReqInput(lora_name="a", lora_path=load("b").lora_path, lora_id="other")
        for message, text in (gone, "is no folder"), (again, "already loaded"):
            (answer,) = await main.begin(message)
            assert not answer.success and text in answer.error_message
        assert main.repeated() == ["+a"]

    run(scenario)


def test_a_client_is_told_the_paths_that_it_gave(load: Any, run: Any) -> None:
    async def scenario(main: Main) -> None:
        message = load("a")
        call = await main.begun(message)
        sent = decode(main.adapters.repeat(main.call, held=False)[0])
        assert sent.lora_path == main.copies.path("a") != message.lora_path
        loaded = {"a": sent.lora_path, "other": "/other"}
        main.call.handle_recv(LoRAUpdateOutput(success=True, error_message="", loaded_adapters=loaded))
        (answer,) = await call
        assert answer.loaded_adapters == {"a": message.lora_path, "other": "/other"}

    run(scenario)


def test_a_load_that_is_given_up_leaves_no_copy(load: Any, run: Any) -> None:
    async def scenario(main: Main) -> None:
        await main.done(load("a"))
        main.repeated()  # whose answers do not come
        call = await main.begun(load("b"))
        assert not call.done()
        call.cancel()
        await settle()
        assert call.cancelled()

    run(scenario)
