from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lorainit import LoraInitError, get_method
from lorainit.methods import Factors, random


def pair(out: int, in_: int, rank: int, seed: int) -> Factors:
    generator = torch.Generator().manual_seed(seed)
    return Factors(torch.randn(rank, in_, generator=generator), 3 * torch.randn(out, rank, generator=generator))


@given(out=st.integers(6, 30), in_=st.integers(6, 30), rank=st.integers(1, 6), seed=st.integers(0, 99))
def test_it_has_the_references_singular_values_and_other_directions(out, in_, rank, seed) -> None:
    reference = pair(out, in_, rank, seed)
    found = random.factors(reference, generator=torch.Generator().manual_seed(seed))
    for mine, theirs in (*zip(found, reference, strict=True), (found.B @ found.A, reference.B @ reference.A)):
        spectrum = [torch.linalg.svdvals(matrix.double()) for matrix in (mine, theirs)]
        torch.testing.assert_close(*spectrum, rtol=1e-5, atol=1e-5)


def test_the_frames_are_uniform() -> None:
    generator = torch.Generator().manual_seed(0)
    reference = Factors(torch.eye(2, 5), torch.eye(4, 2))
    A = torch.stack([random.factors(reference, generator=generator).A for _ in range(4000)])
    assert float(A.mean(0).abs().max()) < 0.03  # without QR's signs corrected the diagonal would lean to one side
    torch.testing.assert_close(A.square().mean(0), torch.full((2, 5), 1 / 5), atol=0.02, rtol=0)


def test_a_reference_that_starts_at_zero_stays_there() -> None:
    found = random.factors(Factors(torch.randn(3, 8), torch.zeros(6, 3)), generator=torch.Generator().manual_seed(0))
    assert not found.B.any()
    assert found.A.any()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"reference": "lora-ga"}, "data-free method"),
        ({"reference": "random"}, "data-free method"),
        ({"reference": "pisa"}, "unknown method 'pisa'"),
        ({"reference_options": {}}, "has no option"),
    ],
    ids=lambda value: None,
)
def test_a_wrong_reference_is_refused(options, message) -> None:
    with pytest.raises(LoraInitError, match=message):
        get_method("random", **options)
