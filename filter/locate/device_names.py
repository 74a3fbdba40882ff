"""Match a device's name as people write it ("H200", "h100") to the devices that were measured. Pure.

In: a name, and the names of devices. Out: the one device that is meant, or an error that names the ones in question.
"""

from __future__ import annotations

import difflib
from collections.abc import Sequence

from fp8gate.filter.contract.devices import device_slug
from fp8gate.filter.contract.errors import InputError

MAX_SUGGESTED = 3
ALIKE = 0.93  # of difflib's ratio: "NVIDIA H20" is like "NVIDIA H200", "NVIDIA H100" is not


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
    words = set(slug.split("-"))
    has_model = any(character.isdigit() for character in slug)
    fitting = equal or [one for one in known if has_model and words <= set(one.split("-"))]
    if len(fitting) > 1:
        raise InputError(f"device: {asked!r} fits several measured devices, {', '.join(fitting)}; name one of them")
    return fitting[0] if fitting else None


def suggestions(asked: str, known: Sequence[str]) -> list[str]:
    """The known slugs that look like a name, the most alike first."""
    slug = device_slug(asked)
    by_words = [one for one in known if set(slug.split("-")) & set(one.split("-")) - {"nvidia", "cpu", "amd"}]
    alike = difflib.get_close_matches(slug, known, MAX_SUGGESTED, ALIKE)
    return list(dict.fromkeys([*by_words, *alike]))[:MAX_SUGGESTED]


def _letters(slug: str) -> str:
    return slug.replace("-", "")
