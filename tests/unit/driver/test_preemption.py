"""A signal from the cluster stops the program in good order, with the exit code that requeues the job."""

import asyncio
import os
import signal

import pytest

from megatron_dagger.driver.preemption import stop_on_signals
from megatron_dagger.signals import STOPPED


@pytest.fixture(autouse=True)
def handlers():
    """Restore the handlers after each test, since a program that was asked to stop keeps ours until it ends."""
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGUSR1)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_a_signal_cancels_the_work_but_not_its_cleanup(number):
    done = []

    async def work():
        try:
            await asyncio.sleep(60)
        finally:
            os.kill(os.getpid(), signal.SIGTERM)  # a second signal does not interrupt the cleanup
            done.append("committed")

    async def rounds():
        asyncio.get_running_loop().call_later(0.05, os.kill, os.getpid(), number)
        await work()

    with pytest.raises(SystemExit) as caught, stop_on_signals():
        asyncio.run(rounds())
    os.kill(os.getpid(), signal.SIGTERM)  # nor does a later one change the exit code
    assert caught.value.code == STOPPED == 75
    assert done == ["committed"]


def test_an_error_while_stopping_does_not_change_the_exit_code():
    @stop_on_signals()
    def work():
        try:
            os.kill(os.getpid(), signal.SIGUSR1)
        finally:
            raise RuntimeError("the engine is gone")

    with pytest.raises(SystemExit) as caught:
        work()
    assert caught.value.code == STOPPED


def test_an_error_without_a_signal_propagates():
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(RuntimeError, match="by itself"), stop_on_signals():
        raise RuntimeError("by itself")
    assert signal.getsignal(signal.SIGTERM) is before
