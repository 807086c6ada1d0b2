"""FitOptions: how a fit is done, checked once."""

from __future__ import annotations

from dataclasses import dataclass

from featxfer import OBJECTIVES, Preprocessing, Recipe
from featxfer.checks import check_choice, check_integer

OBJECTIVE = "prototypes"
"""The default."""

WITHOUT_CLUSTERS = ("regression", "contrast")
"""Objectives that look at no cluster."""


@dataclass(frozen=True)
class FitOptions:
    """How `fit_transfer` trains; the defaults are what the project's own tables found best.

    An option that has no effect on what is trained is refused by `fit_transfer`.

    Args:
        objective: a name of `featxfer.OBJECTIVES`, of features and of boxes; by default
            "prototypes".
        clusters: k, >= 1; by default 100, or a tenth of the images where these are fewer than
            1,000; an attached head with output "clusters" keeps its own.
        recipe: of heads; by default `FEATURES_RECIPE`, the paper's `Recipe()` for output
            "clusters", of a detector's heads `BOX_RECIPE`.
        block_recipe: of blocks; by default `BLOCK_RECIPE`, or `DETECTOR_RECIPE` where images are
            read as they are trained on.
        crops: of each image, for blocks behind kept maps: random crops that are trained on besides
            the image and its mirror image, as many maps more in the cache; by default as many as
            bring the views of all images to about 10,000, 4 at the most.
        held_out: share of the images, in [0, 1), that is left out of training for the report. For
            blocks they also tell, without labels, which epoch's weights are best, so the report of
            blocks is a little better than other images would have it.
        batch_size: images a forward pass as features are taken; by default 64.
        precision: "fp32", or "bf16" for autocast; "auto": "bf16" for maps and blocks where the
            hardware multiplies in it, "fp32" for heads.
        on_error: "raise" at an image that cannot be read, or "skip" it and list it: what is skipped
            in one view is left out of all.
        preprocessing: by default what the model says (timm) or ImageNet's mean and std.

    Raises:
        TypeError, ValueError: a value outside of these.
    """

    objective: str | None = None
    clusters: int | None = None
    recipe: Recipe | None = None
    block_recipe: Recipe | None = None
    crops: int | None = None
    held_out: float = 0.1
    batch_size: int | None = None
    precision: str = "auto"
    on_error: str = "raise"
    preprocessing: Preprocessing | None = None

    def __post_init__(self) -> None:
        check_choice("objective", self.objective or OBJECTIVE, OBJECTIVES)
        check_choice("precision", self.precision, ("auto", "fp32", "bf16"))
        check_choice("on_error", self.on_error, ("raise", "skip"))
        for name, least in (("clusters", 1), ("crops", 0), ("batch_size", 1)):
            if getattr(self, name) is not None:
                check_integer(name, getattr(self, name), at_least=least)
        kinds = {"recipe": Recipe, "block_recipe": Recipe, "preprocessing": Preprocessing}
        for name, kind in kinds.items():
            if not isinstance(getattr(self, name), kind | None):
                got = type(getattr(self, name)).__name__
                raise TypeError(f"{name}: got {got}, wanted a {kind.__name__}")
        held_out = self.held_out
        if isinstance(held_out, bool) or not (
            isinstance(held_out, int | float) and 0 <= held_out < 1
        ):
            raise ValueError(f"held_out: got {held_out!r}, wanted a share in [0, 1)")

    def refuse(self, why: str, *names: str) -> None:
        """Raises `ValueError` for the first of these that is given: it would have no effect."""
        for name in names:
            value = getattr(self, name)
            if value is not None:
                shown = "a Recipe" if isinstance(value, Recipe) else repr(value)
                raise ValueError(f"{name}: got {shown}, which would have no effect: {why}")

    def k(self, images: int) -> int:
        """The number of clusters of so many rows."""
        return self.clusters or min(100, max(1, images // 10))
