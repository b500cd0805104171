"""Random starts: never a silent wrong one. benchmarks/soak.py runs more of them."""

from __future__ import annotations

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import random_starts
from random_starts import METHODS, MODELS, Configuration, check, check_saved, possible

CONFIGURATIONS = st.builds(
    Configuration,
    model=st.sampled_from(list(MODELS)),
    dtype=st.sampled_from(["fp32", "bf16", "fp16", "fp64"]),
    method=st.sampled_from([m for m in METHODS if m not in ("abm", "hrp")]),  # those take a second each
    rank=st.sampled_from([1, 2, 3, 4, 6, 8, 16, 40]),
    alpha=st.sampled_from([0.5, 1, 4, 16]),
    rslora=st.booleans(),
    dora=st.booleans(),
    dropout=st.sampled_from([0.0, 0.1]),
    pattern=st.booleans(),
    bias=st.booleans(),
    base=st.sampled_from(["auto", "offset", "keep", "subtract"]),
    ranks=st.sampled_from(["fixed", "fixed", "budget", "energy", "cost"]),
    match_lr=st.booleans(),
    on_unsupported=st.sampled_from(["default", "error"]),
    autocast=st.booleans(),
    train_mode=st.booleans(),
    second_adapter=st.booleans(),
    checkpointing=st.booleans(),
    seed=st.integers(0, 100),
)


@given(configuration=CONFIGURATIONS)
@settings(max_examples=60)
def test_a_random_start_is_right_or_refused_and_leaves_nothing_behind(configuration):
    check(possible(configuration))


@pytest.mark.slow
@given(configuration=CONFIGURATIONS)
@settings(max_examples=100)
def test_what_is_saved_after_a_random_start_is_a_plain_adapter(configuration):
    if configuration.dtype in ("fp32", "fp64") and configuration.base != "subtract":
        check_saved(possible(configuration))


def test_drawn_configurations_start_in_most_cases_and_are_the_same_in_every_process():
    rng = random.Random(0)
    drawn = [random_starts.draw(rng) for _ in range(200)]
    again = random.Random(0)
    assert drawn == [random_starts.draw(again) for _ in range(200)]
    assert {c.method for c in drawn} == set(METHODS)
    assert {c.model for c in drawn} == {*MODELS, "full"}
