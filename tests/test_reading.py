"""The bounds on files from anyone: what is just below them is read, what is just above is refused."""

from __future__ import annotations

import time

import pytest
import yaml

from fp8gate.filter.contract.reading.file_bytes import UnreadableError, read_regular, read_utf8
from fp8gate.filter.contract.reading.json_data import read_json
from fp8gate.filter.contract.reading.messages import MAX_END, MAX_MESSAGE, FileError, one_line
from fp8gate.filter.contract.reading.plain_values import MAX_NUMBER, field_name, require_plain_values
from fp8gate.filter.contract.reading.yaml_data import MAX_CHARACTERS, MAX_TOKENS, read_yaml

ITEMS = (MAX_TOKENS - 7) // 2
"""Items of `{a: [1, ...]}` with as many tokens as are read: two an item, and seven around them with the stream's."""


def test_characters_are_bounded():
    text = "a" * MAX_CHARACTERS
    assert read_yaml(text) == text
    with pytest.raises(yaml.YAMLError, match="expected at most 131,072 characters, found 131,073"):
        read_yaml(f"{text}a")


def test_tokens_are_bounded():
    assert len(read_yaml(f"{{a: [{'1,' * ITEMS}]}}")["a"]) == ITEMS
    with pytest.raises(yaml.YAMLError, match="expected at most 30,000 words and signs of YAML, found more"):
        read_yaml(f"{{a: [{'1,' * (ITEMS + 1)}]}}")


@pytest.mark.parametrize(
    ("data", "complaint"),
    [
        ({"a": [0, MAX_NUMBER * 1.001]}, r"\$\.a\[1\]: expected a finite number, at most 9.22e\+18 either way"),
        ({"a": [0, -MAX_NUMBER * 1.001]}, r"\$\.a\[1\]: expected a finite number"),
        ({"a": {"b": float("nan")}}, r"\$\.a\.b: expected a finite number, .* found nan"),
        ({"a": ["\ud800"]}, r"\$\.a\[0\]: expected Unicode text"),
        ({"a": {"\ud800": 1}}, r"\$\.a: expected Unicode text"),
        ([float("inf"), float("nan")], r"\$\[0\]: .* found inf"),  # the first of them is named
    ],
)
def test_values_are_bounded(data, complaint):
    with pytest.raises(FileError, match=f"^FILE: {complaint}"):
        require_plain_values(data, source="FILE", error=FileError, on_one_line=False)


@pytest.mark.parametrize("value", [MAX_NUMBER, -MAX_NUMBER, 2**63, True, None, "é\n\0", {}, []])
def test_values_within_bounds_are_plain(value):
    require_plain_values({"a": [value]}, source="FILE", error=FileError, on_one_line=False)


def test_a_field_is_named_as_msgspec_names_it():
    assert field_name((((None, "points"), 1), "m")) == "$.points[1].m"
    assert field_name(None) == "$"


@pytest.mark.parametrize("text", ["[1", '{"a": 1,}', "nan", "'a'", "1 2", "", "\ufeff1", '{"a": 1, "a": 1}'])
def test_what_is_no_json_is_refused(text):
    with pytest.raises(ValueError, match=r"\w"):
        read_json(text)


def test_a_file_is_read_up_to_its_bound(tmp_path):
    path = tmp_path / "x"
    path.write_bytes(b"a\r\nb\r")
    assert read_regular(path, at_most=5) == b"a\r\nb\r"
    assert read_utf8(path, at_most=5) == "a\nb\n"
    with pytest.raises(UnreadableError, match=r"^expected at most 4 bytes$"):
        read_regular(path, at_most=4)


def test_a_file_of_several_blocks_is_read_whole(tmp_path):
    content = b"0123456789" * 300_000
    (tmp_path / "x").write_bytes(content)
    assert read_regular(tmp_path / "x", at_most=2**22) == content


def test_a_message_is_one_short_line():
    assert one_line("a\nb\x1b[31m\u202e\ud800é") == r"a\nb\x1b[31m\u202e\ud800é"
    for text in ("x" * 5000 + "end", "\n" * 5000 + "end", "\U000e0001" * 990 + "end"):
        short = one_line(text)
        assert len(short) == MAX_MESSAGE
        assert short.endswith("end")
        assert short[MAX_MESSAGE - MAX_END - 5 : MAX_MESSAGE - MAX_END] == " ... "
        assert one_line(short) == short
    assert one_line("x" * MAX_MESSAGE) == "x" * MAX_MESSAGE


def test_a_message_of_a_whole_file_is_shortened_before_it_is_escaped():
    start_s = time.process_time()
    assert len(one_line("\n" * 12 * 2**20)) == MAX_MESSAGE
    assert time.process_time() - start_s < 0.1
