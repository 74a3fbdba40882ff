"""Hypothesis strategies for files that were edited by hand, well or badly."""

from __future__ import annotations

from typing import Any

from hypothesis import strategies as st

NUMBERS = ["007", "1_000", "0x10", "0b1", "1:30", "1:30.5", "1e5", "1.0e+2", "1.", ".5", "+5", "-0", "-0.0", "0.0"]
NUMBERS += ["1e400", ".nan", ".inf", "NaN", "\u0663", "\u00b2", "9" * 12, "9" * 15 + ".0", "9" * 16 + ".0"]
NUMBERS += ["0." + "1" * 17, "0." + "1" * 18, "07.0", "-1.0", "1.0e+02", "1.0_0", "4", "1" + "0" * 320]
WORDS = [
    "null",
    "~",
    "Null",
    "true",
    "on",
    "yes",
    "failed",
    "''",
    "'measured'",
    '"measured"',
    "<<",
    "&a",
    "*a",
    "!!str",
]
WORDS += ["[", "]", "{", "}", ",", "'", '"', "points:", "?", "-", ":", "|", ">"]
SPACES = [" ", "\t", "\n", "\n\n", "\r\n", "\x85", "\u2028", "\ufeff", "# a", " # a", "\n# a\n", "? ", "- ", ": "]
LINES = [
    "---\n",
    "...\n",
    "\n---\n",
    "\n...\n",
    "%YAML 1.1\n",
    "|\n",
    ">\n",
    "points:\n",
    "\npoints:\n",
    "points: []\n",
]
LINES += ["x:\n", "? x\n", "x: a\n ", "x:\n- a\n", "x: |\n  a\n", "x: 'a\n", "x: [a,\n", "&a "]
TRICKS = [*NUMBERS, *WORDS, *SPACES, *LINES]
"""Texts that have a meaning in YAML or in JSON, or that look as if they had."""


@st.composite
def edited(draw, text: str) -> str:
    """The text with a few places replaced: by what has a meaning in YAML or JSON, by any text, by parts of itself."""
    for _ in range(draw(st.integers(1, 3))):
        at = draw(st.sampled_from(boundaries(text)) | st.integers(0, len(text)))
        until = draw(st.sampled_from([at, *(b for b in boundaries(text) if at <= b <= at + 80)]))
        insert = draw(st.sampled_from(TRICKS) | st.text(max_size=3) | st.just(text[at:until] * 2))
        text = text[:at] + insert + text[until:]
    return text


def boundaries(text: str) -> list[int]:
    """Where words, numbers and lines begin and end."""
    return [i for i in range(1, len(text)) if text[i - 1].isalnum() != text[i].isalnum() or text[i - 1] == "\n"] or [0]


JUNK = [None, True, False, 0, 1, -1, 2**31, 2**63, 2**64, 10**39, 0.5, -0.0, 1e-320, 1e308, float("inf"), float("nan")]
JUNK += ["", "x", "x" * 3000, "a\nb\x1b[31m", "16", [], [[]], [1, 2, 3], {}, {"a": {}}, {"": None}]


def places(value: Any) -> list[list[Any]]:
    """The paths of all values in plain data."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [[], *([key, *path] for key, child in items for path in places(child))]
