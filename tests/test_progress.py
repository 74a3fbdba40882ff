"""What a person sees of a sweep."""

from __future__ import annotations

import io
import re
from types import SimpleNamespace

import pytest
from rich.console import Console
from samples import PROTOCOLS, point_record, timed_arm

from fp8gate.calibrate.points.point_record import ArmRecord
from fp8gate.calibrate.sweep import progress
from fp8gate.calibrate.sweep.progress import Bar, Lines, Steps, StepsBar, describe, make_observer, steps_bar

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
        "[4/4] (64, 32, 16) tensorwise 2.00x, 1.5 s",
    ]


def test_lines_say_messages_as_they_are(capsys):
    Lines(1, PROTOCOLS, Console()).say("[bold]kept[/bold] as it is")
    assert capsys.readouterr().err == "[bold]kept[/bold] as it is\n"


RECIPES_DONE = {recipe: timed_arm([150.0] * 8) for recipe in PROTOCOLS}
LAST = "(16384, 32768, 128) tensorwise 1.33x rowwise 1.33x rowwise_with_gw_hp 1.33x"


@pytest.mark.parametrize("width", [60, 80, 120])
def test_the_bar_shows_count_bar_and_time_left_at_any_width(clock, width):
    console = Console(file=io.StringIO(), force_terminal=True, width=width)
    arms = {"bf16": timed_arm([200.0] * 8), **RECIPES_DONE}
    with Bar(12, PROTOCOLS, console) as bar:
        for _ in range(5):
            clock.now += 10.0
            bar.finished(point_record((16384, 32768, 128), arms=arms))
        lines = console.render_lines(bar._progress.get_renderable(), pad=False)
    first, *last = ["".join(part.text for part in line) for line in lines]
    assert re.fullmatch(" 5/12 ━{10,}[╸╺]━+ 0:01:10 left", first)
    assert max(map(len, [first, *last])) <= width
    assert " ".join(line.strip() for line in last) == LAST


def test_the_bar_says_messages_as_they_are():
    screen = io.StringIO()
    with Bar(2, PROTOCOLS, Console(file=screen, force_terminal=True, width=80)) as bar:
        bar.say("[bold]kept[/bold] as it is")
        bar.finished(point_record((4096, 32, 16)))
    assert "[bold]kept[/bold] as it is" in screen.getvalue()
    assert "1/2" in screen.getvalue()
    assert "(4096, 32, 16) tensorwise 2.00x" in screen.getvalue()


@pytest.mark.parametrize("width", [60, 80, 120])
def test_the_bar_of_a_plan_shows_count_bar_and_time_left_at_any_width(clock, width):
    console = Console(file=io.StringIO(), force_terminal=True, width=width)
    with StepsBar(console) as bar:
        for total, done in ((3, 3), (12, 5)):  # one series after another, each with its own pace
            steps = Steps(total)
            for _ in range(done):
                clock.now += 10.0
                steps.one_more()
                bar.show(steps, "visits")
        lines = console.render_lines(bar._progress.get_renderable(), pad=False)
    first, last = ["".join(part.text for part in line) for line in lines]
    assert re.fullmatch(" 5/12 ━{10,}[╸╺]━+ 0:01:10 left", first)
    assert len(first) <= width
    assert last.strip() == "visits"


@pytest.mark.parametrize("is_terminal", [True, False])
@pytest.mark.parametrize("is_wanted", [True, False])
def test_a_plan_has_a_bar_on_a_terminal_where_it_is_wanted(monkeypatch, is_terminal, is_wanted):
    monkeypatch.setattr(Console, "is_terminal", is_terminal)
    assert isinstance(steps_bar(is_wanted), StepsBar) == (is_terminal and is_wanted)


@pytest.mark.parametrize(("is_terminal", "kind"), [(True, Bar), (False, Lines)])
def test_the_bar_is_for_terminals(monkeypatch, is_terminal, kind):
    monkeypatch.setattr(Console, "is_terminal", is_terminal)
    assert isinstance(make_observer(1, PROTOCOLS), kind)
