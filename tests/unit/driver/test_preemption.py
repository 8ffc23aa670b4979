"""A signal of the cluster ends the program in order, once, with the code that means: again."""

import asyncio
import os
import signal

import pytest

from megatron_dagger.driver.preemption import stops_when_asked
from megatron_dagger.signals import STOPPED


@pytest.fixture(autouse=True)
def handlers():
    """Put back after each test: a program that was asked to stop keeps ours to its end."""
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGUSR1)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_what_runs_is_cancelled_and_may_finish_what_it_began(number):
    done = []

    async def work():
        try:
            await asyncio.sleep(60)
        finally:
            os.kill(os.getpid(), signal.SIGTERM)  # the second signal does not cut this short
            done.append("committed")

    async def rounds():
        asyncio.get_running_loop().call_later(0.05, os.kill, os.getpid(), number)
        await work()

    with pytest.raises(SystemExit) as caught, stops_when_asked():
        asyncio.run(rounds())
    os.kill(os.getpid(), signal.SIGTERM)  # nor does a later one spoil the exit code
    assert caught.value.code == STOPPED == 75
    assert done == ["committed"]


def test_what_breaks_while_stopping_does_not_hide_that_it_was_asked():
    @stops_when_asked()
    def work():
        try:
            os.kill(os.getpid(), signal.SIGUSR1)
        finally:
            raise RuntimeError("the engine is gone")

    with pytest.raises(SystemExit) as caught:
        work()
    assert caught.value.code == STOPPED


def test_other_errors_pass():
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(RuntimeError, match="by itself"), stops_when_asked():
        raise RuntimeError("by itself")
    assert signal.getsignal(signal.SIGTERM) is before
