"""What a person sees of a sweep."""

from __future__ import annotations

import io
from types import SimpleNamespace

import pytest
from rich.console import Console
from samples import PROTOCOLS, point_record, timed_arm

from fp8gate.calibrate.points.point_record import ArmRecord
from fp8gate.calibrate.sweep import progress
from fp8gate.calibrate.sweep.progress import Bar, Lines, describe, make_observer

ARMS = {
    "bf16": timed_arm([200.0] * 8),
    "tensorwise": timed_arm([150.0] * 8),
    "rowwise": ArmRecord(status="out_of_memory"),
}


@pytest.fixture
def clock(monkeypatch):
    """The time the module sees, in seconds."""
    clock = SimpleNamespace(now=100.0)
    monkeypatch.setattr(progress, "time", SimpleNamespace(monotonic=lambda: clock.now))
    return clock


def test_describe_gives_speedups_or_why_there_are_none():
    assert describe(point_record(arms=ARMS), PROTOCOLS) == "tensorwise 1.33x rowwise out_of_memory"


def test_describe_without_bf16_gives_its_status():
    arms = {**ARMS, "bf16": ArmRecord(status="failed")}
    assert describe(point_record(arms=arms), PROTOCOLS) == "tensorwise failed rowwise failed"


def test_lines_prints_one_line_a_point_with_the_time_left(capsys, clock):
    with Lines(4, PROTOCOLS, Console()) as lines:
        for m, now in ((16, 140.0), (32, 170.0), (48, 180.0), (64, 200.0)):
            clock.now = now
            lines.finished(point_record((m, 32, 16)))
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.splitlines() == [
        "[1/4] (16, 32, 16) tensorwise 2.00x, 1.5 s",  # compiling made it wait: no pace to go by yet
        "[2/4] (32, 32, 16) tensorwise 2.00x, 1.5 s, 1:00 left",
        "[3/4] (48, 32, 16) tensorwise 2.00x, 1.5 s, 0:20 left",
        "[4/4] (64, 32, 16) tensorwise 2.00x, 1.5 s, 0:00 left",
    ]


def test_lines_say_messages_as_they_are(capsys):
    Lines(1, PROTOCOLS, Console()).say("[bold]kept[/bold] as it is")
    assert capsys.readouterr().err == "[bold]kept[/bold] as it is\n"


def test_the_bar_shows_count_shape_and_last_speedups():
    screen = io.StringIO()
    with Bar(2, PROTOCOLS, Console(file=screen, force_terminal=True, width=200)) as bar:
        bar.say("[bold]kept[/bold] as it is")
        bar.finished(point_record((4096, 32, 16)))
    shown = screen.getvalue()
    assert "[bold]kept[/bold] as it is" in shown
    assert "1/2" in shown
    assert "tensorwise 2.00x" in shown
    assert "(4096, 32, 16)" in shown


@pytest.mark.parametrize(("is_terminal", "kind"), [(True, Bar), (False, Lines)])
def test_the_bar_is_for_terminals(monkeypatch, is_terminal, kind):
    monkeypatch.setattr(Console, "is_terminal", is_terminal)
    assert isinstance(make_observer(1, PROTOCOLS), kind)
