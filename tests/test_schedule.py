"""The order in which points are dealt out, and how often one is tried again."""

from __future__ import annotations

from fp8gate.calibrate.points.task_queue import MAX_DEATHS, MAX_RETRIES, Task, TaskQueue
from fp8gate.filter.contract.shapes import LinearShape

SHAPES = [LinearShape(16, 16, n) for n in (16, 32, 48)]
A, B, C = (Task(shape) for shape in SHAPES)
A_AGAIN, B_AGAIN = (Task(shape, repeat=True) for shape in SHAPES[:2])


def dealt(schedule, measured=()):
    """All that is left for such a process, in order."""
    return list(iter(lambda: schedule.next(measured), None))


def test_tasks_are_dealt_out_once_and_in_order():
    schedule = TaskQueue([B, A_AGAIN, A])
    assert dealt(schedule) == [B, A_AGAIN, A]
    assert schedule.next() is None


def test_an_empty_schedule_has_nothing_to_deal():
    assert dealt(TaskQueue([])) == []
    assert not TaskQueue([])


def test_a_process_repeats_no_shape_that_it_measured():
    schedule = TaskQueue([A_AGAIN, B_AGAIN, C])
    assert dealt(schedule, measured={A.shape, C.shape}) == [B_AGAIN, C]
    assert schedule.next({A.shape}) is None
    assert schedule.next({B.shape}) == A_AGAIN


def test_a_point_is_not_a_repeat_though_its_shape_was_measured():
    assert dealt(TaskQueue([A, B]), measured={A.shape, B.shape}) == [A, B]


def test_a_point_given_back_does_not_go_where_it_was_repeated():
    schedule = TaskQueue([A, A_AGAIN])
    assert [schedule.next(), schedule.next()] == [A, A_AGAIN]
    schedule.give_back(A)
    assert schedule.next({A.shape}) is None
    assert schedule  # it is left for another process
    assert schedule.next() == A
    assert not schedule


def test_what_is_given_back_comes_after_all_others():
    schedule = TaskQueue([A, B, C, A_AGAIN])
    assert (schedule.next(), schedule.next()) == (A, B)
    assert schedule.may_retry(B)
    assert schedule.may_try_after_death(A)
    assert dealt(schedule) == [C, A_AGAIN, B, A]


def test_a_repeat_that_is_given_back_still_needs_another_process():
    schedule = TaskQueue([A_AGAIN])
    assert schedule.may_retry(schedule.next())
    assert schedule.next({A.shape}) is None
    assert schedule.next() == A_AGAIN


def test_numbers_not_to_be_trusted_are_taken_again_only_so_often():
    schedule = TaskQueue([A])
    for _ in range(MAX_RETRIES):
        assert schedule.may_retry(schedule.next())
    assert schedule.next() == A
    assert not schedule.may_retry(A)
    assert schedule.next() is None
    assert MAX_RETRIES == 2


def test_a_point_whose_processes_die_is_tried_only_so_often():
    schedule = TaskQueue([A])
    for _ in range(MAX_DEATHS - 1):
        assert schedule.may_try_after_death(schedule.next())
    assert schedule.next() == A
    assert not schedule.may_try_after_death(A)
    assert schedule.next() is None
    assert MAX_DEATHS == 2


def test_each_task_has_its_own_tries():
    schedule = TaskQueue([])
    for _ in range(MAX_RETRIES):
        assert schedule.may_retry(A)
    assert not schedule.may_retry(A)
    assert schedule.may_retry(B)
    assert schedule.may_retry(A_AGAIN)
    assert schedule.may_try_after_death(A)


def test_retries_are_counted_however_they_came_about():
    schedule = TaskQueue([A, B])
    assert schedule.retries == 0
    schedule.may_retry(A)
    schedule.may_retry(A)
    schedule.may_try_after_death(B)
    assert schedule.retries == 3


def test_what_is_not_tried_again_is_no_retry():
    schedule = TaskQueue([])
    for _ in range(MAX_RETRIES + 1):
        schedule.may_retry(A)
    for _ in range(MAX_DEATHS):
        schedule.may_try_after_death(B)
    assert schedule.retries == MAX_RETRIES + MAX_DEATHS - 1
