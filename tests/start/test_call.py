"""What a call is refused for before anything is read or computed."""

from __future__ import annotations

import pytest
import torch

import cases
import lorainit
from cases import LLAMA, start
from lorainit import LoraInitError

NAN = float("nan")


class Unread:
    """Batches that nobody may ask for."""

    def __iter__(self):
        raise AssertionError("the data were read")


OPTIONS = [
    ({"max_batches": "3"}, "max_batches must be an integer, got '3'"),
    ({"max_batches": 1.5}, "max_batches must be an integer, got 1.5"),
    ({"max_batches": NAN}, "max_batches must be an integer, got nan"),
    ({"max_batches": True}, "max_batches must be an integer, got True"),
    ({"max_batches": 0}, "max_batches must be ≥ 1 or None, got 0"),
    ({"micro_batch": 1.5}, "micro_batch must be an integer, got 1.5"),
    ({"micro_batch": "2"}, "micro_batch must be an integer, got '2'"),
    ({"micro_batch": -1}, "micro_batch must be ≥ 1 or None, got -1"),
    ({"memory_budget": NAN}, "memory_budget=nan is no memory size"),
    ({"memory_budget": "nan"}, "memory_budget='nan' is no memory size"),
    ({"memory_budget": float("inf")}, "memory_budget=inf is no memory size"),
    ({"memory_budget": -1}, "memory_budget=-1 is no memory size"),
    ({"memory_budget": []}, r"memory_budget=\[\] is no memory size"),
    ({"seed": None}, "seed must be an integer, got None"),
    ({"ranks": None}, "ranks: rule=None is not one of"),
    ({"match_lr": "sharpness"}, "match_lr='sharpness' is not one of"),
    ({"overwrite": "yes"}, "overwrite='yes' is not one of"),
    ({"cache": 3}, "cache=3 is neither None nor a path"),
    ({"offload": 3}, "offload=3 is neither True, False nor a folder"),
    ({"adapter_name": "nope"}, "no LoRA layer carries the adapter 'nope'"),
    ({"proxy_data": torch.ones(2)}, "proxy_data must be batches as the model takes them, got a tensor of shape"),
]


@pytest.mark.parametrize("options, message", OPTIONS)
@pytest.mark.parametrize("method", ["eva", "auto", "abm"])
def test_a_wrong_option_is_found_before_any_data_are_read(method, options, message):
    model = LLAMA.adapted()
    before = cases.Snapshot.of(model)
    with pytest.raises(LoraInitError, match=message):
        start(model, method, **({"data": Unread()} | options))
    before.assert_unchanged(model)


def test_a_trained_or_unsupported_adapter_is_found_before_any_data_are_read():
    model = LLAMA.adapted()
    cases.train(model, LLAMA.batches())
    for method in ("eva", "auto", "abm"):
        with pytest.raises(LoraInitError, match="is not fresh"):
            start(model, method, data=Unread())
    tables = LLAMA.adapted(target_modules=["embed_tokens", "q_proj"])
    for method in ("eva", "abm"):
        with pytest.raises(LoraInitError, match="embedding layers are not supported"):
            start(tables, method, data=Unread())


IDS = torch.randint(cases.VOCAB, (3, 6))
NO_BATCHES = {
    "tensor": (IDS, r"data=a tensor \[3, 6\] are neither batches nor rows; write DataLoader"),
    "text": ("w1 w2", "data=str 'w1 w2' are neither batches nor rows; write DataLoader"),
    "number": (3, "data=int 3 are neither batches nor rows; write DataLoader"),
    "no rows": ([{"input_ids": IDS[:0], "labels": IDS[:0]}], r"input_ids\[0, 6\].* is empty: it has no row"),
    "no tokens": ([{"input_ids": IDS[:, :0], "labels": IDS[:, :0]}], r"input_ids\[3, 0\].* is empty: .* no token"),
    "float ids": ([{"input_ids": IDS.float(), "labels": IDS}], "input_ids of torch.float32: pass integers"),
    "unknown ids": ([{"input_ids": IDS + 1000, "labels": IDS}], "refuses a calibration batch .*: index out of range"),
    "texts": (["w1", "w2"], "rows of text: pass processing=tokenizer"),
    "lists": ([{"input_ids": IDS.tolist()}], "holds no tensor"),
    "misshapen": ([torch.randn(3, 7, 5)], "the model refuses a calibration batch"),
}


@pytest.mark.parametrize("data, message", NO_BATCHES.values(), ids=NO_BATCHES)
@pytest.mark.parametrize("method", ["eva", "corda", "lora-ga", "lora-da", "hrp", "abm"])
def test_what_is_no_batch_is_said_to_be_none(method, data, message):
    model = LLAMA.adapted()
    before = cases.Snapshot.of(model)
    with pytest.raises(LoraInitError, match=message):
        start(model, method, data=data)
    before.assert_unchanged(model)


@pytest.mark.parametrize("model", [None, "meta-llama/Llama-3.2-1B", 3, [torch.nn.Linear(2, 2)]])
def test_what_is_no_model_is_said_to_be_none(model):
    with pytest.raises(LoraInitError, match="model must be a torch module with PEFT's LoRA layers, got"):
        start(model, "pissa")


def test_a_whole_number_of_bytes_may_be_a_float():
    report = start(LLAMA.adapted(), "eva", data=LLAMA.batches(), memory_budget=1e9)
    assert len(report.layers) == 6


@pytest.mark.parametrize(
    "name, meant",
    [
        ("lora_ga", lorainit.LoRAGA()),
        ("LoRA_GA", lorainit.LoRAGA()),
        ("init_ab", lorainit.InitAB()),
        ("pissa_niter_16", lorainit.PiSSA(iterations=16)),
        ("PiSSA_niter_4", lorainit.PiSSA(iterations=4)),
    ],
)
def test_the_names_that_peft_has_are_understood(name, meant):
    assert lorainit.get_method(name) == meant
