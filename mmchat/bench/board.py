"""Board time, predicted: counts of work times figures that were published for an RK3588.

Nothing here was measured by this project; no board was at hand.  The figures are Rockchip's own (mmchat.forecast says
which).  Long prompts prefill slower per row than short ones, by how much was not published for this model; so long
prompts, and with them everything that is sent again, take longer than predicted.

A view of the demo model has fewer rows than the published model's, so image rows are counted as those it would have.
"""

from __future__ import annotations

from dataclasses import dataclass

from mmchat.forecast import PUBLISHED_RK3588

ROWS_PER_SLICE = 64


@dataclass(frozen=True)
class Work:
    """n_slices encoded; n_text_rows and n_image_views (each ROWS_PER_SLICE rows) prefilled; n_new tokens generated."""

    n_slices: int = 0
    n_text_rows: int = 0
    n_image_views: float = 0.0
    n_new: int = 0

    def __add__(self, other: Work) -> Work:
        return Work(
            self.n_slices + other.n_slices,
            self.n_text_rows + other.n_text_rows,
            self.n_image_views + other.n_image_views,
            self.n_new + other.n_new,
        )


def predicted_s(work: Work) -> float:
    """Seconds that this work would take on an RK3588, by the published figures."""
    rows = work.n_text_rows + work.n_image_views * ROWS_PER_SLICE
    figures = PUBLISHED_RK3588
    return work.n_slices * figures["encode"] + rows * figures["prefill"] + work.n_new * figures["generate"]
