"""Files that should hurt no reader, and a process that reads files under limits.

In: a valid file of a kind. Out: hostile files made from it, by group; and how reading a file ended.
Run as a program it answers requests, one JSON object a line:
    echo '{"kind": "table", "path": "FILE.yaml"}' | python tests/hostile.py
"""

from __future__ import annotations

import json
import os
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

MIB = 2**20
MAX_PROCESS_BYTES = 200 * MIB  # the whole process that reads, Python and fp8gate included
MAX_CPU_S = 1
MAX_WALL_S = 5  # a reader that waits takes no processor time
NUMBERS = (".nan", ".inf", "-.inf", "1.0e+400", "1" + "0" * 320, "1" * 5000, "-1" + "0" * 320, "0x" + "f" * 400)
JSON_NUMBERS = ("NaN", "Infinity", "-Infinity", "1e400", "1" + "0" * 320, "1" * 5000, "-1" + "0" * 320, "9" * 200_000)
TAGS = ("!!python/object/apply:os.system ['true']", "!!python/name:os.system", "!!binary aGk=", "!!set {a}", "! a")
READ = 120_000
"""Characters of a text that readers still read."""
NOT_READ = 2_000_000

Files = Iterator[tuple[str, bytes]]


# --- the corpus ------------------------------------------------------------------------------------------------


def encodings(valid: str) -> Files:
    """Bytes that are no UTF-8 text, and files that are too large."""
    content = valid.encode()
    yield "empty", b""
    yield "null characters", content + b"\0" * 1000
    yield "only null characters", b"\0" * 100_000
    yield "no UTF-8", content.replace(b"a", b"\xff", 1)
    yield "cut within a character", content + "é".encode()[:1]
    yield "a byte order mark", b"\xef\xbb\xbf" + content
    yield "UTF-16", valid.encode("utf-16")
    yield "binary", bytes(range(256)) * 400
    yield "20 MiB of spaces", b" " * (20 * MIB)
    yield "12 MiB of characters of 4 bytes", "\U0001f600".encode() * (3 * MIB)


def in_yaml(values: dict[str, str], valid: str) -> Files:
    """Each value as a whole file, and as the value of the first key of a valid file, a mapping in block style."""
    first, _, rest = valid.partition("\n")
    for name, value in values.items():
        yield name, value.encode()
        yield f"{name}, in a field", f"{first.partition(':')[0]}: {value}\n{rest}".encode()


def around_yaml(valid: str) -> Files:
    """Hostile texts before and after a valid file."""
    yield "a key twice", f"{valid}{valid.partition(':')[0]}: 1\n".encode()
    yield "a key that breaks lines", b'"a\\nb\\e[31m\\u202e": 1\n' + valid.encode()
    yield "a second document", f"{valid}---\n{valid}".encode()
    yield "dashes after a valid file", f"{valid}{'- ' * 60_000}".encode()
    yield (
        "a costly head",
        f"{valid.partition(chr(10))[0]}\nx: [{'1,' * 14_000}*a]\n{valid.partition(chr(10))[2]}".encode(),
    )


def nested() -> dict[str, str]:
    """Collections inside each other, far deeper than any stack."""
    texts = {f"{n} dashes": "- " * n for n in (1000, 30_000, 60_000)}
    texts |= {f"{n} open brackets": "[" * n for n in (100, 1000, 30_000, 120_000)}
    texts |= {f"{n} brackets": "[" * n + "]" * n for n in (9, 1000, 60_000)}
    texts |= {f"{n} braces": "{a: " * n for n in (1000, 30_000)}
    texts |= {"open braces": "{" * READ, "questions": "? " * 60_000, "colons": ": " * 60_000}
    return texts | {"indented keys": "\n" + "".join(f"{' ' * (i + 1)}a:\n" for i in range(400))}


def multiplied() -> dict[str, str]:
    """Short texts that stand for much: aliases, merge keys, numbers in base 60, many keys."""
    lists = "".join(f"  - &l{i} [{', '.join([f'*l{i - 1}'] * 9)}]\n" for i in range(1, 10))
    merged = "".join(f"  - &m{i}\n    <<: [{', '.join([f'*m{i - 1}'] * 9)}]\n" for i in range(1, 10))
    return {
        "aliases of lists": f"\n  - &l0 [x, x, x, x, x, x, x, x, x]\n{lists}",
        "aliases of mappings": f"\n  - &m0 {{a: 1}}\n{merged}",
        "merge keys": "{<<: {<<: {<<: {a: 1}}}}",
        "a list in itself": "&a [*a]",
        "anchors": " ".join(f"&a{i}" for i in range(15_000)),
        "base 60": ":".join(["1", *["59"] * 40_000]),
        "base 60, short": "1:59:59",
        "base 60, with a fraction": ":".join(["1", *["59"] * 2000]) + ".5",
        **{f"{n} keys": "\n" + "".join(f"  k{i}: 1\n" for i in range(n)) for n in (4000, 20_000, 60_000)},
        "5000 keys, one twice": "{" + "".join(f"k{i}: 1, " for i in range(5000)) + "k7: 1}",
        "a long key": '\n  ? "' + "k" * 90_000 + '"\n  : [' + ".inf, " * 4000 + "1]",
    }


def long(n: int) -> dict[str, str]:
    """About n characters of one thing."""
    return {
        "text": "x" * n,
        "words": "x " * (n // 2),
        "digits": "7" * n,
        "digits of a fraction": "0." + "7" * n,
        "spaces": " " * n + "x",
        "tabs": "\t" * n,
        "line breaks": "\n" * n + "x",
        "comments": "\n" + "#\n" * (n // 2) + " x",
        "quoted lines": '"' + "x\n " * (n // 3) + '"',
        "escapes": '"' + "\\x1b" * (n // 4) + '"',
        "backslashes": '"' + "\\" * n,
        "quotes": "'" * n,
        "an open quote": '"' + "x" * n,
        "lines": "|\n" + "  x\n" * (n // 4),
        "folded lines": ">\n" + "  x\n\n" * (n // 5),
        "a list": "[" + "1," * (n // 2) + "1]",
        "empty lists": "[" + "[]," * (n // 3) + "1]",
        "commas": "[" + "," * n,
        "documents": "\n" + "---\n" * (n // 4),
        "directives": "\n" + "%A\n" * (n // 3),
        "a version": f"\n%YAML 1.{'1' * n}\n---\n",
        "a tag": "!" + "x" * n,
        "an anchor": "&" + "x" * n,
    }


def no_plain_data() -> dict[str, str]:
    """Values that are no plain data, and numbers and characters that are none."""
    texts = {f"tag {tag}": tag for tag in TAGS}
    texts |= {f"number {number[:8]} of {len(number)} characters": number for number in NUMBERS}
    texts |= {f"{name}, in lists": f"[[[{text}]]]" for name, text in texts.items()}
    texts |= {"a character that is none": '"\\Uffffffff"', "half a surrogate pair": '"\\ud800"'}
    return texts | {"a 13th month": "2026-13-01", "a zone of 99 hours": "2026-01-01T00:00:00+99:00", "no digits": "0x_"}


YAML_GROUPS: dict[str, Callable[[str], Files]] = {
    "encodings": encodings,
    "around": around_yaml,
    "nested": lambda valid: in_yaml(nested(), valid),
    "multiplied": lambda valid: in_yaml(multiplied(), valid),
    "long": lambda valid: in_yaml(long(READ), valid),
    "too long": lambda valid: in_yaml(long(NOT_READ), valid),
    "no plain data": lambda valid: in_yaml(no_plain_data(), valid),
}


def hostile_json(valid: str) -> Files:
    """Each value as a whole file, and as that of a field of a valid file, an object."""
    rest = valid.strip()[1:]
    for name, value in _json_values().items():
        yield name, value.encode()
        yield f"{name}, in a field", f'{{"x": {value}, {rest}'.encode()
    for n in (15_000, 60_000):
        yield f"{n} keys, one twice", ("{" + "".join(f'"k{i}": 1,' for i in range(n)) + '"k7": 1,' + rest).encode()
    yield "a key twice", f'{{"model_type": "llama", {rest}'.encode()
    yield "a long key", ('{"' + "k" * 100_000 + '": [' + "1e999," * 20_000 + "1], " + rest).encode()


def _json_values() -> dict[str, str]:
    values = {f"number {number[:8]} of {len(number)} characters": number for number in JSON_NUMBERS}
    values |= {f"{n} brackets": "[" * n + "]" * n for n in (100, 1000, 100_000)}
    values |= {f"{n} open brackets": "[" * n for n in (1000, 250_000)}
    return values | {
        "braces": '{"a":' * 40_000 + "1" + "}" * 40_000,
        "brackets in a text that is open": '"' + '[\\"' * 80_000,
        "backslashes": '"' + "\\\\" * 120_000,
        "half a surrogate pair": '"\\ud800"',
        "lists": "[" + "[]," * 80_000 + ".1e",
        "objects": "[" + '{"a":1},' * 30_000 + "x",
    }


JSON_GROUPS: dict[str, Callable[[str], Files]] = {"encodings": encodings, "values": hostile_json}


# --- reading under limits --------------------------------------------------------------------------------------


class LimitedReader:
    """This module as a process that reads files under limits. options: those of `main`."""

    def __init__(self, folder: Path, *options: str) -> None:
        self._path = folder / "hostile.file"
        self._process = subprocess.Popen(
            [sys.executable, __file__, *options],
            env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[1] / "src")},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def ask(self, kind: str, path: str, **more: int) -> dict[str, Any]:
        """How reading the file ended: "ended" is "value", an error's class or a signal; further "message", "cpu_s"."""
        assert self._process.stdin
        assert self._process.stdout
        self._process.stdin.write(json.dumps({"kind": kind, "path": path, **more}) + "\n")
        self._process.stdin.flush()
        answer: dict[str, Any] = json.loads(self._process.stdout.readline())
        return answer

    def read(self, kind: str, content: bytes, **more: int) -> dict[str, Any]:
        """As `ask`, for a file with this content."""
        self._path.write_bytes(content)
        return self.ask(kind, str(self._path), **more)

    def end(self) -> int:
        self._process.communicate()
        return self._process.returncode


def readers() -> dict[str, Callable[[str], Any]]:
    """What reads each kind of file that comes from others, and three readers that break the limits."""
    from fp8gate.calibrate.grid.grid import load_grid
    from fp8gate.filter.contract.plans.plan_file import read_plan
    from fp8gate.filter.contract.table import read_table
    from fp8gate.filter.model.model_config import load_model

    return {
        "table": read_table,
        "plan": read_plan,
        "grid": lambda path: load_grid(path, "cpu"),
        "config": load_model,
        "slow": lambda path: sum(range(10**12)),
        "large": lambda path: bytearray(MAX_PROCESS_BYTES),
        "waiting": lambda path: time.sleep(10 * MAX_WALL_S),
    }


def read_in_child(read: Callable[[str], Any], path: str, max_bytes: int) -> dict[str, Any]:
    """How reading the file ends in a process of its own: with a value, an error, or a signal."""
    receiver, sender = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(receiver)
        with os.fdopen(sender, "w") as pipe:
            pipe.write(json.dumps(_limited(read, path, max_bytes)))
        os._exit(0)
    os.close(sender)
    with os.fdopen(receiver) as pipe:
        answer = pipe.read()
    status = os.waitpid(child, 0)[1]
    return json.loads(answer) if answer else {"ended": signal.Signals(os.WTERMSIG(status)).name}


def _limited(read: Callable[[str], Any], path: str, max_bytes: int) -> dict[str, Any]:
    signal.alarm(MAX_WALL_S)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_CPU, (MAX_CPU_S, MAX_CPU_S + 1))
    resource.setrlimit(resource.RLIMIT_AS, (max_bytes, max_bytes))
    start_s = time.process_time()
    try:
        ended, message = "value", type(read(path)).__name__
    except BaseException as error:
        ended, message = type(error).__name__, str(error)
    return {"ended": ended, "message": message, "cpu_s": time.process_time() - start_s}


def process_bytes() -> int:
    """The address space of this process."""
    return int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()


def main() -> None:
    """Answer requests. extra_bytes: allowed beyond what the process has, instead of MAX_PROCESS_BYTES in all.

    --without-libyaml: as if PyYAML had been built without it.
    """
    if "--without-libyaml" in sys.argv:
        sys.modules["yaml._yaml"] = None  # type: ignore[assignment]
    read = readers()
    import yaml

    assert yaml.__with_libyaml__ != ("--without-libyaml" in sys.argv)
    for line in sys.stdin:
        request = json.loads(line)
        extra = request.get("extra_bytes")
        max_bytes = process_bytes() + extra if extra else MAX_PROCESS_BYTES
        print(json.dumps(read_in_child(read[request["kind"]], request["path"], max_bytes)), flush=True)


if __name__ == "__main__":
    main()
