"""`lorainit.initialize`: what every method promises on every kind of layer, and what a failure leaves behind."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import io
import json
import random
import threading
import time
import warnings

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.utils.data import DataLoader

import lorainit
from cases import (
    BATCH,
    BERT,
    CASES,
    CONV,
    DATA_DRIVEN,
    GPT2,
    LLAMA,
    METHODS,
    TIED,
    TWIN,
    VOCAB,
    Attention,
    Net,
    Scripted,
    Snapshot,
    Tokens,
    Twin,
    assert_same_tensors,
    base_tensors,
    each_case,
    each_dtype,
    each_method,
    each_preserving,
    logits,
    relative_difference,
    rng_state,
    seeded,
    start,
    train,
)
from lorainit.adapter import offset
from lorainit.methods import Factors

INFO = {info.name: info for info in lorainit.available()}
# of A and B alone, whose product is zero only up to rounding
ROUNDED_ZERO = ("orthogonal",)


def preserving_base(method):
    """The treatment under which a method must be a no-op at step 0."""
    return "offset" if INFO[method].product == "step" else "auto"


def factors(model, adapter_name="default"):
    return {site.name: site.factors() for site in lorainit.find_sites(model, adapter_name)[0]}


def assert_same_factors(actual, expected):
    assert actual.keys() == expected.keys()
    for name, (A, B) in expected.items():
        assert torch.equal(actual[name][0], A), name
        assert torch.equal(actual[name][1], B), name


# --- the function and the base ------------------------------------------------------------------------------------


@each_dtype
@each_case
@each_method
def test_the_start_changes_neither_the_function_nor_the_base(method, case, dtype):
    batch = case.batch(dtype)
    expected = logits(case.base(dtype), batch)
    model = case.adapted(dtype, lora_dropout=0.3)
    before = base_tensors(model)
    start(model, method, data=case.batches(dtype), base=preserving_base(method))
    # a started adapter is not the zero it was
    assert any(bool(A.any()) for A, _ in factors(model).values())
    for mode in (False, True):  # with dropout on in train mode
        model.train(mode)
        actual = logits(model, batch)
        assert actual.dtype == expected.dtype
        if method in ROUNDED_ZERO:
            assert relative_difference(actual, expected) <= 1e-6 + torch.finfo(dtype).eps
        else:
            assert torch.equal(actual, expected)
    with model.disable_adapter():
        assert torch.equal(logits(model, batch), expected)
    assert_same_tensors(base_tensors(model), before)


@each_case
@each_preserving
def test_adapters_in_half_precision_cancel_to_the_last_bit_as_well(method, case):
    batch = case.batch(torch.bfloat16)
    model = case.adapted(torch.bfloat16, autocast=False)
    start(model, method, data=case.batches(torch.bfloat16))
    assert all(A.dtype == torch.bfloat16 for A, _ in factors(model).values())
    assert torch.equal(logits(model, batch), logits(case.base(torch.bfloat16), batch))


@each_case
@each_method
def test_training_leaves_the_base_bit_identical_and_moves_the_function(method, case):
    model = case.adapted(lora_dropout=0.1)
    before = base_tensors(model)
    expected = logits(case.base(), case.batch())
    start(model, method, data=case.batches())
    train(model, case.batches())
    assert relative_difference(logits(model, case.batch()), expected) > 0.05
    assert_same_tensors(base_tensors(model), before)
    with model.disable_adapter():
        assert torch.equal(logits(model, case.batch()), expected)
    assert_same_tensors(base_tensors(model.unload()), base_tensors(case.base()))


def effective_weights(model, adapter_name="default"):
    """The weight that each layer applies, out×in in float64."""
    weights = {}
    for site in lorainit.find_sites(model, adapter_name)[0]:
        update = site.layer.get_delta_weight(adapter_name)
        update = update.T if site.kind == "conv1d" else update.flatten(1)
        weights[site.name] = site.weight().double() + update.double()
    return weights


@each_case
@each_method
def test_keep_moves_each_weight_by_s_BA(method, case):
    model = case.adapted(torch.float64)
    weights = effective_weights(model)
    report = start(model, method, base="keep", data=case.batches(torch.float64))
    moved = effective_weights(model)
    for site, row in zip(lorainit.find_sites(model)[0], report.layers, strict=True):
        assert not offset.is_attached(site.lora_A)
        A, B = site.factors()
        torch.testing.assert_close(moved[site.name] - weights[site.name], site.scaling * B @ A, rtol=1e-9, atol=1e-9)
        assert row.base == ("none" if INFO[method].product == "zero" else "keep")


@pytest.mark.parametrize("case", [case for case in CASES if case is not TIED], ids=lambda case: case.name)
@each_method
def test_subtract_edits_the_base_and_keeps_the_function_up_to_rounding(method, case):
    batch, base = case.batch(torch.float64), case.base(torch.float64)
    model = case.adapted(torch.float64)
    weights = {site.name: site.weight().clone() for site in lorainit.find_sites(model)[0]}
    report = start(model, method, base="subtract", data=case.batches(torch.float64))
    assert relative_difference(logits(model, batch), logits(base, batch)) <= 1e-6
    for site, row in zip(lorainit.find_sites(model)[0], report.layers, strict=True):
        A, B = site.factors()
        edited = weights[site.name] - site.scaling * B @ A
        torch.testing.assert_close(site.weight(), edited, rtol=1e-9, atol=1e-9)
        assert row.base == ("none" if not B.any() else "subtract")


def test_auto_takes_what_the_paper_of_the_method_means():
    for info in (INFO[name] for name in (*METHODS, *DATA_DRIVEN)):
        report = start(LLAMA.adapted(), info.name, data=LLAMA.batches())
        moved = [row for row in report.layers if row.name not in report.details.get("frozen_layers", ())]
        assert {row.base for row in moved} == {{"zero": "none", "preserve": "offset", "step": "keep"}[info.product]}


@pytest.mark.parametrize("rslora", [False, True], ids=["lora", "rslora"])
@each_method
def test_patterns_of_rank_and_scaling_start_as_no_ops(method, rslora):
    patterns = {"rank_pattern": {"^layers.1.q": 2}, "alpha_pattern": {"encoder.layers.1.q": 3, "v": 8}}
    model = TWIN.adapted(use_rslora=rslora, **patterns)
    report = start(model, method, base=preserving_base(method), data=TWIN.batches())
    expected, actual = logits(TWIN.base(), TWIN.batch()), logits(model, TWIN.batch())
    assert relative_difference(actual, expected) <= (1e-6 if method in ROUNDED_ZERO else 0)
    assert {row.name: row.rank for row in report.layers if row.rank != 4} == {"layers.1.q": 2}


@pytest.mark.parametrize("case", [LLAMA, GPT2, CONV], ids=lambda case: case.name)
@each_method
def test_dora_starts_as_a_no_op(method, case):
    model = case.adapted(use_dora=True)
    expected = logits(model, case.batch())
    start(model, method, base=preserving_base(method), data=case.batches())
    # PEFT's magnitude / norm is 1 up to rounding, with any start
    assert relative_difference(logits(model, case.batch()), expected) <= 2e-6
    train(model, case.batches())
    assert relative_difference(logits(model, case.batch()), expected) > 0.05


@pytest.mark.parametrize("case", [LLAMA, GPT2, CONV], ids=lambda case: case.name)
@pytest.mark.parametrize("method", ["init-ab", "pissa"])
def test_with_dora_a_kept_start_is_the_base_plus_s_BA_as_without(method, case):
    plain, dora = case.adapted(), case.adapted(use_dora=True)
    for model in (plain, dora):
        start(model, method, base="keep")
    expected = logits(plain, case.batch())
    assert relative_difference(logits(dora, case.batch()), expected) <= 1e-5
    start(dora, method, base="keep")  # untrained still, with the magnitude of the first start
    assert relative_difference(logits(dora, case.batch()), expected) <= 1e-5
    start(dora, "kaiming")
    assert relative_difference(logits(dora, case.batch()), logits(case.base(), case.batch())) <= 2e-6


@pytest.mark.parametrize("method", ["lora-one", "hrp", "abm"])
def test_with_dora_a_start_from_data_is_what_it_is_without(method):
    functions = []
    for dora in (False, True):
        model = LLAMA.adapted(use_dora=dora, target_modules=["q_proj", "v_proj", "gate_proj"])
        start(model, method, data=LLAMA.batches())
        with torch.no_grad():
            deltas = [s.scaling * s.factors()[1] @ s.factors()[0] for s in lorainit.find_sites(model)[0]]
        functions.append(logits(model, LLAMA.batch()))
        if dora and method == "lora-one":
            assert relative_difference(functions[1], functions[0]) <= 1e-5
        if dora:
            base = LLAMA.base()
            for site, delta in zip(lorainit.find_sites(model)[0], deltas, strict=True):
                base.get_submodule(site.name).weight.data += delta
            assert relative_difference(functions[1], logits(base, LLAMA.batch())) <= 1e-5


@each_method
def test_a_trained_bias_of_the_adapter_starts_at_zero(method):
    model = BERT.adapted(lora_bias=True)
    start(model, method, base=preserving_base(method), data=BERT.batches())
    actual, expected = logits(model, BERT.batch()), logits(BERT.base(), BERT.batch())
    assert relative_difference(actual, expected) <= (1e-6 if method in ROUNDED_ZERO else 0)
    train(model, BERT.batches())
    assert all(bool(site.lora_B.bias.any()) for site in lorainit.find_sites(model)[0])


def test_the_gradients_of_the_offset_form_are_those_of_the_edited_base():
    grads = []
    for base in ("offset", "subtract"):
        model = LLAMA.adapted(torch.float64)
        start(model, "loram", base=base)
        model(**LLAMA.batches()[0]).loss.backward()
        grads.append([p.grad for p in model.parameters() if p.requires_grad])
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-9)


# --- reproducible -------------------------------------------------------------------------------------------------


@each_method
def test_the_global_generators_are_neither_read_nor_moved(method):
    first = LLAMA.adapted()
    start(first, method, data=LLAMA.batches())
    torch.manual_seed(123)
    random.seed(123)
    np.random.seed(123)
    second = LLAMA.adapted()
    before = rng_state()
    start(second, method, data=LLAMA.batches())
    assert rng_state() == before
    assert_same_factors(factors(second), factors(first))


def loader(**options):
    rows = (LLAMA.batch()["input_ids"].repeat(4, 1) + torch.arange(12)[:, None]) % VOCAB
    items = [{"input_ids": row, "labels": row} for row in rows]
    return DataLoader(items, batch_size=3, **options)  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize("options", [{}, {"shuffle": True}], ids=["in order", "shuffled"])
@pytest.mark.parametrize("method", ["eva", "lora-ga", "hrp", "abm"])
def test_a_data_loader_does_not_move_the_global_generators(method, options):
    model = LLAMA.adapted()
    before = rng_state()
    start(model, method, data=loader(**options))
    assert rng_state() == before


def test_a_data_loader_does_not_move_the_global_generators_where_the_start_fails():
    model = LLAMA.adapted()
    unlabelled = DataLoader([{"input_ids": row} for row in LLAMA.batch()["input_ids"]])  # pyright: ignore
    before = Snapshot.of(model)
    with pytest.raises(lorainit.LoraInitError, match="labels"):
        start(model, "lora-ga", data=unlabelled)
    before.assert_unchanged(model)


def test_the_seed_decides_in_which_order_a_data_loader_gives_its_rows():
    starts = []
    for seed, state in ((5, 1), (5, 2), (6, 1)):
        model = LLAMA.adapted()
        with seeded(state):
            start(model, "eva", data=loader(shuffle=True), seed=seed, max_batches=1)
        starts.append(factors(model))
    assert_same_factors(starts[0], starts[1])
    assert not all(torch.equal(A, starts[2][name][0]) for name, (A, _) in starts[0].items())


INTEGERS = {"python": 3, "numpy": np.int64(3), "torch": torch.tensor(3)}


@pytest.mark.parametrize("seed", INTEGERS.values(), ids=INTEGERS)
def test_a_seed_is_an_integer_of_any_kind(seed, tmp_path):
    model, other = LLAMA.adapted(), LLAMA.adapted()
    report = start(model, lorainit.PiSSA(iterations=np.int64(3)), seed=seed)  # pyright: ignore[reportArgumentType]
    start(other, lorainit.PiSSA(iterations=3), seed=3)
    assert_same_factors(factors(model), factors(other))
    assert json.loads(json.dumps(report.to_dict()))["seed"] == 3
    model.save_pretrained(tmp_path)


@contextlib.contextmanager
def default_dtype(dtype):
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(torch.float32)


SETTINGS = {
    "autocast": lambda: torch.autocast("cpu", torch.bfloat16),
    "float64": lambda: default_dtype(torch.float64),
    "bfloat16": lambda: default_dtype(torch.bfloat16),
    "no grad": torch.no_grad,
}


@pytest.mark.parametrize("setting", SETTINGS.values(), ids=SETTINGS)
@each_method
def test_the_caller_s_precision_does_not_reach_the_start(method, setting):
    if INFO[method].needs:
        pytest.skip("runs the model, in the caller's precision")
    inside, outside = LLAMA.adapted(), LLAMA.adapted()
    with setting():
        before = torch.get_default_dtype(), torch.is_autocast_enabled("cpu")
        start(inside, method, base="subtract")  # the most arithmetic
        assert (torch.get_default_dtype(), torch.is_autocast_enabled("cpu")) == before
    start(outside, method, base="subtract")
    assert_same_factors(factors(inside), factors(outside))
    assert_same_tensors(base_tensors(inside), base_tensors(outside))


def test_threads_take_turns_because_the_default_dtype_is_the_process_s():
    running, most = [], []

    def action(site):
        running.append(site)
        time.sleep(0.05)
        most.append(len(running))
        running.pop()
        return Factors(torch.ones(site.rank, site.in_features), torch.ones(site.out_features, site.rank))

    models = [LLAMA.adapted() for _ in range(3)]
    threads = [threading.Thread(target=start, args=(model, Scripted(action))) for model in models]
    filters = list(warnings.filters)
    with default_dtype(torch.float64):
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert torch.get_default_dtype() == torch.float64
    assert most == [1, 1, 1]
    assert warnings.filters == filters


INFERENCE = {
    "from the weights": ("pissa", {}),
    "with other ranks": ("pissa", {"ranks": lorainit.RankRule("energy", threshold=0.5)}),
    "from gradients": ("lora-ga", {}),
}


@pytest.mark.parametrize("method, options", INFERENCE.values(), ids=INFERENCE)
def test_a_start_in_inference_mode_can_be_trained_and_loaded(method, options, tmp_path):
    model, other = LLAMA.adapted(), LLAMA.adapted()
    batches = LLAMA.batches()
    with torch.inference_mode():
        start(model, method, data=batches, **options)
        assert torch.is_inference_mode_enabled()
    start(other, method, data=batches, **options)
    assert_same_factors(factors(model), factors(other))
    train(model, batches)
    model.save_pretrained(tmp_path)
    model.load_adapter(tmp_path, "default")


def test_tensors_that_were_made_in_inference_mode_are_refused():
    with torch.inference_mode():
        model, batches = LLAMA.adapted(), CONV.batches()
    with pytest.raises(lorainit.LoraInitError, match=r"embed_tokens\.weight' was made under torch\.inference_mode"):
        start(model, "pissa")
    other = CONV.adapted()
    before = Snapshot.of(other)
    with pytest.raises(lorainit.LoraInitError, match="batches were made under torch.inference_mode"):
        start(other, "lora-ga", data=batches)
    before.assert_unchanged(other)


@each_method
def test_the_seed_decides_the_start_of_a_random_method_and_nothing_else_does(method):
    starts = {}
    for key, seed in {"same": 5, "again": 5, "other": 6}.items():
        model = LLAMA.adapted()
        start(model, method, seed=seed, data=LLAMA.batches())
        starts[key] = factors(model)
    assert_same_factors(starts["again"], starts["same"])
    # PiSSA's seed only draws the randomized solver's test matrix: other bits, the same start
    if INFO[method].deterministic:
        assert_same_factors(starts["other"], starts["same"])
    else:
        assert all(not torch.equal(starts["other"][n][0], A) for n, (A, _) in starts["same"].items())


@each_method
def test_layers_of_equal_shape_draw_from_streams_of_their_own(method):
    base = LLAMA.base()
    with torch.no_grad():  # one weight everywhere: only the streams differ
        base.model.layers[1].self_attn.q_proj.weight.copy_(base.model.layers[0].self_attn.q_proj.weight)
    model = get_peft_model(base, LLAMA.lora_config(target_modules=["q_proj"]))
    start(model, method, data=LLAMA.batches())
    (first, _), (second, _) = factors(model).values()
    if not INFO[method].needs and method != "pissa":
        assert torch.equal(first, second) == INFO[method].deterministic


@each_method
def test_the_start_depends_neither_on_the_order_of_modules_nor_on_what_the_adapter_held(method):
    class Reversed(Twin):
        def __init__(self):
            super().__init__()
            self._modules = dict(reversed(self._modules.items()))

    with seeded():
        reordered = Reversed().eval()
    model = get_peft_model(reordered, TWIN.lora_config()).eval()
    train(model, TWIN.batches())
    start(model, method, data=TWIN.batches(), overwrite=True)
    plain = TWIN.adapted()
    start(plain, method, data=TWIN.batches())
    assert [name for name in factors(model)] != [name for name in factors(plain)]
    assert_same_factors(dict(sorted(factors(model).items())), dict(sorted(factors(plain).items())))


@each_method
def test_all_routes_to_a_lora_model_get_the_same_start(method):
    by_peft, by_transformers = LLAMA.adapted(), LLAMA.base()
    by_transformers.add_adapter(LLAMA.lora_config())
    for model in (by_peft, by_transformers):
        start(model, method, data=LLAMA.batches(), base=preserving_base(method))
    assert_same_factors(factors(by_transformers), factors(by_peft))
    assert torch.equal(logits(by_transformers.eval(), LLAMA.batch()), logits(by_peft, LLAMA.batch()))


# --- starting again, and beside others ----------------------------------------------------------------------------


@pytest.mark.parametrize("first", METHODS)
@pytest.mark.parametrize("second", ["kaiming", "pissa"])
def test_a_second_start_takes_the_place_of_the_first(first, second):
    model, fresh = LLAMA.adapted(), LLAMA.adapted()
    start(model, first, data=LLAMA.batches())
    train(model, LLAMA.batches())
    start(model, second, overwrite=True)
    start(fresh, second)
    assert_same_factors(factors(model), factors(fresh))
    assert [offset.is_attached(s.lora_A) for s in lorainit.find_sites(model)[0]] == [second == "pissa"] * 6
    assert torch.equal(logits(model, LLAMA.batch()), logits(LLAMA.base(), LLAMA.batch()))
    assert [name for name, _ in model.named_buffers()] == [name for name, _ in fresh.named_buffers()]


def test_after_subtract_a_second_start_is_refused_because_the_base_is_no_longer_the_base():
    model = LLAMA.adapted()
    start(model, "loram", base="subtract")
    before = Snapshot.of(model)
    with pytest.raises(lorainit.LoraInitError, match=r"q_proj': the base was edited by an earlier start.*reload"):
        start(model, "kaiming")
    before.assert_unchanged(model)


def test_another_adapter_on_an_edited_base_is_refused_too():
    model = LLAMA.adapted()
    model.add_adapter("other", LLAMA.lora_config())
    start(model, "loram", base="subtract")
    with pytest.raises(lorainit.LoraInitError, match="the base was edited"):
        start(model, "pissa", adapter_name="other")


@pytest.mark.parametrize("dora", [False, True])
def test_a_trained_bias_or_magnitude_makes_a_second_start_an_error_rather_than_a_move(dora):
    model = BERT.adapted(use_dora=dora, lora_bias=not dora)
    start(model, "loram")
    start(model, "pissa")  # untrained: fine
    train(model, BERT.batches())
    before = Snapshot.of(model)
    with pytest.raises(lorainit.LoraInitError, match=r"query'.*trained (bias|magnitude)"):
        start(model, "pissa", overwrite=True)
    before.assert_unchanged(model, buffers_remade=True)


@each_method
def test_starting_one_of_two_adapters_leaves_the_other_alone(method):
    model = LLAMA.adapted()
    model.add_adapter("other", LLAMA.lora_config(r=2, target_modules=["q_proj", "o_proj"]))
    model.set_adapter("other")
    train(model, LLAMA.batches())
    other, outputs, config = factors(model, "other"), logits(model, LLAMA.batch()), model.peft_config["other"]
    other = {name: (A.clone(), B.clone()) for name, (A, B) in other.items()}
    before = base_tensors(model)
    start(model, method, data=LLAMA.batches(), base=preserving_base(method))
    assert model.active_adapters == ["other"]
    assert model.peft_config["other"] is config
    assert_same_factors(factors(model, "other"), other)
    assert torch.equal(logits(model, LLAMA.batch()), outputs)
    model.set_adapter("default")
    tolerance = 1e-6 if method in ROUNDED_ZERO else 0
    assert relative_difference(logits(model, LLAMA.batch()), logits(LLAMA.base(), LLAMA.batch())) <= tolerance
    train(model, LLAMA.batches())
    model.set_adapter("other")
    assert torch.equal(logits(model, LLAMA.batch()), outputs)
    assert_same_tensors(base_tensors(model), before)


def test_two_started_adapters_serve_one_mixed_batch():
    model = LLAMA.adapted()
    model.add_adapter("other", LLAMA.lora_config(r=2))
    batch = {k: v[:3] for k, v in LLAMA.batch().items()}
    names = ["default", "__base__", "other"]
    assert len(names) == BATCH
    for name, method in {"default": "pissa", "other": "loram"}.items():
        start(model, method, adapter_name=name)
        model.set_adapter(name)
        train(model, LLAMA.batches())
    expected = []
    for i, name in enumerate(names):
        with model.disable_adapter() if name == "__base__" else contextlib.nullcontext():
            if name != "__base__":
                model.set_adapter(name)
            expected.append(logits(model, batch)[i])
    mixed = logits(model, batch, adapter_names=names)
    assert relative_difference(mixed, torch.stack(expected)) <= 1e-5
    assert relative_difference(expected[0], expected[1]) > 0.05


# --- a started model is an ordinary model -------------------------------------------------------------------------


@each_method
def test_modules_parameters_flags_and_hooks_stay_the_same_objects(method):
    model = LLAMA.adapted(lora_dropout=0.1)
    model.base_model.model.model.layers[0].train()
    model.base_model.model.lm_head.register_forward_hook(lambda *_: None)
    next(p for p in model.parameters() if p.requires_grad).requires_grad_(False)
    before = Snapshot.of(model)
    start(model, method, data=LLAMA.batches())
    after = Snapshot.of(model)
    gone = before.objects.keys() - after.objects.keys()
    assert gone == set()
    for key, value in before.objects.items():
        if key.startswith("config of") or isinstance(value[0], int):
            continue
        assert after.objects[key][1:] == value[1:], key  # flags and hooks
        assert issubclass(after.objects[key][0], value[0]), key
    tensors = [k for k in before.objects if k.endswith("(tensor)")]
    assert [after.objects[k] for k in tensors] == [before.objects[k] for k in tensors]


@each_preserving
def test_an_optimizer_that_was_made_before_the_start_trains_it(method):
    trajectories = []
    for early in (True, False):
        model = LLAMA.adapted()

        def optimizer(model=model):
            return torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.02)

        made_early = optimizer() if early else None
        start(model, method, data=LLAMA.batches())
        train(model, LLAMA.batches(), optimizer=made_early or optimizer())
        trajectories.append(factors(model))
    assert_same_factors(*trajectories)


def pickled(model):
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


@pytest.mark.parametrize("copied", [copy.deepcopy, pickled])
@pytest.mark.parametrize("base", ["offset", "subtract"])
@pytest.mark.parametrize("case", [LLAMA, CONV], ids=lambda case: case.name)
def test_copies_of_a_started_model_are_equal_and_train_on_their_own(case, base, copied):
    model = case.adapted()
    start(model, "loram", base=base)
    train(model, case.batches())
    outputs = logits(model, case.batch())
    other = copied(model)
    assert torch.equal(logits(other, case.batch()), outputs)
    assert_same_tensors(dict(other.state_dict()), dict(model.state_dict()))
    assert other.peft_config["default"].to_dict() == model.peft_config["default"].to_dict()
    train(other, case.batches())
    assert torch.equal(logits(model, case.batch()), outputs)
    assert not torch.equal(logits(other, case.batch()), outputs)


@each_preserving
def test_the_state_dict_of_a_started_model_comes_back_to_the_last_bit(method):
    model, other = LLAMA.adapted(), LLAMA.adapted()
    start(model, method, data=LLAMA.batches())
    train(model, LLAMA.batches())
    start(other, "loram", seed=9)  # another offset: the state dict brings its own
    other.load_state_dict(model.state_dict())
    assert_same_factors(factors(other), factors(model))
    assert torch.equal(logits(other, LLAMA.batch()), logits(model, LLAMA.batch()))
    train(model, LLAMA.batches())
    train(other, LLAMA.batches())
    assert_same_factors(factors(other), factors(model))


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_gives_the_same_gradients(reentrant):
    grads = []
    for checkpointed in (False, True):
        model = LLAMA.adapted(torch.float64)
        start(model, "loram")
        model.train()
        if checkpointed:
            model.enable_input_require_grads()
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
        model(**LLAMA.batches()[0]).loss.backward()
        grads.append([p.grad for p in model.parameters() if p.requires_grad])
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


@pytest.mark.slow
def test_a_compiled_started_model_computes_and_trains_the_same():
    model = CONV.adapted()
    start(model, "loram")
    train(model, CONV.batches())
    compiled = torch.compile(copy.deepcopy(model))
    assert relative_difference(logits(compiled, CONV.batch()), logits(model, CONV.batch())) <= 1e-5
    train(model, CONV.batches())
    train(compiled, CONV.batches())
    assert relative_difference(logits(compiled, CONV.batch()), logits(model, CONV.batch())) <= 1e-3


@each_case
@each_preserving
def test_merging_into_the_base_and_out_of_it_again(method, case):
    model = case.adapted(target_modules=[name for name in case.targets if name != "lm_head"])
    before, batch = base_tensors(model), case.batch()
    start(model, method, data=case.batches())
    model.merge_adapter()
    assert_same_tensors(base_tensors(model), before)  # nothing to merge at step 0
    model.unmerge_adapter()
    train(model, case.batches())
    outputs = logits(model, batch)
    model.merge_adapter(safe_merge=True)
    assert relative_difference(logits(model, batch), outputs) <= 1e-5
    assert any(not torch.equal(t, before[n]) for n, t in base_tensors(model).items())
    model.unmerge_adapter()
    assert relative_difference(logits(model, batch), outputs) <= 1e-5
    assert all(torch.allclose(t, before[n], atol=1e-5) for n, t in base_tensors(model).items())


# --- all or nothing -----------------------------------------------------------------------------------------------


def raises(error):
    def action(site):
        raise error

    return action


def not_finite(site):
    return Factors(torch.full((site.rank, site.in_features), torch.inf), torch.ones(site.out_features, site.rank))


def misshapen(site):
    return Factors(torch.ones(site.rank, site.in_features + 1), torch.ones(site.out_features, site.rank))


FAILURES = {
    "error": (raises(ZeroDivisionError("in the middle")), ZeroDivisionError, "in the middle"),
    "ctrl-c": (raises(KeyboardInterrupt()), KeyboardInterrupt, ""),
    "not finite": (not_finite, lorainit.NonFiniteError, "down_proj"),
    "misshapen": (misshapen, RuntimeError, ""),
}


@pytest.mark.parametrize("base", ["offset", "keep", "subtract"])
@pytest.mark.parametrize("earlier", [None, "loram", "kaiming"])
@pytest.mark.parametrize("action, error, message", FAILURES.values(), ids=FAILURES)
def test_a_failure_in_the_middle_leaves_everything_as_it_was(action, error, message, earlier, base):
    model = LLAMA.adapted(lora_dropout=0.1)
    model.add_adapter("other", LLAMA.lora_config(r=2))
    if earlier:
        start(model, earlier)
        train(model, LLAMA.batches())
    outputs = logits(model, LLAMA.batch())
    method = Scripted(action, at=5)
    before = Snapshot.of(model)
    with pytest.raises(error, match=message):
        start(model, method, base=base, overwrite=True)
    assert len(method.seen) == 6
    before.assert_unchanged(model, buffers_remade=True)
    assert torch.equal(logits(model, LLAMA.batch()), outputs)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@each_method
def test_a_weight_that_is_not_finite_is_named_and_nothing_changes(method, bad):
    model = LLAMA.adapted()
    model.base_model.model.model.layers[1].mlp.down_proj.weight.data[2, 3] = bad
    before = Snapshot.of(model)
    with pytest.raises(lorainit.NonFiniteError, match=r"'model\.layers\.1\.mlp\.down_proj'"):
        start(model, method, data=LLAMA.batches())
    before.assert_unchanged(model)


def test_a_warning_that_is_turned_into_an_error_leaves_everything_as_it_was():
    model = CONV.adapted(r=10)
    before = Snapshot.of(model)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(UserWarning, match="'strided'"):
            start(model, "pissa", on_unsupported="default")
    before.assert_unchanged(model)


# --- refusals -----------------------------------------------------------------------------------------------------

WRONG = {
    "method": ({"method": "loran"}, "unknown method 'loran'; did you mean .*'loram'"),
    "no method": ({"method": 3}, "a method is a name or a lorainit method object, got 3"),
    "class": ({"method": lorainit.LoRAM}, r"a method is a name or a lorainit method object, .* add \(\), LoRAM\(\)"),
    "base": ({"base": "residual"}, r"base='residual' is not one of \['auto', "),
    "on_unsupported": ({"on_unsupported": "skip"}, r"on_unsupported='skip' is not one of \['error', 'default'\]"),
    "seed": ({"seed": 0.5}, "seed must be an integer, got 0.5"),
    "adapter": ({"adapter_name": "nope"}, r"'nope'; adapters on this model: \['default'\]"),
}


@pytest.mark.parametrize("options, message", WRONG.values(), ids=WRONG)
def test_a_wrong_argument_is_an_error_that_says_what_would_be_right(options, message):
    model = LLAMA.adapted()
    before = Snapshot.of(model)
    with pytest.raises(lorainit.LoraInitError, match=message):
        start(model, **({"method": "loram"} | options))
    before.assert_unchanged(model)


def test_a_model_without_lora_is_refused():
    with pytest.raises(lorainit.LoraInitError, match="LlamaForCausalLM has no PEFT LoRA layers"):
        start(LLAMA.base(), "loram")


@pytest.mark.parametrize("peft_init", ["pissa", "pissa_niter_4", "olora", "OLoRA"])
def test_an_adapter_with_which_peft_has_edited_the_base_is_refused(peft_init):
    model = LLAMA.adapted(init_lora_weights=peft_init)
    before = Snapshot.of(model)
    with pytest.raises(lorainit.LoraInitError, match=rf"init_lora_weights='{peft_init}'.*reload the base"):
        start(model, "loram")
    before.assert_unchanged(model)


def test_another_adapter_with_which_peft_has_edited_the_base_is_refused_too():
    model = LLAMA.adapted()
    model.add_adapter("other", LLAMA.lora_config(init_lora_weights="pissa"))
    with pytest.raises(lorainit.LoraInitError, match="adapter 'other' was made with init_lora_weights='pissa'"):
        start(model, "loram")


@pytest.mark.parametrize("peft_init", [True, False, "gaussian", "orthogonal"])
def test_peft_s_starts_that_leave_the_base_alone_are_replaced(peft_init):
    model, plain = LLAMA.adapted(init_lora_weights=peft_init), LLAMA.adapted()
    start(model, "loram")
    start(plain, "loram")
    assert_same_factors(factors(model), factors(plain))


def test_a_merged_adapter_is_refused():
    model = LLAMA.adapted()
    model.merge_adapter()
    before = Snapshot.of(model)
    with pytest.raises(lorainit.LoraInitError, match="'default' is merged into the base; unmerge it first"):
        start(model, "loram")
    before.assert_unchanged(model)


def test_an_adapter_that_is_merged_into_another_layer_is_refused_and_stays_merged():
    model = LLAMA.adapted(target_modules=["q_proj"])
    model.add_adapter("other", LLAMA.lora_config(target_modules=["v_proj"], init_lora_weights=False))
    model.merge_adapter(["other"])
    before = Snapshot.of(model)
    with pytest.raises(lorainit.LoraInitError, match=r"v_proj': adapter 'other' is merged into the base"):
        start(model, "lora-ga", data=LLAMA.batches())
    before.assert_unchanged(model)
    layers = [module for name, module in model.named_modules() if name.endswith("v_proj")]
    assert [layer.merged_adapters for layer in layers] == [["other"]] * len(layers)


@each_method
def test_a_scaling_of_0_is_refused(method):
    model = LLAMA.adapted(lora_alpha=0)
    before = Snapshot.of(model)
    with pytest.raises(lorainit.LoraInitError, match=r"q_proj': the scaling of adapter 'default' is 0"):
        start(model, method, data=LLAMA.batches())
    before.assert_unchanged(model)


def test_a_model_on_the_meta_device_is_refused():
    with torch.device("meta"):
        base = LLAMA.make()
    model = get_peft_model(base, LLAMA.lora_config(), low_cpu_mem_usage=True)
    with pytest.raises(lorainit.UnsupportedLayerError, match=r"q_proj' is on the meta device"):
        start(model, "loram")


def test_a_tied_weight_is_not_subtracted_from():
    model = TIED.adapted()
    before = Snapshot.of(model)
    with pytest.raises(lorainit.UnsupportedLayerError, match=r"'lm_head'.*embed_tokens.*use base='offset'"):
        start(model, "loram", base="subtract")
    before.assert_unchanged(model)


def test_an_adapted_output_layer_is_not_subtracted_from():
    # PEFT writes the base weight of such a layer into every checkpoint, where an edited one would pass for the original
    model = LLAMA.adapted(target_modules=["q_proj", "lm_head"])
    before = Snapshot.of(model)
    with pytest.raises(lorainit.UnsupportedLayerError, match=r"'lm_head'.*every checkpoint.*use base='offset'"):
        start(model, "loram", base="subtract")
    before.assert_unchanged(model)


def test_an_adapter_that_acts_on_some_tokens_only_has_no_edited_base():
    model = LLAMA.adapted(alora_invocation_tokens=[3])
    before = Snapshot.of(model)
    with pytest.raises(lorainit.UnsupportedLayerError, match=r"q_proj'.*ALoraLinearVariant.*use base='offset'"):
        start(model, "loram", base="subtract")
    before.assert_unchanged(model)


def test_a_data_free_method_leaves_the_data_untouched():
    class Untouchable:
        def __iter__(self):
            raise AssertionError("the data was read")

    for info in lorainit.available():
        if not info.needs:
            start(LLAMA.adapted(), info.name, data=Untouchable())


# --- layers that cannot be started --------------------------------------------------------------------------------


def odd_net(**odd):
    """A net around one odd layer, between two that any method can start."""
    with seeded():
        return Net(first=nn.Conv2d(3, 4, 3, padding=1), **odd, flat=nn.Flatten(), last=nn.LazyLinear(5)).eval()


ODD = {
    "embedding": (lambda: odd_net(tokens=Tokens(), odd=nn.Embedding(8, 6)), {}, "embedding"),
    "grouped": (lambda: odd_net(odd=nn.Conv2d(4, 4, 3, groups=2)), {}, r"groups=2"),
    "dilated": (lambda: odd_net(odd=nn.Conv2d(4, 4, 3, dilation=2, padding="same")), {}, r"dilat"),
    "circular": (lambda: odd_net(odd=nn.Conv2d(4, 4, 3, padding=1, padding_mode="circular")), {}, r"circular"),
    "thin": (lambda: odd_net(odd=nn.Linear(8, 3)), {}, r"rank 4 exceeds min\(in, out\) = 3"),
    "zero": (lambda: odd_net(odd=nn.Linear(8, 8)), {}, r"dead|zero"),
    "attention": (lambda: odd_net(lines=nn.Flatten(1, 2), odd=Attention()), {}, "Multihead"),
}


def odd_model(name):
    make, config, reason = ODD[name]
    base = make()
    logits(base, CONV.batch())  # gives the lazy layer its shape
    if name == "zero":
        nn.init.zeros_(base.odd.weight)
    targets = ["first", "last"] + ([] if config else ["inner" if name == "attention" else "odd"])
    return base, LoraConfig(r=4, lora_alpha=8, target_modules=targets, **config), reason


@pytest.mark.parametrize("name", ODD)
def test_a_layer_that_cannot_be_started_is_an_error_that_names_it_and_changes_nothing(name):
    base, config, reason = odd_model(name)
    model = get_peft_model(base, config).eval()
    before = Snapshot.of(model)
    with pytest.raises(lorainit.UnsupportedLayerError, match=rf"'odd(\.inner)?': .*{reason}"):
        start(model, "pissa")
    if name == "attention":  # PEFT remakes its parameters whenever its modules are listed
        assert_same_tensors(Snapshot.of(model).tensors, before.tensors)
    else:
        before.assert_unchanged(model)


@pytest.mark.parametrize("name", ODD)
def test_or_it_stays_as_it_was_with_a_warning_and_a_row_and_the_others_start(name):
    base, config, reason = odd_model(name)
    expected = logits(base, CONV.batch())
    model = get_peft_model(base, config).eval()
    before = {n: t.clone() for n, t in model.state_dict().items() if ".odd." in n and "lora_" in n}
    with pytest.warns(UserWarning, match=rf"layer 'odd(\.inner)?' as it was: .*{reason}"):
        report = start(model, "pissa", on_unsupported="default")
    rows = {row.name: row for row in report.layers}
    left = [row for row in rows.values() if row.kind == "default"]
    assert len(left) == (2 if name == "attention" else 1)  # PEFT adapts its output layer, too
    assert all(row.name.startswith("odd") and row.base == "none" for row in left)
    assert rows["first"].base == rows["last"].base == "offset"
    state = model.state_dict()
    assert all(torch.equal(state[n], t) for n, t in before.items())
    assert torch.equal(logits(model, CONV.batch()), expected)


@pytest.mark.parametrize("method", ["pissa", "milora", "olora", "loram"])
def test_a_rank_above_what_the_weight_has_is_refused_by_methods_that_take_directions_from_it(method):
    model = LLAMA.adapted(r=17)
    before = Snapshot.of(model)
    with pytest.raises(lorainit.UnsupportedLayerError, match=r"q_proj': rank 17 exceeds min\(in, out\) = 16"):
        start(model, method)
    before.assert_unchanged(model)


@pytest.mark.parametrize("method", ["kaiming", "gaussian", "init-ab"])
def test_random_starts_take_any_rank(method):
    model = LLAMA.adapted(r=17)
    start(model, method, base=preserving_base(method))
    assert torch.equal(logits(model, LLAMA.batch()), logits(LLAMA.base(), LLAMA.batch()))


@each_method
def test_a_layer_whose_weight_is_zero_gets_a_start_that_trains_or_is_refused(method):
    model = LLAMA.adapted()
    nn.init.zeros_(model.base_model.model.model.layers[0].self_attn.v_proj.base_layer.weight)
    before = Snapshot.of(model)
    try:
        report = start(model, method, data=LLAMA.batches())
    except lorainit.UnsupportedLayerError as error:
        assert "layers.0.self_attn.v_proj" in str(error)
        before.assert_unchanged(model)
        return
    A, B = factors(model)["model.layers.0.self_attn.v_proj"]
    assert A.any() or B.any()
    (row,) = [row for row in report.layers if row.name == "model.layers.0.self_attn.v_proj"]
    assert row.relative_size is None


def test_a_layer_left_alone_in_a_second_start_keeps_the_offset_of_the_first():
    model = LLAMA.adapted()
    start(model, "loram")

    def refuse(site):
        raise lorainit.UnsupportedLayerError(f"layer '{site.name}': not this one")

    with pytest.warns(UserWarning, match=r"q_proj' as it was: .*not this one"):
        report = start(model, Scripted(refuse, at=0), on_unsupported="default")
    assert report.layers[0].base == "offset"
    assert torch.equal(logits(model, LLAMA.batch()), logits(LLAMA.base(), LLAMA.batch()))


def test_the_options_of_a_method_object_are_taken():
    exact, default = LLAMA.adapted(), LLAMA.adapted()
    report = start(exact, lorainit.PiSSA(exact=True))
    start(default, "pissa")
    assert report.options == dataclasses.asdict(lorainit.PiSSA(exact=True))
    assert not torch.equal(
        factors(exact)["model.layers.0.mlp.down_proj"][0], factors(default)["model.layers.0.mlp.down_proj"][0]
    )
