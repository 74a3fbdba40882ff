"""The contrast of two colours, as WCAG 2 defines it. AA asks 4.5 of text."""

from __future__ import annotations

from collections.abc import Sequence

Colour = Sequence[float]  # red, green and blue, 0 to 1
AA = 4.5


def contrast(one: Colour, other: Colour) -> float:
    dark, light = sorted(map(_luminance, (one, other)))
    return (light + 0.05) / (dark + 0.05)


def _luminance(colour: Colour) -> float:
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in colour]
    return sum(weight * c for weight, c in zip((0.2126, 0.7152, 0.0722), linear, strict=True))
