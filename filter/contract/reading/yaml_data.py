"""YAML text -> plain data, in bounded time and memory.

In: a text of anyone. Out: mappings, lists and scalars, or an error that names the line. YAML's events are read one by
one, so nothing is built from what is refused: anchors, aliases, merge keys, tags, a key that a mapping has twice, and
numbers in base 60.
It is always PyYAML's own scanner that reads, never libyaml: the two accept slightly different texts, and what a file
says must not depend on what is installed.
"""

from __future__ import annotations

import math
from typing import Any, NoReturn

import yaml
from yaml import ScalarNode
from yaml.events import AliasEvent, CollectionEndEvent, Event, MappingStartEvent, ScalarEvent, StreamEndEvent

from fp8gate.filter.contract.reading.plain_values import MAX_DIGITS, Path, field_name

MAX_CHARACTERS = 2**17
"""The longest text that is read; the largest plan, 128 sets of 7 roles, has 17,000. PyYAML takes up to 1 us for a
character and 10 us for a token, so the two bounds keep the time below half a second."""
MAX_TOKENS = 30_000
"""YAML's words and signs. The largest plan has 4,000. A table has 25 a point, unless `point_rows` reads its points."""
MAX_DEPTH = 8
"""Collections inside each other. A plan has 4: its mapping, its candidates, one candidate, the candidate's roles."""
MAX_SHOWN = 80
"""Characters of what is refused that a message shows."""


class NotPlainError(yaml.YAMLError):
    """A text that is YAML, but more than plain data."""


def read_yaml(text: str) -> Any:
    """The text's only document as plain data; None if there is no document.

    Raises yaml.YAMLError for all other texts.
    """
    if len(text) > MAX_CHARACTERS:
        raise NotPlainError(f"expected at most {MAX_CHARACTERS:,} characters, found {len(text):,}")
    if text.startswith("\ufeff"):
        raise NotPlainError("expected UTF-8 without a byte order mark")
    events = _Events(text)
    events.take()  # the stream's start
    if events.check_event(StreamEndEvent):
        return None
    events.take()  # the document's start
    data = _value(events, None, depth=0)
    events.take()  # the document's end
    if not events.check_event(StreamEndEvent):
        raise NotPlainError("expected a single document, found another one")
    return data


class _Events(yaml.SafeLoader):
    """PyYAML's events of a text. It refuses a text of too many tokens before it reads them all."""

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self._tokens_left = MAX_TOKENS

    def take(self) -> Any:
        """The next event, which is then behind."""
        return self.get_event()  # type: ignore[no-untyped-call]

    def ahead(self) -> Event:
        """The next event, which stays ahead."""
        event: Event = self.peek_event()  # type: ignore[no-untyped-call]
        return event

    def fetch_more_tokens(self) -> None:
        self._tokens_left -= 1
        if self._tokens_left < 0:
            raise NotPlainError(f"expected at most {MAX_TOKENS:,} words and signs of YAML, found more")
        try:
            super().fetch_more_tokens()
        except (ValueError, OverflowError) as cause:  # an escape such as "\Uffffffff", which is no character
            raise NotPlainError(f"line {self.line + 1}: {cause}") from cause

    def fetch_directive(self) -> None:
        raise NotPlainError("expected no directive, such as %YAML or %TAG")


def _value(events: _Events, path: Path, *, depth: int) -> Any:
    event = events.take()
    if isinstance(event, AliasEvent) or event.anchor is not None:
        _refuse(event, path, f"an anchor or an alias, {event.anchor[:MAX_SHOWN]!r}")
    if event.tag is not None:
        _refuse(event, path, f"a tag, {event.tag[:MAX_SHOWN]!r}")
    if isinstance(event, ScalarEvent):
        return _scalar(events, event, path)
    if depth == MAX_DEPTH:
        _refuse(event, path, f"collections inside each other, more than {MAX_DEPTH}")
    collection = _mapping if isinstance(event, MappingStartEvent) else _list
    return collection(events, path, depth=depth + 1)


def _list(events: _Events, path: Path, *, depth: int) -> list[Any]:
    items: list[Any] = []
    while not events.check_event(CollectionEndEvent):
        items.append(_value(events, (path, len(items)), depth=depth))
    events.take()
    return items


def _mapping(events: _Events, path: Path, *, depth: int) -> dict[str, Any]:
    items: dict[str, Any] = {}
    while not events.check_event(CollectionEndEvent):
        event = events.ahead()
        key = _value(events, path, depth=depth)
        if not isinstance(key, str):
            _refuse(event, path, f"a key that is no text, {str(key)[:MAX_SHOWN]!r}")
        if key in items:
            _refuse(event, path, f"a key twice: key {key[:MAX_SHOWN]!r} is there twice")
        items[key] = _value(events, (path, key), depth=depth)
    events.take()
    return items


def _scalar(events: _Events, event: ScalarEvent, path: Path) -> Any:
    """The value that YAML 1.1 reads in a scalar, as PyYAML constructs it. A number of too many digits is infinite."""
    tag: str = events.resolve(ScalarNode, event.value, event.implicit)  # type: ignore[no-untyped-call]
    kind = tag.rpartition(":")[2]
    if kind == "str":
        return event.value
    if kind not in ("null", "bool", "int", "float", "timestamp"):
        _refuse(event, path, f"a {kind} key, {event.value!r}")
    if kind in ("int", "float") and ":" in event.value:
        _refuse(event, path, f"a number in base 60, {event.value[:MAX_SHOWN]!r}; text such as this needs quotes")
    if kind == "int" and len(event.value) > MAX_DIGITS:
        return math.inf
    try:
        return events.yaml_constructors[tag](events, ScalarNode(tag, event.value))
    except (ValueError, OverflowError) as cause:  # such as a 13th month
        _refuse(event, path, f"{event.value[:MAX_SHOWN]!r}: {cause}")


def _refuse(event: Event, path: Path, found: str) -> NoReturn:
    line = event.start_mark.line + 1 if event.start_mark else 0
    raise NotPlainError(f"{field_name(path)}, line {line}: expected plain data, found {found}")
