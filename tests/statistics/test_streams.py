"""Sketches, full output moments, micro-batches, offload and shards against the dense sums in float64."""

from __future__ import annotations

import pytest
import torch

import cases
from cases import CASES
from lorainit import LoraInitError, find_sites
from lorainit.numerics.sketches import test_matrix as make_test
from lorainit.statistics import LayerStatistics, Request, Sketch, collect, merge
from lorainit.statistics.second_moment import add_second_moment, mirror
from lorainit.statistics.storage import Storage
from matrices import normal

DENSE = Request(frozenset({"input_second_moment", "weight_gradient", "input_sum"}), dtype=torch.float64)
TINY = Sketch(per_rank=1, extra=1, at_least=0.0, seed=5)
SKETCHED = Request(DENSE.streams, dtype=torch.float64, sketch=TINY)
NAMED = {case.name: case for case in CASES}


def started(case, rank=2):
    model = case.adapted(torch.float64, r=rank)
    return model, find_sites(model)[0]


def padded(size: int, rows: int = 6, length: int = 8) -> list[dict[str, torch.Tensor]]:
    with cases.seeded(5):
        ids = torch.randint(1, cases.VOCAB, (rows, length))
    mask = torch.ones_like(ids)
    mask[0, 5:], mask[3, 3:] = 0, 0
    labels = ids.masked_fill(mask == 0, -100)
    labels[:, 0] = -100
    labels[2] = -100  # a row without a label that counts
    whole = {"input_ids": ids, "attention_mask": mask, "labels": labels}
    return [{k: v[i : i + size] for k, v in whole.items()} for i in range(0, rows, size)]


def near(actual, expected, tolerance=3e-6) -> None:
    torch.testing.assert_close(actual, expected, rtol=0, atol=tolerance * float(expected.abs().max()) + 1e-14)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_sketches_are_products_of_the_sums_with_test_matrices(case) -> None:
    model, sites = started(case)
    data = case.batches(torch.float64)
    dense, sketched = (collect(model, sites, data, request, progress=False) for request in (DENSE, SKETCHED))
    for site in sites:
        exact, found = dense[site.name], sketched[site.name]
        assert found.input_second_moment is None and found.weight_gradient is None
        right = make_test("in", site.in_features, TINY.columns(site), 5).double()
        left = make_test("out", site.out_features, TINY.rows(site), 5).double()
        near(found.input_sketch, exact.input_second_moment @ right)
        near(found.input_energy, exact.input_second_moment.trace())
        near(found.gradient_range, exact.weight_gradient @ right)
        near(found.gradient_corange, left.mT @ exact.weight_gradient)
        assert (found.tokens, found.sketch_seed) == (exact.tokens, 5)


@pytest.mark.parametrize("size", [1, 4])
def test_batches_padding_and_order_do_not_matter_to_a_sketch(size) -> None:
    model, sites = started(NAMED["llama"])
    data = padded(6)
    whole = collect(model, sites, data, SKETCHED, progress=False)
    parts = collect(model, sites, data, SKETCHED, micro_batch=size, progress=False)
    turned = collect(model, sites, [{k: v.flip(0) for k, v in data[0].items()}], SKETCHED, progress=False)
    for site in sites:
        for stream in ("input_sketch", "input_energy", "gradient_range", "gradient_corange"):
            expected = getattr(whole[site.name], stream)
            near(getattr(parts[site.name], stream), expected, 1e-5)
            near(getattr(turned[site.name], stream), expected, 1e-5)
        for other in (parts, turned):
            assert (other[site.name].tokens, other[site.name].labels) == (6 * 8 - 8, whole[site.name].labels)
            assert other[site.name].sequences == 6


def test_sketches_inside_a_checkpointed_model_count_nothing_twice() -> None:
    model, sites = started(NAMED["llama"])
    model.config.use_cache = False
    expected = collect(model, sites, padded(3), SKETCHED, progress=False)
    for layer in model.get_base_model().model.layers:
        plain = layer.forward
        layer.forward = lambda *a, _plain=plain, **k: torch.utils.checkpoint.checkpoint(
            _plain, *a, use_reentrant=False, **k
        )
    found = collect(model, sites, padded(3), SKETCHED, progress=False)
    for site in sites:
        for stream in ("input_sketch", "gradient_range", "gradient_corange"):
            near(getattr(found[site.name], stream), getattr(expected[site.name], stream), 1e-12)


def test_the_full_output_moment_has_the_squares_on_its_diagonal_and_is_of_the_gradients() -> None:
    model, sites = started(NAMED["llama"])
    streams = frozenset({"output_gradient_squares", "output_gradient_second_moment"})
    found = collect(model, sites, padded(2), Request(streams, dtype=torch.float64), progress=False)
    grabbed: list[torch.Tensor] = []
    site = sites[0]
    handle = site.base_layer.register_forward_hook(
        lambda _m, _x, y: (y.requires_grad_(), y.register_hook(lambda g: grabbed.append(g.flatten(0, 1))))[0]
    )
    data = padded(6)[0]
    with model.disable_adapter():
        loss = model(**data).loss
        (loss * int((data["labels"][:, 1:] != -100).sum())).backward()
    handle.remove()
    near(found[site.name].output_gradient_second_moment, grabbed[0].mT @ grabbed[0], 1e-5)
    for site in sites:
        sums = found[site.name]
        torch.testing.assert_close(sums.output_gradient_second_moment.diagonal(), sums.output_gradient_squares)


def test_micro_batches_and_another_place_change_nothing(tmp_path) -> None:
    model, sites = started(NAMED["llama"])
    expected = collect(model, sites, padded(6), DENSE, progress=False)
    for options in ({"micro_batch": 4}, {"storage": Storage.of(True)}, {"storage": Storage.of(tmp_path)}):
        found = collect(model, sites, padded(6), DENSE, progress=False, **options)
        for site in sites:
            for stream in DENSE.streams:
                near(getattr(found[site.name], stream), getattr(expected[site.name], stream), 1e-5)
    with pytest.raises(LoraInitError, match="micro_batch must be ≥ 1"):
        collect(model, sites, padded(6), DENSE, progress=False, micro_batch=0)


@pytest.mark.parametrize("request_", [DENSE, SKETCHED], ids=["dense", "sketched"])
def test_shards_of_the_data_add_up(request_) -> None:
    model, sites = started(NAMED["llama"])
    data = padded(2)
    whole = collect(model, sites, data, request_, progress=False)
    shards = [collect(model, sites, part, request_, progress=False) for part in (data[:1], data[1:])]
    for site in sites:
        added = merge([shard[site.name] for shard in shards])
        assert (added.sequences, added.tokens, added.labels) == (6, whole[site.name].tokens, whole[site.name].labels)
        for stream in request_.streams_of(site):
            near(getattr(added, stream), getattr(whole[site.name], stream), 1e-5)
    with pytest.raises(ValueError, match="no shards"):
        merge([])
    with pytest.raises(ValueError, match="different seeds"):
        merge([LayerStatistics(sketch_seed=0), LayerStatistics(sketch_seed=1)])
    with pytest.raises(ValueError, match="differ in 'input_sum'"):
        merge([LayerStatistics(input_sum=torch.ones(2)), LayerStatistics()])


@pytest.mark.parametrize("size", [5, 256, 600])
def test_half_of_the_products_make_the_whole_moment(size) -> None:
    rows, sums = normal(20, size), LayerStatistics()
    for part in rows.split(7):
        add_second_moment(sums, "input_second_moment", part)
    assert sums.input_second_moment is not None
    mirror(sums.input_second_moment)
    torch.testing.assert_close(sums.input_second_moment, rows.mT @ rows)


def test_layers_below_the_size_keep_the_whole_sum() -> None:
    _, sites = started(NAMED["llama"])
    request = Request(DENSE.streams, sketch=Sketch(per_rank=1, extra=2, at_least=5.0))
    by_name = {site.name.rsplit(".", 1)[-1]: site for site in sites}
    assert "input_sketch" in request.streams_of(by_name["down_proj"])  # 24 ≥ 5·4 inputs
    assert "input_second_moment" in request.streams_of(by_name["q_proj"])  # 16 < 5·4
    assert "weight_gradient" in request.streams_of(by_name["down_proj"])
