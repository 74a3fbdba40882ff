"""The newest release of torch that fp8gate was tested with, and what to say before measuring with a newer one.

In: the installed version. Out: a sentence, or None. Light to import: no torch.
Measuring uses private parts of torch, which any release may change: docs/torch-versions.md names them.
"""

from __future__ import annotations

import re

NEWEST_TESTED = (2, 15)
"""The last release that continuous integration tests. Raise it once the tests pass with a newer one."""


def untested(version: str | None) -> str | None:
    """What may go wrong with a torch that is newer than NEWEST_TESTED, and what to do; None for any other.

    None too for a version that does not begin with two numbers, or is not known.
    """
    found = re.match(r"(\d+)\.(\d+)", version or "")
    if found is None or (int(found[1]), int(found[2])) <= NEWEST_TESTED:
        return None
    major, minor = NEWEST_TESTED
    return (
        f"torch {version} is newer than {major}.{minor}, the last release that fp8gate was tested with. Measuring uses "
        "private parts of torch, which may have changed. If it fails, or many points have no number, go back: "
        f"pip install 'torch<{major}.{minor + 1}'"
    )
