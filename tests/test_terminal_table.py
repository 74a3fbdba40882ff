"""A table fits the terminal, and nothing of it is lost."""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fp8gate.filter import terminal_table
from fp8gate.filter.terminal_table import render_table, terminal_width, wrap

HEADERS = ("role", "linear", "count", "m", "k", "n", "train in", "speedup", "reason")
ROWS = [
    ("wq", "model.layers.*.self_attn.q_proj", 32, 8192, 4096, 4096, "float8", "1.34x", "by the plan of this block"),
    ("wk", "model.layers.*.self_attn.k_proj", 32, 8192, 4096, 1024, "bf16", "", "out of memory when it was measured"),
]
WIDE = """\
role  linear                           count     m     k     n  train in  speedup  reason
----  -------------------------------  -----  ----  ----  ----  --------  -------  ----------------------------------
wq    model.layers.*.self_attn.q_proj     32  8192  4096  4096  float8      1.34x  by the plan of this block
wk    model.layers.*.self_attn.k_proj     32  8192  4096  1024  bf16               out of memory when it was measured"""
AT_120 = WIDE
AT_110 = """\
                                                                train
role  linear                           count     m     k     n  in      speedup  reason
----  -------------------------------  -----  ----  ----  ----  ------  -------  -----------------------------
wq    model.layers.*.self_attn.q_proj     32  8192  4096  4096  float8    1.34x  by the plan of this block
wk    model.layers.*.self_attn.k_proj     32  8192  4096  1024  bf16             out of memory when it was
                                                                                 measured"""
AT_80 = """\
                                                                train
role  linear                           count     m     k     n  in       speedup
----  -------------------------------  -----  ----  ----  ----  -------  -------
wq    model.layers.*.self_attn.q_proj     32  8192  4096  4096  float8     1.34x
  reason: by the plan of this block
wk    model.layers.*.self_attn.k_proj     32  8192  4096  1024  bf16
  reason: out of memory when it was measured"""
AT_60 = """\
role  count     m     k     n  train in  speedup
----  -----  ----  ----  ----  --------  -------
wq       32  8192  4096  4096  float8      1.34x
  linear: model.layers.*.self_attn.q_proj
  reason: by the plan of this block
wk       32  8192  4096  1024  bf16
  linear: model.layers.*.self_attn.k_proj
  reason: out of memory when it was measured"""

PARTS = """\
speedup   256   512  1024  2048  4096
-------  ----  ----  ----  ----  ----
    256  1.05  1.05  1.05  1.05  1.05
    512  1.05  1.05  1.05  1.05  1.05

speedup  8192  16384  32768  65536
-------  ----  -----  -----  -----
    256  1.05   1.05   1.05   1.05
    512  1.05   1.05   1.05   1.05

speedup  131072
-------  ------
    256    1.05
    512    1.05"""


@pytest.mark.parametrize(("width", "text"), [(None, WIDE), (120, AT_120), (110, AT_110), (80, AT_80), (60, AT_60)])
def test_long_texts_wrap_then_move_beneath_their_row(monkeypatch, width, text):
    monkeypatch.delenv("COLUMNS", raising=False)
    assert render_table(HEADERS, ROWS, width=width) == text


def test_columns_of_numbers_are_dealt_out_over_several_tables():
    headers = ["speedup", *(str(2**power) for power in range(8, 18))]
    rows = [[str(k), *["1.05"] * 10] for k in (256, 512)]
    assert render_table(headers, rows, width=40) == PARTS
    assert render_table(headers, rows, width=80).count("speedup") == 1


def test_headers_wrap_at_their_spaces_and_end_at_the_rule():
    text = render_table(["change", "with the old decisions"], [["+1.0%", "-12.5%"]], width=20)
    assert text.splitlines() == [
        "        with the old",
        "change     decisions",
        "------  ------------",
        " +1.0%        -12.5%",
    ]


def test_a_number_is_never_wrapped_even_if_the_line_gets_too_long():
    shape = "(1234567890, 1234567890, 1234567890)"
    assert shape in render_table(["shape", "text"], [[shape, "some words that have to wrap"]], width=30)
    assert wrap(f"beside {shape} it", 20) == ["beside", shape, "it"]


def test_a_path_goes_on_after_a_slash():
    assert wrap("/home/someone/thresholds/nvidia-h200/rowwise.yaml", 26) == [
        "/home/someone/thresholds/",
        "nvidia-h200/rowwise.yaml",
    ]


def test_what_has_no_break_is_cut_to_the_width():
    assert wrap("x" * 25, 10) == ["x" * 10, "x" * 10, "x" * 5]


def test_wide_characters_take_two():
    assert render_table(["name", "n"], [["漢字漢字", 1]], width=80).splitlines()[1:] == ["--------  -", "漢字漢字  1"]


def test_no_rows_still_show_the_headers():
    assert render_table(["a", "bcd"], [], width=80) == "a  bcd\n-  ---"


def test_words_and_numbers_choose_the_side_and_align_overrides_them():
    rows = [["a", "failed", "1.5"], ["b", "1.25x", "2 of 3 runs"]]
    assert render_table(["t", "speedup", "note"], rows, width=80).splitlines()[2:] == [
        "a   failed  1.5",
        "b    1.25x  2 of 3 runs",
    ]
    left = render_table(["t", "speedup", "note"], rows, align=["left"] * 3, width=80).splitlines()
    assert left[3] == "b  1.25x    2 of 3 runs"


@pytest.mark.parametrize(
    ("columns", "is_terminal", "width"),
    [
        ("72", False, 72),
        ("72", True, 72),
        (None, False, None),
        ("", False, None),
        ("wide", False, None),
        (None, True, 99),
    ],
)
def test_the_width_is_that_of_the_terminal_or_as_asked_for(monkeypatch, columns, is_terminal, width):
    monkeypatch.delenv("COLUMNS", raising=False)
    if columns is not None:
        monkeypatch.setenv("COLUMNS", columns)
    monkeypatch.setattr(terminal_table.sys.stdout, "isatty", lambda: is_terminal, raising=False)
    monkeypatch.setattr(terminal_table.shutil, "get_terminal_size", lambda: terminal_table.os.terminal_size((99, 24)))
    assert terminal_width() == width


cells = st.one_of(
    st.integers(-(10**9), 10**9),
    st.floats(0, 1e6).map("{:.2f}x".format),
    st.text(st.characters(codec="utf-8", exclude_categories=["C", "Z", "M"]), max_size=60),
    st.lists(st.text("abc.", min_size=1, max_size=30), max_size=12).map(" ".join),
)


@given(st.integers(1, 12).flatmap(lambda size: st.lists(st.tuples(*[cells] * size), min_size=1, max_size=4)), st.data())
def test_every_line_fits_and_every_character_is_there(rows, data):
    width = data.draw(st.sampled_from([60, 80, 120]))
    headers = [f"h{index}" for index in range(len(rows[0]))]
    text = render_table(headers, rows, width=width)
    assert max(terminal_table._cell_len(line) for line in text.splitlines()) <= width
    shown = Counter(text)
    for character, count in Counter("".join(str(cell) for row in rows for cell in row)).items():
        if not character.isspace():
            assert shown[character] >= count
