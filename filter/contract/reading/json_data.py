"""JSON text -> plain data, in bounded time and memory: a model's config.json, from anyone.

In: a text. Out: plain data without a key that an object has twice, or an error that says where.
"""

from __future__ import annotations

import itertools
import json
import math
import re
from typing import Any

from fp8gate.filter.contract.reading.plain_values import MAX_DIGITS

MAX_BYTES = 2**18
"""The largest file that is read. The config.json of a language model has 1,000 to 10,000 bytes."""
MAX_DEPTH = 32
"""Collections inside each other. A config of text, vision and quantization has about 5."""


def read_json(text: str) -> Any:
    """The text's value. Raises ValueError for anything else than JSON, and for what has another meaning elsewhere."""
    if _depth(text) > MAX_DEPTH:
        raise ValueError(f"expected at most {MAX_DEPTH} collections inside each other")
    return json.loads(text, object_pairs_hook=_object, parse_int=_integer)


def _depth(text: str) -> int:
    """How deep brackets outside of strings are nested. It is known before Python parses, which takes stack for each."""
    outside_strings = text.replace("\\\\", "").replace('\\"', "").split('"')[::2]
    brackets = re.sub(r"[^][{}]+", "", "".join(outside_strings))
    return max(itertools.accumulate(1 if bracket in "[{" else -1 for bracket in brackets), default=0)


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    items: dict[str, Any] = {}
    for key, value in pairs:
        if key in items:
            raise ValueError(f"key {key!r} is there twice")
        items[key] = value
    return items


def _integer(digits: str) -> float:
    """A number of too many digits is infinite, which no field allows."""
    return int(digits) if len(digits) <= MAX_DIGITS else math.inf
