"""Losses that are not the model's own: their gradients are autograd's, and every start that needs a loss takes them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from torch.nn import functional as F

import cases
import lorainit
from cases import VOCAB
from lorainit import LoraInitError, find_sites
from lorainit.start.data import summed
from lorainit.statistics import Request, collect

ROWS, LENGTH, WIDTH = 4, 6, 16
Loss = Callable[[nn.Module, Any], Tensor]


def _ids(seed: int) -> Tensor:
    return torch.randint(3, VOCAB, (ROWS, LENGTH), generator=torch.Generator().manual_seed(seed))


def _adapted(base: nn.Module, targets: list[str]) -> Any:
    return get_peft_model(base, LoraConfig(r=2, lora_alpha=4, target_modules=targets)).eval()  # pyright: ignore


def _log_probability(model: Any, ids: Tensor) -> Tensor:
    logits = model(input_ids=ids).logits[:, :-1].log_softmax(-1)
    return logits.gather(-1, ids[:, 1:, None]).squeeze(-1).sum(-1)


def _dpo() -> tuple[Any, Any, Loss]:
    """Direct preference optimization against a reference whose log-probabilities are known beforehand."""
    with cases.seeded():
        model = _adapted(cases.llama().double(), ["q_proj", "v_proj"])
    chosen, rejected = _ids(0), _ids(1)
    with torch.no_grad():
        reference = _log_probability(model, chosen) - _log_probability(model, rejected)
    batch = {"input_ids": chosen, "rejected": rejected, "reference": reference}

    def loss(model: Any, batch: Any) -> Tensor:
        margin = _log_probability(model, batch["input_ids"]) - _log_probability(model, batch["rejected"])
        return -F.logsigmoid(0.1 * (margin - batch["reference"])).mean()

    return model, batch, loss


def _reward() -> tuple[Any, Any, Loss]:
    """A reward model's Bradley-Terry loss."""
    sizes = {"hidden_size": WIDTH, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = transformers.LlamaConfig(**sizes, vocab_size=VOCAB, num_labels=1, pad_token_id=0)
    with cases.seeded():
        model = _adapted(transformers.LlamaForSequenceClassification(config).double(), ["q_proj", "down_proj"])

    def loss(model: Any, batch: Any) -> Tensor:
        better, worse = (model(input_ids=batch[name]).logits for name in ("input_ids", "rejected"))
        return -F.logsigmoid(better - worse).mean()

    return model, {"input_ids": _ids(0), "rejected": _ids(1)}, loss


def _diffusion() -> tuple[Any, Any, Loss]:
    """The noise that a UNet predicts."""
    diffusers = pytest.importorskip("diffusers")
    with cases.seeded():
        unet = diffusers.UNet2DModel(
            sample_size=8,
            block_out_channels=(8, 8),
            down_block_types=("DownBlock2D", "AttnDownBlock2D"),
            up_block_types=("AttnUpBlock2D", "UpBlock2D"),
            norm_num_groups=4,
            layers_per_block=1,
        ).double()
        noise, image = (torch.randn(ROWS, 3, 8, 8, dtype=torch.float64) for _ in range(2))
    batch = {"pixel_values": image, "noise": noise, "timestep": torch.tensor([10, 200, 500, 900])}

    def loss(model: Any, batch: Any) -> Tensor:
        share = (batch["timestep"] / 1000)[:, None, None, None].double()
        noisy = (1 - share).sqrt() * batch["pixel_values"] + share.sqrt() * batch["noise"]
        return F.mse_loss(model(noisy, batch["timestep"]).sample, batch["noise"])

    return _adapted(unet, ["to_q", "to_v"]), batch, loss


def _contrastive() -> tuple[Any, Any, Loss]:
    """Sentence pairs, the other rows of the batch as negatives."""
    sizes = {"hidden_size": WIDTH, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
    quiet = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    with cases.seeded():
        bert = transformers.BertModel(transformers.BertConfig(**sizes, **quiet, vocab_size=VOCAB))
        model = _adapted(bert.double(), ["query", "value"])

    def loss(model: Any, batch: Any) -> Tensor:
        one, two = (F.normalize(model(input_ids=batch[name]).pooler_output) for name in ("input_ids", "pair"))
        return F.cross_entropy(one @ two.T / 0.1, torch.arange(len(one)))

    return model, {"input_ids": _ids(0), "pair": _ids(1)}, loss


LOSSES = {"dpo": _dpo, "reward": _reward, "diffusion": _diffusion, "contrastive": _contrastive}


@pytest.mark.parametrize("name", LOSSES)
def test_the_gradients_are_autograds_of_the_mean_loss(name) -> None:
    model, batch, loss = LOSSES[name]()
    sites = find_sites(model)[0]
    request = Request(frozenset({"weight_gradient"}), dtype=torch.float64, loss_function=summed(loss))
    found = collect(model, sites, [batch], request, progress=False)
    weights = [site.base_layer.weight.requires_grad_(True) for site in sites]
    expected = torch.autograd.grad(loss(model, batch), weights)
    for site, gradient in zip(sites, expected, strict=True):
        assert float(gradient.norm()) > 0
        torch.testing.assert_close(found[site.name].weight_gradient / ROWS, gradient.flatten(1))


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize(
    "method, options",
    [("lora-ga", {}), ("lora-one", {}), ("lora-da", {}), ("hrp", {}), ("lora-one", {"match_lr": "curvature"})],
    ids=["lora-ga", "lora-one", "lora-da", "hrp", "curvature"],
)
def test_every_start_that_needs_a_loss_takes_it(name, method, options) -> None:
    model, batch, loss = LOSSES[name]()
    chosen = lorainit.HRP(steps=2) if method == "hrp" else method
    report = lorainit.initialize(model, chosen, data=[batch], loss_function=loss, progress=False, **options)
    assert {row.kind for row in report.layers} <= {"linear", "conv"}
    assert all(bool(torch.isfinite(factor).all()) for site in find_sites(model)[0] for factor in site.factors())
    other, *_ = LOSSES[name]()
    twice = lorainit.HRP(steps=2) if method == "hrp" else method
    doubled = lambda m, b: 2 * loss(m, b)  # noqa: E731
    if method == "lora-ga":  # the subspaces of a gradient do not depend on its size
        lorainit.initialize(other, twice, data=[batch], loss_function=doubled, progress=False)
        for a, b in zip(find_sites(model)[0], find_sites(other)[0], strict=True):
            torch.testing.assert_close(a.factors(), b.factors())


def test_a_loss_that_is_no_number_and_a_cache_of_another_loss_are_refused(tmp_path) -> None:
    model, batch, loss = _contrastive()
    with pytest.raises(LoraInitError, match="loss_function returned a tensor"):
        lorainit.initialize(model, "lora-one", data=batch, loss_function=lambda m, b: m(**b).pooler_output)
    with pytest.raises(LoraInitError, match="leave out cache or loss_function"):
        lorainit.initialize(model, "lora-one", data=batch, loss_function=loss, cache=tmp_path)
