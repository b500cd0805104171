"""The rules by which layers share one budget of ranks."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import golden
from inputs import second_moment
from lorainit.methods import eva
from lorainit.start.budget import allocate

LAYERS = {"a": [8.0, 4.0, 2.0, 1.0, 1.0], "b": [100.0, 1.0, 0.0, 0.0], "c": [1.0, 1.0, 1.0, 1.0]}
TWO = dict.fromkeys(LAYERS, 2)
SHAPES = {"a": (10, 10), "b": (30, 10), "c": (10, 10)}


def tensors(energies: dict[str, list[float]]) -> dict[str, torch.Tensor]:
    return {name: torch.tensor(values, dtype=torch.float64) for name, values in energies.items()}


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        # shares: a 1/2, 1/4, 1/8, 1/16, 1/16; b 0.99, 0.01, 0, 0; c four times 1/4
        pytest.param({}, {"a": 2, "b": 1, "c": 3}, id="budget: ties go to the earlier component"),
        pytest.param({"rho": 1}, {"a": 2, "b": 2, "c": 2}, id="cap-leaves-no-choice"),
        pytest.param({"rho": 1.5}, {"a": 2, "b": 1, "c": 3}, id="cap-of-3"),
        pytest.param({"rule": "fixed"}, TWO, id="fixed"),
        pytest.param({"rule": "energy", "threshold": 0.75}, {"a": 2, "b": 1, "c": 3}, id="energy"),
        pytest.param({"rule": "energy", "threshold": 0.75, "rho": 1}, {"a": 2, "b": 1, "c": 2}, id="energy-capped"),
        pytest.param({"rule": "energy", "threshold": 0.1, "minimum": 2}, TWO, id="energy-minimum"),
        pytest.param({"rule": "energy", "threshold": 1.0}, {"a": 4, "b": 2, "c": 4}, id="energy-all"),
        # 160 parameters: b's first component costs 40 and is worth 0.99/40, the others 20
        pytest.param({"rule": "cost", "shapes": SHAPES}, {"a": 2, "b": 1, "c": 4}, id="cost"),
    ],
)
def test_table(options, expected):
    assert allocate(tensors(LAYERS), TWO, **options) == expected


def test_rank_0_is_possible_and_a_layer_without_energy_comes_last():
    energies = tensors({"dead": [0.0] * 8, "live": [1.0, 1e-9, 1e-9, 1e-9]})
    assert allocate(energies, {"dead": 2, "live": 2}) == {"dead": 0, "live": 4}
    assert allocate(energies, {"dead": 3, "live": 2}) == {"dead": 1, "live": 4}  # nothing else is left to take
    assert allocate(energies, {"dead": 3, "live": 2}, rule="energy") == {"dead": 1, "live": 1}


def test_all_of_the_energy_is_reached_in_spite_of_rounding():
    energies = tensors({"a": [1.0] * 10 + [0.0] * 2})  # ten tenths add up to less than 1
    assert allocate(energies, {"a": 12}, rule="energy", threshold=1.0) == {"a": 10}


def test_cap_is_that_of_eva_in_peft_pythons_round():
    energies = tensors({"few": [1.0] + [0.0] * 9, "many": [1.0] * 10})
    assert allocate(energies, {"few": 2, "many": 3}, rho=1.5) == {"few": 1, "many": 4}  # round(4.5)


layers = st.dictionaries(
    st.sampled_from("abcdef"),
    st.tuples(
        st.lists(st.floats(0, 1e6, allow_subnormal=False), min_size=1, max_size=12).map(lambda e: sorted(e)[::-1]),
        st.integers(1, 5),
        st.tuples(st.integers(1, 9), st.integers(1, 9)),
    ),
    min_size=1,
)
rhos = st.floats(1, 4)


def prepared(layers, rho):
    energies = tensors({name: layer[0] for name, layer in layers.items()})
    ranks = {name: layer[1] for name, layer in layers.items()}
    caps = {name: min(round(rho * rank), len(energies[name])) for name, rank in ranks.items()}
    shares = {name: (e / e.sum() if float(e.sum()) > 0 else e).tolist() for name, e in energies.items()}
    return energies, ranks, caps, shares


@given(layers=layers, rho=rhos)
def test_budget_is_spent_exactly_within_the_caps_on_the_largest_shares(layers, rho):
    energies, ranks, caps, shares = prepared(layers, rho)
    got = allocate(energies, ranks, rho=rho)
    assert list(got) == list(ranks)
    assert sum(got.values()) == min(sum(ranks.values()), sum(caps.values()))
    assert all(0 <= got[name] <= caps[name] for name in got)
    taken = [shares[name][i] for name in got for i in range(got[name])]
    left = [shares[name][i] for name in got for i in range(got[name], caps[name])]
    assert min(taken) >= max(left, default=0)


@given(layers=layers, rho=rhos, unit=st.sampled_from([2.0**-30, 4.0, 2.0**20]))
def test_unit_of_a_layers_energies_has_no_influence(layers, rho, unit):
    energies, ranks, _, _ = prepared(layers, rho)
    scaled = {name: e * (unit if i % 2 else 1) for i, (name, e) in enumerate(energies.items())}
    assert allocate(scaled, ranks, rho=rho) == allocate(energies, ranks, rho=rho)


@given(
    spectrum=st.lists(st.floats(0, 1e6), min_size=1, max_size=12).map(lambda e: sorted(e)[::-1]),
    count=st.integers(1, 6),
    data=st.data(),
    rule=st.sampled_from(["budget", "cost"]),
)
def test_equal_spectra_give_equal_ranks(spectrum, count, data, rule):
    rank = data.draw(st.integers(1, len(spectrum)))
    names = [str(i) for i in range(count)]
    energies, ranks = tensors(dict.fromkeys(names, spectrum)), dict.fromkeys(names, rank)
    assert allocate(energies, ranks, rule=rule, shapes=dict.fromkeys(names, (3, 4))) == ranks


@given(layers=layers, rho=rhos)
def test_cost_stays_within_the_parameters_and_leaves_no_room_for_another_component(layers, rho):
    energies, ranks, caps, _ = prepared(layers, rho)
    shapes = {name: layer[2] for name, layer in layers.items()}
    got = allocate(energies, ranks, rule="cost", rho=rho, shapes=shapes)
    budget, spent = (sum(r[name] * sum(shapes[name]) for name in r) for r in (ranks, got))
    assert spent <= budget
    assert all(got[name] == caps[name] or spent + sum(shapes[name]) > budget for name in got)


@given(layers=layers, rho=rhos)
def test_cost_with_equal_shapes_is_the_budget_rule(layers, rho):
    energies, ranks, _, _ = prepared(layers, rho)
    shapes = dict.fromkeys(ranks, (5, 3))
    assert allocate(energies, ranks, rule="cost", rho=rho, shapes=shapes) == allocate(energies, ranks, rho=rho)


@given(layers=layers, rho=rhos, threshold=st.floats(0.01, 1), minimum=st.integers(0, 3))
def test_energy_takes_the_fewest_components_that_hold_the_threshold(layers, rho, threshold, minimum):
    energies, ranks, caps, shares = prepared(layers, rho)
    got = allocate(energies, ranks, rule="energy", rho=rho, threshold=threshold, minimum=minimum)
    for name, rank in got.items():
        assert min(minimum, caps[name]) <= rank <= caps[name]
        if rank < caps[name] and sum(shares[name]) > 0:
            assert sum(shares[name][:rank]) >= threshold - 1e-9
        if rank > minimum:
            assert sum(shares[name][: rank - 1]) < threshold


def test_eva_ranks_match_peft(shared):
    found = [param.values[0] for param in golden.cases("peft_eva", prefix="rho2")]
    layers = {name: next(c for c in found if f"_{name}_" in c.name) for name in ("fc1", "fc2")}
    energies = {
        n: eva.energies(second_moment(c.tensors["inputs"]), c.tensors["inputs"].mean(0)) for n, c in layers.items()
    }
    expected = {name: case.options["rank_after"] for name, case in layers.items()}
    asked = {name: case.options["r"] for name, case in layers.items()}
    assert expected != asked
    assert allocate(energies, asked, rho=2.0) == expected
    assert allocate(energies, asked, rho=1.0) == asked


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rule": "best"}, "rule='best' is not one of"),
        ({"rho": 0.5}, "rho must be ≥ 1"),
        ({"rho": float("nan")}, "rho must be ≥ 1"),
        ({"threshold": 0.0}, "threshold in"),
        ({"minimum": -1}, "minimum ≥ 0"),
        ({"ranks": {"a": 2, "b": 2}}, r"energies and ranks must name the same layers.*\['c'\]"),
        ({"rule": "cost"}, "rule 'cost' needs shapes"),
        ({"rule": "cost", "shapes": {"a": (1, 1)}}, r"shapes and ranks .*\['b', 'c'\]"),
        ({"energies": tensors(LAYERS | {"b": [1.0, 2.0]})}, "layer 'b': energies must be in descending order"),
        ({"energies": tensors(LAYERS | {"b": [1.0, float("nan")]})}, "layer 'b': .* finite"),
        ({"energies": tensors(LAYERS | {"b": [1.0, -1.0]})}, "layer 'b': .* ≥ 0"),
    ],
    ids=lambda value: value if isinstance(value, str) else "-",
)
def test_wrong_arguments_are_refused(changes, message):
    arguments = {"energies": tensors(LAYERS), "ranks": TWO} | changes
    with pytest.raises(ValueError, match=message):
        allocate(arguments.pop("energies"), arguments.pop("ranks"), **arguments)
