"""Child processes: what they say and how they end, whatever becomes of them or of their parent.

The children are real. A test that asks how long a wait may be sets the limit; elsewhere limits are those of production.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import time

import pytest
from processes import PATIENCE_S, is_alive, wait_until_gone
from samples import python
from serving import FOR_EVER_S, serve_orders, sleep_for_ever

from fp8gate.calibrate.processes.child import Child, ChildDiedError, NoChildError, end_all, wait_for
from fp8gate.calibrate.processes.forkserver import kill_server
from fp8gate.calibrate.processes.limits import Limits
from fp8gate.calibrate.processes.messages import Broken
from fp8gate.filter.contract.errors import InputError, UnfinishedError

LIMIT_S = 2
STUCK = f"it took more than {LIMIT_S} s to compile or to measure"


@pytest.fixture
def start():
    """Starts a child that serves orders, unless told otherwise; all of them are ended with the test."""
    children = []

    def start(job="a job", serve=serve_orders, limits=None, *, starts_busy=False):
        children.append(Child(serve, job, limits or Limits(), starts_busy=starts_busy))
        return children[-1]

    yield start
    for child in children:
        child.kill()
    end_all(children)


def server_pid():
    return multiprocessing.forkserver._forkserver._forkserver_pid


def ask(child, *order):
    """The child's answer."""
    child.send(order)
    assert wait_for([child]) == [child]
    return child.receive()


def how_it_dies(child):
    assert wait_for([child]) == [child]
    with pytest.raises(ChildDiedError) as caught:
        child.receive()
    assert isinstance(caught.value, UnfinishedError)
    return str(caught.value)


# --- messages --------------------------------------------------------------------------------------------------


def test_a_child_answers_with_the_job_that_it_has(start):
    child = start({"shape": (1, 2)})
    assert [ask(child, "say") for _ in range(2)] == [("say", {"shape": (1, 2)})] * 2
    assert child.is_alive


def test_children_are_heard_as_soon_as_they_answer(start):
    slow, quick, idle = start(), start(), start()
    slow.send(("sleep", FOR_EVER_S))
    quick.send(("say",))
    assert wait_for([slow, quick, idle]) == [quick]
    assert quick.receive() == ("say", "a job")


def test_nobody_is_heard_if_the_time_is_up_first(start):
    child = start()
    child.send(("sleep", FOR_EVER_S))
    until = time.monotonic() + 0.1
    assert wait_for([child], until) == []
    assert time.monotonic() >= until
    assert wait_for([child], until) == []
    assert child.is_alive


def test_to_wait_for_children_that_have_nothing_to_answer_is_a_mistake(start):
    with pytest.raises(AssertionError, match="something to answer"):
        wait_for([start()])


def test_a_child_may_owe_more_than_one_answer(start):
    child = start()
    child.send(("sleep", 0.0))
    child.send(("say",))
    assert wait_for([child]) == [child]
    assert child.receive() == ("sleep", "a job")
    child.expect_more()
    assert wait_for([child]) == [child]
    assert child.receive() == ("say", "a job")


def test_a_job_that_cannot_be_pickled_is_an_error_of_input(start):
    with pytest.raises(InputError, match="expected what can be pickled, unless workers is 0"):
        start(lambda: None)


class RefusesToBeLoaded:
    """It can be pickled, but not unpickled."""

    def __reduce__(self):
        return int, ("no number",)


def test_a_job_that_cannot_be_unpickled_is_said_by_the_child(start):
    child = start(RefusesToBeLoaded(), starts_busy=True)
    assert wait_for([child]) == [child]
    message = child.receive()
    assert isinstance(message, Broken)
    assert message.detail.startswith("not to be had in another process: ValueError: invalid literal")
    wait_until_gone(child.pid)


# --- deaths ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("order", "message"),
    [
        (("signal", signal.SIGKILL), "its process was killed by signal 9 (out of memory?)"),
        (("signal", signal.SIGSEGV), "its process was killed by signal 11"),
        (("exit", 3), "its process ended with exit code 3"),
        (("exit", 0), "its process ended with exit code 0"),
    ],
    ids=str,
)
def test_a_death_says_how(start, order, message):
    child = start()
    child.send(order)
    assert how_it_dies(child) == message


def test_a_child_that_died_while_it_was_idle_is_heard_at_the_next_order(start):
    child = start()
    ask(child, "say")
    os.kill(child.pid, signal.SIGKILL)
    wait_until_gone(child.pid)
    child.send(("say",))
    assert how_it_dies(child) == "its process was killed by signal 9 (out of memory?)"


def test_ctrl_c_is_not_the_childs_to_handle(start):
    child = start()
    ask(child, "say")
    os.kill(child.pid, signal.SIGINT)
    assert ask(child, "say") == ("say", "a job")


# --- limits ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("serve", [serve_orders, sleep_for_ever], ids=["within a step", "at its start"])
def test_a_child_that_sleeps_for_ever_is_killed_within_its_limit(start, serve):
    starts_busy = serve is sleep_for_ever
    child, other = start(serve=serve, limits=Limits(step_s=LIMIT_S), starts_busy=starts_busy), start()
    if not starts_busy:
        child.send(("sleep", FOR_EVER_S))
    other.send(("sleep", FOR_EVER_S))
    began = time.monotonic()
    assert wait_for([other, child]) == [child]
    assert LIMIT_S / 2 < time.monotonic() - began < PATIENCE_S
    with pytest.raises(ChildDiedError, match=f"^{STUCK}$"):
        child.receive()
    wait_until_gone(child.pid)
    assert other.is_alive


def test_a_child_that_is_stopped_is_killed_within_its_limit(start):
    child = start(limits=Limits(step_s=LIMIT_S))
    os.kill(child.pid, signal.SIGSTOP)
    child.send(("say",))
    assert how_it_dies(child) == STUCK
    wait_until_gone(child.pid)


def test_a_message_that_a_stopped_child_does_not_take_is_given_up_within_the_limit(start):
    child = start(limits=Limits(step_s=LIMIT_S))
    os.kill(child.pid, signal.SIGSTOP)
    child.send(("say", bytes(2**24)))  # more than a pipe holds
    assert how_it_dies(child) == STUCK


def test_an_idle_child_has_no_limit(start):
    child = start(limits=Limits(step_s=LIMIT_S))
    time.sleep(1.2 * LIMIT_S)
    assert ask(child, "say") == ("say", "a job")


@pytest.mark.slow
def test_an_answer_that_came_in_time_counts_however_late_it_is_read(start):
    """As when the parent was stopped, or loaded what others had compiled."""
    child = start(limits=Limits(step_s=LIMIT_S))
    child.send(("say",))
    time.sleep(2 * LIMIT_S)
    assert wait_for([child]) == [child]
    assert child.receive() == ("say", "a job")


@pytest.mark.slow
def test_a_server_that_hangs_is_killed_within_its_limit_and_the_next_child_has_another(start):
    """However short a step may be: a server that still imports torch is not stuck."""
    short_steps = Limits(start_s=600.0, step_s=0.01)
    start()  # the server has imported what it preloads
    kill_server()
    start(limits=short_steps)
    os.kill(server_pid(), signal.SIGSTOP)
    with pytest.raises(NoChildError, match=f"^the process that starts workers took more than {LIMIT_S} s$"):
        start(limits=Limits(start_s=LIMIT_S))
    assert ask(start(), "say") == ("say", "a job")


def test_a_server_that_dies_is_said_to_have_died(start, monkeypatch):
    def dies(process):
        raise EOFError

    start()
    monkeypatch.setattr(multiprocessing.context.ForkServerProcess, "start", dies)
    with pytest.raises(NoChildError, match=r"^the process that starts workers died; is there enough memory\?$"):
        start()


# --- ends ------------------------------------------------------------------------------------------------------


def test_an_idle_child_that_is_dismissed_ends_by_itself(start):
    child = start(limits=Limits(ending_s=PATIENCE_S))
    ask(child, "say")
    process = child.process
    child.dismiss()
    child.end()
    assert process.exitcode == 0


def test_a_busy_child_that_is_dismissed_ends_at_once(start):
    child = start(limits=Limits(ending_s=PATIENCE_S))
    child.send(("sleep", FOR_EVER_S))
    process, began = child.process, time.monotonic()
    child.dismiss()
    child.end()
    assert process.exitcode == -signal.SIGKILL
    assert time.monotonic() - began < PATIENCE_S


def test_an_idle_child_that_does_not_end_is_ended(start):
    child = start(limits=Limits(ending_s=0.1))
    ask(child, "say")
    os.kill(child.pid, signal.SIGSTOP)
    process = child.process
    child.dismiss()
    child.end()
    assert process.exitcode == -signal.SIGKILL


KILLED_PARENT = """
import time
from fp8gate.calibrate.processes import forkserver
from fp8gate.calibrate.processes.child import Child, wait_for
from fp8gate.calibrate.processes.limits import Limits

forkserver.PRELOADED = ()  # these children need no torch

def serve(channel, seconds):
    while True:
        channel.send(channel.receive())
        time.sleep(seconds)

if __name__ == "__main__":
    children = [Child(serve, seconds, Limits(), starts_busy=False) for seconds in (3600, 0)]
    for child in children:
        child.send("start")
        wait_for([child])
        child.receive()
    print(*(child.pid for child in children), flush=True)
    time.sleep(3600)
"""


def test_a_killed_parent_leaves_no_child_behind_be_it_busy_or_idle(tmp_path):
    script = tmp_path / "parent.py"
    script.write_text(KILLED_PARENT)
    parent, pids = python(str(script)), []
    try:
        pids += [int(pid) for pid in parent.stdout.readline().split()]
        assert len(pids) == 2
        assert all(is_alive(pid) for pid in pids)
        parent.kill()
        parent.wait()
        wait_until_gone(*pids)
    finally:
        for pid in filter(is_alive, [parent.pid, *pids]):
            os.kill(pid, signal.SIGKILL)
        parent.communicate()
