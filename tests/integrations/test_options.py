from __future__ import annotations

import dataclasses
from typing import Any

import pytest

from featxfer import Preprocessing, Recipe
from featxfer_integrations import FitOptions


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"objective": "mse"}, ValueError, "objective: got 'mse', wanted one of"),
        ({"clusters": 0}, ValueError, "clusters: got 0, wanted an int >= 1"),
        ({"clusters": -1}, ValueError, "clusters: got -1, wanted an int >= 1"),
        ({"clusters": "10"}, ValueError, "clusters: got '10', wanted an int"),
        ({"clusters": [5, 3]}, ValueError, r"clusters: got \[5, 3\], wanted an int"),
        ({"clusters": True}, ValueError, "clusters: got True, wanted an int"),
        ({"recipe": 3}, TypeError, "recipe: got int, wanted a Recipe"),
        ({"block_recipe": "fast"}, TypeError, "block_recipe: got str, wanted a Recipe"),
        ({"crops": -1}, ValueError, "crops: got -1, wanted an int >= 0"),
        ({"held_out": 1.0}, ValueError, r"held_out: got 1\.0, wanted a share in \[0, 1\)"),
        ({"held_out": -0.1}, ValueError, r"held_out: got -0\.1, wanted a share"),
        ({"held_out": "a"}, ValueError, "held_out: got 'a', wanted a share"),
        ({"held_out": True}, ValueError, "held_out: got True, wanted a share"),
        ({"held_out": float("nan")}, ValueError, "held_out: got nan, wanted a share"),
        ({"batch_size": 0}, ValueError, "batch_size: got 0, wanted an int >= 1"),
        ({"precision": "int8"}, ValueError, "precision: got 'int8'"),
        ({"precision": "fp16"}, ValueError, "precision: got 'fp16'"),
        ({"on_error": "ignore"}, ValueError, "on_error: got 'ignore'"),
        ({"preprocessing": "imagenet"}, TypeError, "preprocessing: got str, wanted a Preproc"),
    ],
)
def test_options_check_themselves(
    options: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        FitOptions(**options)
    with pytest.raises(error, match=message):
        dataclasses.replace(FitOptions(), **options)


def test_options_are_values() -> None:
    options = FitOptions(clusters=3, crops=0, held_out=0, preprocessing=Preprocessing())
    assert options == FitOptions(clusters=3, crops=0, held_out=0.0, preprocessing=Preprocessing())
    with pytest.raises(dataclasses.FrozenInstanceError):
        options.clusters = 4  # type: ignore[misc]
    with pytest.raises(TypeError, match="minutes"):
        FitOptions(minutes=3)  # type: ignore[call-arg]


def test_what_is_given_without_effect_is_refused_by_name() -> None:
    FitOptions().refuse("never", "objective", "clusters", "recipe", "crops", "preprocessing")
    with pytest.raises(ValueError, match=r"^clusters: got 3, which would have no effect: because$"):
        FitOptions(clusters=3, crops=1).refuse("because", "objective", "clusters", "crops")
    with pytest.raises(ValueError, match=r"^crops: got 0, "):
        FitOptions(crops=0).refuse("a zero is given too", "crops")
    with pytest.raises(ValueError, match=r"^recipe: got a Recipe, "):
        FitOptions(recipe=Recipe()).refuse("because", "recipe")


def test_clusters_are_a_tenth_of_few_images() -> None:
    assert [FitOptions().k(images) for images in (1, 9, 54, 999, 1000, 10**6)] == [
        1, 1, 5, 99, 100, 100,
    ]  # fmt: skip
    assert FitOptions(clusters=7).k(10) == 7
