"""The sums against autograd and dense products in float64, whatever the batching, padding and grouping."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import cases
from cases import CASES
from lorainit import LoraInitError, NonFiniteError, find_sites
from lorainit.statistics import Request, collect

STREAMS = (
    "input_second_moment",
    "input_sum",
    "input_magnitude",
    "output_gradient_squares",
    "weight_gradient",
    "odd_weight_gradient",
)
ALL = Request(frozenset(STREAMS), dtype=torch.float64)
FORWARD = Request(frozenset({"input_second_moment"}), dtype=torch.float64)
NAMED = {case.name: case for case in CASES}


def started(case, **config):
    model = case.adapted(torch.float64, **config)
    return model, find_sites(model)[0]


def sums(model, sites, data, request=ALL, **options):
    return collect(model, sites, data, request, progress=False, **options)


def assert_near(actual, expected) -> None:
    # Transformers computes its losses in float32, whatever the model's dtype
    torch.testing.assert_close(actual, expected, rtol=0, atol=3e-6 * float(expected.abs().max()))


def token_batches(size: int, rows: int = 6, length: int = 8) -> list[dict[str, torch.Tensor]]:
    """Right-padded rows of unequal length with labels on the later tokens, cut into batches."""
    with cases.seeded(5):
        ids = torch.randint(1, cases.VOCAB, (rows, length))
    mask = torch.ones_like(ids)
    mask[0, 5:], mask[3, 3:] = 0, 0
    labels = ids.masked_fill(mask == 0, -100)
    labels[:, 0] = -100
    whole = {"input_ids": ids, "attention_mask": mask, "labels": labels}
    return [{k: v[i : i + size] for k, v in whole.items()} for i in range(0, rows, size)]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_the_weight_gradient_is_autograds_and_no_parameter_ever_gets_one(case) -> None:
    model, sites = started(case)
    found = sums(model, sites, case.batches(torch.float64))
    assert all(p.grad is None for p in model.parameters())
    weights = [site.base_layer.weight.requires_grad_() for site in sites]
    with model.disable_adapter():
        model(**case.batches(torch.float64)[0]).loss.backward()
    terms = next(iter(found.values())).labels
    for site, weight in zip(sites, weights, strict=True):
        if case.name == "tied" and site.name.endswith("lm_head"):
            continue  # autograd adds the embedding's share to a tied weight
        oracle = weight.grad.T if site.kind == "conv1d" else weight.grad.flatten(1)
        assert_near(found[site.name].weight_gradient / terms, oracle)


def test_label_terms_are_counted_as_the_model_averages_them() -> None:
    model, sites = started(NAMED["llama"])
    batch = token_batches(6)[0]
    found = sums(model, sites, [batch])
    assert next(iter(found.values())).labels == int((batch["labels"][:, 1:] != -100).sum())


@pytest.mark.parametrize("stream", STREAMS)
@pytest.mark.parametrize("size", [1, 2, 4])
def test_the_batch_size_does_not_matter(stream, size) -> None:
    model, sites = started(NAMED["llama"])
    whole, parts = (sums(model, sites, token_batches(s)) for s in (6, size))
    for site in sites:
        expected = getattr(whole[site.name], stream)
        # the model itself runs some of its operations in float32
        torch.testing.assert_close(
            getattr(parts[site.name], stream), expected, rtol=1e-4, atol=1e-6 * expected.abs().max()
        )
    assert [s.tokens for s in parts.values()] == [s.tokens for s in whole.values()]
    assert all(s.sequences == 6 for s in parts.values())


def test_padding_never_counts() -> None:
    model, sites = started(NAMED["llama"])
    padded = token_batches(6)
    rows = [
        {k: v[i : i + 1, : int(padded[0]["attention_mask"][i].sum())] for k, v in padded[0].items()} for i in range(6)
    ]
    with_padding, without = sums(model, sites, padded), sums(model, sites, rows)
    for site in sites:
        assert with_padding[site.name].tokens == without[site.name].tokens == 6 * 8 - 8
        for stream in ("input_second_moment", "weight_gradient", "output_gradient_squares"):
            expected = getattr(without[site.name], stream)
            actual = getattr(with_padding[site.name], stream)
            assert_near(actual, expected)


def test_the_label_mask_keeps_the_positions_whose_next_token_is_scored() -> None:
    model, sites = started(NAMED["llama"])
    batch = token_batches(6)[0]
    request = Request(frozenset({"input_second_moment", "weight_gradient"}), mask="labels", dtype=torch.float64)
    found = sums(model, sites, [batch], request)
    assert found[sites[0].name].tokens == int((batch["labels"][:, 1:] != -100).sum())
    everywhere = sums(model, sites, [batch])
    torch.testing.assert_close(found[sites[0].name].weight_gradient, everywhere[sites[0].name].weight_gradient)


def test_odd_rows_and_the_rest_make_the_whole_gradient() -> None:
    model, sites = started(NAMED["llama"])
    batch = token_batches(6)[0]
    found = sums(model, sites, [batch])
    odd = sums(model, sites, [{k: v[1::2] for k, v in batch.items()}])
    for site in sites:
        expected = odd[site.name].weight_gradient
        actual = found[site.name].odd_weight_gradient
        assert_near(actual, expected)


def test_layers_that_get_the_same_tensor_share_one_statistic() -> None:
    model, sites = started(NAMED["llama"])
    found = sums(model, sites, token_batches(2), FORWARD)
    by_input: dict[int, list[str]] = {}
    for site in sites:
        by_input.setdefault(id(found[site.name].input_second_moment), []).append(site.name.rsplit(".", 1)[-1])
    groups = [names for names in by_input.values() if len(names) > 1]
    assert ["q_proj", "k_proj", "v_proj"] in groups or ["q_proj", "v_proj"] in groups
    assert {"gate_proj", "up_proj"} <= {n for g in groups for n in g} or "gate_proj" not in {s.name for s in sites}


def test_groups_under_a_budget_give_the_same_sums_and_an_iterator_is_read_once() -> None:
    model, sites = started(NAMED["llama"])
    whole = sums(model, sites, token_batches(2))
    budget = max(
        8 * (2 * s.in_features * s.out_features + s.in_features**2 + 2 * s.in_features + s.out_features) for s in sites
    )
    grouped = sums(model, sites, iter(token_batches(2)), memory_budget=budget)
    for site in sites:
        torch.testing.assert_close(grouped[site.name].weight_gradient, whole[site.name].weight_gradient)
    with pytest.raises(LoraInitError, match=f"'{sites[0].name}' alone needs"):
        sums(model, sites, token_batches(2), memory_budget=100)


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("padding", [0, 1, "same"])
@pytest.mark.parametrize("dims", [1, 2])
def test_convolutions_are_matrix_products_of_their_patches(dims, padding, stride) -> None:
    if padding == "same" and stride > 1:
        pytest.skip("torch has no padding='same' with a stride")
    from peft import LoraConfig, get_peft_model

    kind = (nn.Conv1d, nn.Conv2d)[dims - 1]

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = kind(2, 5, 3, stride=stride, padding=padding)

        def forward(self, x, labels):
            y = self.conv(x)
            return {"loss": y.square().mean(), "y": y}

    with cases.seeded():
        model = get_peft_model(Net().double(), LoraConfig(r=2, target_modules=["conv"]))
        x = torch.randn(3, 2, *(7 for _ in range(dims)), dtype=torch.float64)
    sites = find_sites(model)[0]
    found = sums(model, sites, [{"x": x, "labels": torch.zeros(3)}])[sites[0].name]
    conv = model.base_model.model.conv.base_layer
    y = conv(x)
    assert found.tokens == y.numel() // 5
    # ‖W X‖² summed over patches is tr(W C Wᵀ)
    weight = conv.weight.detach().flatten(1)
    response = y.detach() - conv.bias.detach().view(1, -1, *(1 for _ in range(dims)))
    assert torch.trace(weight @ found.input_second_moment @ weight.T).item() == pytest.approx(
        response.square().sum().item()
    )
    conv.weight.requires_grad_()
    (3 * conv(x).square().mean()).backward()
    torch.testing.assert_close(found.weight_gradient, conv.weight.grad.flatten(1))


def test_a_forward_only_pass_stops_after_the_last_layer_that_is_watched() -> None:
    model, sites = started(NAMED["llama"])
    runs = []
    head = model.get_base_model().get_output_embeddings()
    handle = head.register_forward_hook(lambda *_: runs.append(1))
    whole = [{k: v for k, v in batch.items() if k != "attention_mask"} for batch in token_batches(1)]
    sums(model, sites[:2], whole, FORWARD)
    handle.remove()
    assert len(runs) == 1  # the first batch runs whole: only then is it known which layer is the last


def test_gradient_checkpointing_counts_nothing_twice() -> None:
    model, sites = started(NAMED["llama"])
    model.config.use_cache = False  # a recomputed block would append to the cache a second time
    expected = sums(model, sites, token_batches(3))
    layers = model.get_base_model().model.layers
    for layer in layers:  # checkpointing that is on in eval mode too
        plain = layer.forward
        layer.forward = lambda *a, _plain=plain, **k: torch.utils.checkpoint.checkpoint(
            _plain, *a, use_reentrant=False, **k
        )
    found = sums(model, sites, token_batches(3))
    for site in sites:
        assert found[site.name].tokens == expected[site.name].tokens
        for stream in STREAMS:
            torch.testing.assert_close(getattr(found[site.name], stream), getattr(expected[site.name], stream))


@pytest.mark.parametrize(
    ("data", "error", "message"),
    [
        ([], LoraInitError, "not a single batch"),
        ([{"input_ids": torch.ones(2, 4, dtype=torch.long)}], LoraInitError, "must hold 'labels'"),
        ([{"nonsense": torch.ones(2, 4)}], LoraInitError, "refuses a calibration batch"),
        (
            [{"input_ids": torch.ones(2, 4, dtype=torch.long), "labels": torch.full((2, 4), -100)}],
            LoraInitError,
            "no label that counts",
        ),
    ],
    ids=["no data", "no labels", "refused", "all labels masked"],
)
def test_unusable_data_are_refused_and_the_model_is_left_as_it_was(data, error, message) -> None:
    model, sites = started(NAMED["llama"])
    model.train()
    before = {n: (p.requires_grad, p.detach().clone()) for n, p in model.named_parameters()}
    with pytest.raises(error, match=message):
        sums(model, sites, data)
    assert model.training
    assert all(not m._forward_hooks for m in model.modules())
    for name, parameter in model.named_parameters():
        assert parameter.requires_grad == before[name][0]
        assert torch.equal(parameter, before[name][1])
    assert not any(m._disable_adapters for m in model.modules() if hasattr(m, "_disable_adapters"))


def test_a_value_that_is_no_number_is_located_by_layer_and_batch() -> None:
    model, sites = started(NAMED["llama"])
    with torch.no_grad():
        model.get_base_model().model.embed_tokens.weight[7] = torch.nan
    clean, broken = (torch.full((2, 4), i) for i in (1, 7))
    data = [{"input_ids": ids} for ids in (clean, broken)]
    with pytest.raises(NonFiniteError, match=f"'{sites[0].name}', batch 1: NaN or infinite entries in its inputs"):
        sums(model, sites, data, FORWARD)


def test_the_adapter_plays_no_part() -> None:
    case = NAMED["llama"]
    model, sites = started(case)
    plain = sums(model, sites, token_batches(6))
    cases.start(model, "init-ab")
    moved = sums(model, sites, token_batches(6))
    for site in sites:
        torch.testing.assert_close(moved[site.name].weight_gradient, plain[site.name].weight_gradient, rtol=0, atol=0)


def test_sequence_means_weigh_every_row_alike() -> None:
    model, sites = started(NAMED["llama"])
    request = Request(frozenset({"weight_gradient"}), loss="sequence_mean", dtype=torch.float64)
    found = sums(model, sites, token_batches(6), request)
    rows = [sums(model, sites, [b]) for b in token_batches(1)]
    expected = sum(r[sites[0].name].weight_gradient / r[sites[0].name].labels for r in rows)
    assert_near(found[sites[0].name].weight_gradient, expected)
    assert F.mse_loss(found[sites[0].name].weight_gradient, expected) < 1e-12


def test_only_the_first_samples_are_used_whatever_the_batch_size() -> None:
    model, sites = started(NAMED["llama"])
    request = Request(frozenset({"weight_gradient"}), dtype=torch.float64, samples=3)
    expected = sums(model, sites, token_batches(1)[:3])
    for size in (2, 6):
        found = sums(model, sites, token_batches(size), request)
        assert found[sites[0].name].sequences == 3
        assert_near(found[sites[0].name].weight_gradient, expected[sites[0].name].weight_gradient)
