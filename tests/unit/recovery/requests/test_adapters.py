"""New ranks are told of the adapters that are loaded, whatever a fault interrupts, and a call gets its own answer."""

import asyncio
from typing import Any

from sglang.srt.managers.communicator import FanOutCommunicator
from sglang.srt.managers.io_struct import LoadLoRAAdapterReqInput, LoRAUpdateOutput, UnloadLoRAAdapterReqInput

from anchortp_sglang.recovery.requests.adapters import Adapters
from anchortp_sglang.recovery.requests.records import decode, encode


class Main:
    """TokenizerManager's communicator, and what it has sent to ranks."""

    def __init__(self) -> None:
        self.served: set[str] = set()
        self.adapters = Adapters(lambda: self.served)
        self.call: FanOutCommunicator[Any] = FanOutCommunicator(self._dispatch, 1)

    def _dispatch(self, message: Any) -> None:
        self.adapters.sent(message, encode(message))

    def begin(self, message: Any) -> Any:
        return asyncio.ensure_future(self.adapters.run(lambda: self.call(message), message))

    def repeated(self, held: bool = False) -> list[str]:
        messages = [decode(one) for one in self.adapters.repeat(self.call, held)]
        return [("+" if isinstance(one, LoadLoRAAdapterReqInput) else "-") + one.lora_id for one in messages]

    def answer(self, success: bool = True) -> None:
        self.call.handle_recv(LoRAUpdateOutput(success=success, error_message="", loaded_adapters={}))

    async def done(self, message: Any, success: bool = True) -> Any:
        call = self.begin(message)
        await asyncio.sleep(0)
        self.answer(success)
        return await call


def load(name: str) -> Any:
    return LoadLoRAAdapterReqInput(lora_name=name, lora_path=f"/{name}", lora_id=name)


def unload(name: str) -> Any:
    return UnloadLoRAAdapterReqInput(lora_name=name, lora_id=name)


def test_what_is_loaded_is_repeated_in_order() -> None:
    async def scenario() -> None:
        main = Main()
        for name in "abc":
            await main.done(load(name))
        await main.done(unload("b"))
        await main.done(load("broken"), success=False)
        assert main.repeated() == ["+a", "+c"]

    asyncio.run(scenario())


def test_an_adapter_of_the_flags_that_was_unloaded_is_unloaded_again() -> None:
    async def scenario() -> None:
        main = Main()
        await main.done(unload("given"))
        await main.done(load("a"))
        assert main.repeated() == ["-given", "+a"]

    asyncio.run(scenario())


def test_a_call_gets_its_own_answer_after_those_of_what_was_repeated() -> None:
    async def scenario() -> None:
        main = Main()
        await main.done(load("a"))
        call = main.begin(load("b"))
        await asyncio.sleep(0)
        assert main.repeated() == ["+a", "+b"]
        main.answer(success=True)
        await asyncio.sleep(0)
        assert not call.done()
        main.answer(success=False)
        (answer,) = await call
        assert not answer.success
        assert main.repeated() == ["+a"]

    asyncio.run(scenario())


def test_a_message_of_an_outage_is_not_sent_twice() -> None:
    async def scenario() -> None:
        main = Main()
        await main.done(load("a"))
        call = main.begin(unload("a"))
        await asyncio.sleep(0)
        assert main.repeated(held=True) == []
        main.answer()
        await call
        assert main.repeated() == []

    asyncio.run(scenario())


def test_an_answer_that_nobody_has_read_before_the_next_ranks_counts() -> None:
    async def scenario() -> None:
        main = Main()
        call = main.begin(load("a"))
        await asyncio.sleep(0)
        main.answer()
        assert main.repeated() == ["+a"]
        (answer,) = await call  # the ranks are not as fast as a round of the loop
        assert answer.success
        following = main.begin(load("b"))
        await asyncio.sleep(0)
        main.answer()
        for _ in range(3):
            await asyncio.sleep(0)
        assert not following.done()
        main.answer()
        assert (await following)[0].success
        assert main.repeated() == ["+a", "+b"]

    asyncio.run(scenario())


def test_a_second_fault_repeats_all_of_it() -> None:
    async def scenario() -> None:
        main = Main()
        await main.done(load("a"))
        call = main.begin(load("b"))
        await asyncio.sleep(0)
        main.repeated()
        main.answer()
        assert main.repeated() == ["+a", "+b"]
        main.answer()
        main.answer()
        (answer,) = await call
        assert answer.success

    asyncio.run(scenario())


def test_a_call_that_comes_after_the_fault_waits_for_the_answers_to_what_was_repeated() -> None:
    async def scenario() -> None:
        main = Main()
        for name in "ab":
            await main.done(load(name))
        assert main.repeated() == ["+a", "+b"]
        call = main.begin(load("c"))
        await asyncio.sleep(0)
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

    asyncio.run(scenario())


def test_an_adapter_that_main_serves_is_not_loaded_again() -> None:
    """Ranks without it, as its files were gone at a fault, would take it under another id."""

    async def scenario() -> None:
        main = Main()
        await main.done(load("a"))
        main.served.add("a")
        (answer,) = await main.begin(load("a"))
        assert not answer.success and "unload it first" in answer.error_message
        assert main.repeated() == ["+a"]

    asyncio.run(scenario())
