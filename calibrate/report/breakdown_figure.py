"""A breakdown as a picture: a bar for each arm, with a part for each kernel.

In: a `Breakdown`, a file. Out: a PNG.
"""

from __future__ import annotations

from pathlib import Path

from matplotlib.figure import Figure
from matplotlib.patches import Patch

from fp8gate.calibrate.breakdown.breakdown_record import Breakdown, KernelKind
from fp8gate.calibrate.breakdown.story import outcome, reasons, title

COLORS: dict[KernelKind, tuple[str, str]] = {
    "product": ("#1f6fb4", "#7db4dd"),
    "cast": ("#d9680f", "#f5b27a"),
}
"""For each kind, the colors of forward and backward."""
FIGURE_INCHES, DPI = (10.0, 3.4), 150
LABEL_SHARE = 0.04  # a part of a bar that is narrower than this share of the longer bar has no room for its time


def write_png(breakdown: Breakdown, path: Path) -> None:
    """Draw a bar for each arm, with a part for each kernel in the order in which they run.

    A black mark shows the arm's timing. Raises OSError if the file cannot be written.
    """
    figure = Figure(figsize=FIGURE_INCHES, dpi=DPI, layout="constrained")
    axes = figure.subplots()
    room_us = LABEL_SHARE * max(arm.kernels_us for arm in breakdown.arms)
    for row, arm in enumerate(breakdown.arms):
        left_us = 0.0
        for i, direction in enumerate(arm.directions.values()):
            for kernel in direction.kernels:
                bar = axes.barh(row, kernel.time_us, left=left_us, color=COLORS[kernel.kind][i], edgecolor="white")
                if kernel.time_us >= room_us:
                    axes.bar_label(bar, [f"{kernel.time_us:.0f}"], label_type="center", fontsize=8)
                left_us += kernel.time_us
        axes.plot([arm.timed_us] * 2, [row - 0.45, row + 0.45], color="black", linewidth=2)
    axes.set_yticks(range(len(breakdown.arms)), [arm.name for arm in breakdown.arms])
    axes.invert_yaxis()
    axes.set_xlabel("us, forward and backward; black: the timing, launch gaps included")
    axes.set_title(f"{title(breakdown)}: {outcome(breakdown)}\n{reasons(breakdown)}", fontsize=10)
    axes.spines[["top", "right"]].set_visible(False)
    legend = [
        Patch(color=colors[i], label=f"{kind}s, {direction}")
        for kind, colors in COLORS.items()
        for i, direction in enumerate(breakdown.bf16.directions)
    ]
    figure.legend(handles=legend, loc="outside lower center", ncols=len(legend), frameon=False, fontsize=8)
    figure.savefig(path, format="png")
