"""OLoRA: golden values of PEFT, and the QR decomposition that it is."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.testing import assert_close

import golden
from lorainit import OLoRA, UnsupportedLayerError
from lorainit.methods import olora
from matrices import normal


@pytest.mark.parametrize("case", golden.cases("peft_pissa_olora", prefix="olora"))
def test_matches_peft(case):
    tensors, scaling = case.tensors, case.options["scaling"]
    W, expected = tensors["weight"], (tensors["lora_A"], tensors["lora_B"])
    A, B = olora.factors(W, case.options["r"])
    tolerances = case.tolerances
    assert golden.product(A, B, *expected) <= tolerances["product"]
    assert golden.vectors(A, expected[0]) <= tolerances["vectors lora_A, lora_B"]
    assert golden.vectors(B.mT, expected[1].mT) <= tolerances["vectors lora_A, lora_B"]
    assert golden.entries(W - scaling * B @ A, tensors["base_weight"]) <= tolerances["base_weight entries"]
    assert golden.function(tensors["base_weight"], A, B, scaling, W) <= tolerances["function"]


@given(m=st.integers(1, 14), n=st.integers(1, 14), data=st.data())
def test_is_the_leading_part_of_the_full_qr(m, n, data):
    rank = data.draw(st.integers(1, min(m, n)))
    W = normal(m, n)
    A, B = olora.factors(W, rank)
    Q, R = torch.linalg.qr(W)
    assert_close(B @ A, Q[:, :rank] @ R[:rank], rtol=0, atol=1e-11)
    # R with a non-negative diagonal is unique: the factors agree, not only their product
    sign = R.diagonal()[:rank].sign()
    assert_close(B, Q[:, :rank] * sign, rtol=0, atol=1e-10)
    assert_close(A, R[:rank] * sign[:, None], rtol=0, atol=1e-10)


def test_factors_are_orthonormal_and_triangular_and_reproduce_the_first_columns():
    W = normal(20, 14)
    A, B = olora.factors(W, 5)
    assert_close(B.mT @ B, torch.eye(5, dtype=W.dtype), rtol=0, atol=1e-13)
    assert_close(A.tril(-1), torch.zeros_like(A), rtol=0, atol=1e-12)
    assert bool((A.diagonal() > 0).all())
    assert_close((B @ A)[:, :5], W[:, :5], rtol=0, atol=1e-12)
    # a projection: no other product on this column space is nearer to W
    assert_close(B.mT @ (W - B @ A), torch.zeros_like(A), rtol=0, atol=1e-12)


def test_dependent_columns_still_give_an_orthonormal_start():
    W = normal(12, 8)
    W[:, 1] = 2 * W[:, 0]
    W[:, 2] = 0
    A, B = olora.factors(W, 4)
    assert_close(B.mT @ B, torch.eye(4, dtype=W.dtype), rtol=0, atol=1e-13)
    assert bool((A.diagonal() >= -1e-12).all())
    assert_close((B @ A)[:, :4], W[:, :4], rtol=0, atol=1e-12)


@pytest.mark.parametrize("rank", [0, 7])
def test_pure_function_refuses_a_rank_out_of_range(rank):
    with pytest.raises(ValueError, match=f"rank {rank} is not between 1 and"):
        olora.factors(normal(8, 6), rank)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("alpha", [1, 4, 64])
def test_method_ignores_the_scaling(site, generator, alpha, dtype):
    W = normal(20, 14, dtype=dtype)
    start, expected = OLoRA().start(site(W, 4, alpha=alpha), generator), olora.factors(W.float(), 4)
    assert torch.equal(start.A, expected.A) and torch.equal(start.B, expected.B)


def test_rank_above_min_is_refused_by_name(site, generator):
    with pytest.raises(UnsupportedLayerError, match="'block.proj': rank 7 exceeds"):
        OLoRA().start(site(normal(8, 6), 7), generator)
