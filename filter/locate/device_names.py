"""Match a device's name as people write it ("H200", "h100") to the devices that were measured. Pure.

In: a name, and the names of devices. Out: the one device that is meant, or an error that names the ones in question.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from fp8gate.filter.contract.devices import device_slug
from fp8gate.filter.contract.errors import InputError

MAX_SUGGESTED = 3
VENDORS = {"nvidia", "amd", "intel", "cpu"}
_MEMORY = re.compile(r"\d+gb|hbm\d\w?|sxm\d?|pcie")
"""Words of a device's name that do not tell which model it is."""


def match_device(asked: str, known: Sequence[str]) -> str | None:
    """The known slug that a name means; None if it means none of them.

    asked: any spelling whose words are all among the device's, one of them with a digit in it: "H200" means
    "nvidia-h200", "NVIDIA" alone means nothing. known: slugs of devices. An equal slug counts before a part of one.
    Raises InputError if the name fits several devices.
    """
    slug = device_slug(asked)
    if slug in known:
        return slug
    equal = [one for one in known if _letters(one) == _letters(slug)]
    words = set(slug.split("-")) - VENDORS
    has_model = any(re.search(r"\d", word) and not _MEMORY.fullmatch(word) for word in words)
    whole = [one for one in known if words == set(one.split("-")) - VENDORS]
    fitting = equal or whole or [one for one in known if has_model and words <= set(one.split("-"))]
    if len(fitting) > 1:
        raise InputError(f"device: {asked!r} fits several measured devices, {', '.join(fitting)}; name one of them")
    return fitting[0] if fitting else None


def suggestions(asked: str, known: Sequence[str]) -> list[str]:
    """The known slugs that share a word with a name, beside the vendor's: "H200 NVL" may mean "nvidia-h200"."""
    words = set(device_slug(asked).split("-")) - VENDORS
    return [one for one in known if words & set(one.split("-"))][:MAX_SUGGESTED]


def _letters(slug: str) -> str:
    return slug.replace("-", "")
