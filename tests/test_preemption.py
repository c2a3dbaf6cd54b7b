"""Which signals ask a run to stop, and whom they are left to."""

import os
import signal

import pytest

from crossmae_jax.distributed import preemption


@pytest.fixture(autouse=True)
def nobody_else():
    """Signals as a program that is started by a shell has them."""
    numbers = (signal.SIGHUP, signal.SIGUSR1, signal.SIGTERM)
    before = {number: signal.signal(number, signal.SIG_DFL) for number in numbers}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.parametrize("number", [
    signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1,
], ids=lambda number: number.name)
def test_a_signal_asks_to_stop_and_ends_nothing(number):
    usual = signal.getsignal(number)
    with preemption.stop_requests() as stop:
        assert not stop.is_set()
        os.kill(os.getpid(), number)
        assert stop.is_set()
    assert signal.getsignal(number) == usual


@pytest.mark.parametrize("number", [signal.SIGHUP, signal.SIGUSR1])
def test_a_terminal_may_hang_up_more_than_once(number):
    with preemption.stop_requests() as stop:
        for _ in range(3):
            os.kill(os.getpid(), number)
        assert stop.is_set()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_the_second_request_acts_as_usual(number):
    usual = signal.getsignal(number)
    with preemption.stop_requests():
        os.kill(os.getpid(), number)
        assert signal.getsignal(number) == usual


@pytest.mark.parametrize("number", [signal.SIGHUP, signal.SIGUSR1])
def test_behind_nohup_a_run_goes_on(number):
    signal.signal(number, signal.SIG_IGN)
    with preemption.stop_requests() as stop:
        os.kill(os.getpid(), number)
        assert not stop.is_set()
    assert signal.getsignal(number) == signal.SIG_IGN


def test_a_launcher_that_handles_a_signal_itself_still_does():
    heard = []
    signal.signal(signal.SIGUSR1, lambda *_: heard.append(None))
    with preemption.stop_requests() as stop:
        os.kill(os.getpid(), signal.SIGUSR1)
        assert heard and not stop.is_set()
