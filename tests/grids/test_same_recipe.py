from __future__ import annotations

import dataclasses

import pytest

from lorainit.bench.suite import Forgetting
from lorainit.grids import same_recipe
from lorainit.grids.same_recipe import DEFAULTS, as_stored, differences, fingerprint
from lorainit.tasks import DataOptions
from lorainit.train.diagnose import DiagnosisOptions
from lorainit.train.recipe import Recipe

RECIPE = Recipe(model="m", task="sst2", train={"max_steps": 4}, data=DataOptions(path="d"))


def newer(kind: type, **values) -> type:
    """A dataclass as a later version may have it: with one more field."""
    fields = [("more", int, dataclasses.field(default=0))]
    return dataclasses.make_dataclass(kind.__name__, fields, bases=(kind,), frozen=True)


def test_a_fingerprint_stays_what_it_was() -> None:
    assert fingerprint(RECIPE, None) == "75c59c2e14"
    assert fingerprint(RECIPE, Forgetting(), DiagnosisOptions()) == "545f969474"


@pytest.mark.parametrize(
    ("changes", "same"),
    [
        ({"imports": ["theirs"]}, True),
        ({"seed": 1}, False),
        ({"train": {"max_steps": 5}}, False),
        ({"data": DataOptions(path="e")}, False),
    ],
)
def test_what_decides_no_number_does_not_change_a_fingerprint(changes, same) -> None:
    assert (fingerprint(dataclasses.replace(RECIPE, **changes)) == fingerprint(RECIPE)) == same


def test_a_later_field_counts_only_where_it_is_set() -> None:
    fields = {field.name: getattr(RECIPE, field.name) for field in dataclasses.fields(RECIPE)}
    assert fingerprint(newer(Recipe)(**fields)) == fingerprint(RECIPE)
    assert fingerprint(newer(Recipe)(**fields, more=1)) != fingerprint(RECIPE)
    data = newer(DataOptions)(path="d")
    assert fingerprint(dataclasses.replace(RECIPE, data=data)) == fingerprint(RECIPE)
    assert fingerprint(dataclasses.replace(RECIPE, data=dataclasses.replace(data, more=1))) != fingerprint(RECIPE)


def test_every_part_of_a_trial_has_a_list_of_first_fields() -> None:
    for part in (RECIPE, RECIPE.ranks, RECIPE.data, RECIPE.calibration, DiagnosisOptions(), Forgetting()):
        first = same_recipe._FIRST_FIELDS[type(part).__name__].split()
        assert set(first) <= {field.name for field in dataclasses.fields(part)}


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, []),
        ({"lora": {"r": 4}}, ["lora.r was nothing, and the table file says 4"]),
        ({"seed": 1, "match_lr": True}, ["match_lr was False, and the table file says True", "seed was 0, "]),
        ({"data": DataOptions(path="d", packing=True)}, ["data.packing was False, and the table file says True"]),
    ],
    ids=["nothing", "free field", "two fields", "nested field"],
)
def test_differences_name_the_fields_and_missing_ones_count_as_their_defaults(changes, expected) -> None:
    stored = as_stored(RECIPE) | {"gone": 1}
    del stored["match_lr"], stored["data"]["packing"]  # as if the result were older than these
    found = list(differences(as_stored(dataclasses.replace(RECIPE, **changes)), stored, DEFAULTS))
    assert len(found) == len(expected)
    assert all(text.startswith(start) for text, start in zip(found, expected, strict=True))
