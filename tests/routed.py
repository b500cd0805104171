"""What the experts of a tiny Mixtral see, by a dense product of all tokens with all of them."""

from __future__ import annotations

import types

import torch

import cases
from lorainit.statistics import LayerStatistics
from lorainit.statistics.batches import count_terms

STREAMS = (
    "input_second_moment",
    "input_sum",
    "input_magnitude",
    "output_gradient_squares",
    "output_gradient_second_moment",
    "weight_gradient",
    "odd_weight_gradient",
)


def batches(size=5, padded=False, rows=5, length=7, seed=5):
    with cases.seeded(seed):
        ids = torch.randint(3, cases.VOCAB, (rows, length))
    mask = torch.ones_like(ids)
    if padded:
        mask[0, 5:], mask[3, 3:] = 0, 0
    labels = ids.masked_fill(mask == 0, -100)
    whole = {"input_ids": ids, "attention_mask": mask, "labels": labels}
    return [{k: v[i : i + size] for k, v in whole.items()} for i in range(0, rows, size)]


class Dense:
    """Takes the place of a Mixtral's experts: all tokens go through all of them, with weight zero where not sent."""

    def __init__(self, experts, mask):
        self.mask, self.seen = mask.flatten().bool(), []
        experts.forward = types.MethodType(self.forward, experts)

    def forward(self, experts, tokens, index, weights):
        result = torch.zeros_like(tokens)
        for number in range(experts.num_experts):
            sent = index == number
            up = (tokens @ experts.gate_up_proj[number].T).requires_grad_()
            gate, linear = up.chunk(2, dim=-1)
            inner = torch.nn.functional.silu(gate) * linear
            down = inner @ experts.down_proj[number].T
            up.retain_grad(), down.retain_grad()
            result = result + (weights * sent).sum(-1, keepdim=True) * down
            self.seen.append((sent.any(-1) & self.mask, (tokens, up), (inner, down)))
        return result


def oracle(base, data, loss="sum", dtype=torch.float64):
    """Return the sums of every expert by name, row by row, padding and all."""
    found = {}
    base.requires_grad_(False)
    rows = [{k: v[i : i + 1] for k, v in batch.items()} for batch in data for i in range(len(batch["input_ids"]))]
    for number, row in enumerate(rows):
        layers = [Dense(layer.mlp.experts, row["attention_mask"]) for layer in base.model.layers]
        with torch.enable_grad():
            output = base(**row).loss
        (output * (count_terms(base, row) if loss == "sum" else 1)).backward()
        for depth, layer in enumerate(layers):
            for expert, (sent, *calls) in enumerate(layer.seen):
                for parameter, (inputs, output) in zip(cases.EXPERT_PARAMETERS, calls, strict=True):
                    sums = found.setdefault(f"model.layers.{depth}.{parameter}[{expert}]", LayerStatistics())
                    x, g = inputs[sent].detach(), output.grad[sent]
                    sums.tokens += len(x)
                    sums.labels += count_terms(base, row)
                    sums.sequences += 1
                    values = [x.mT @ x, x.sum(0), x.abs().sum(0), g.square().sum(0), g.mT @ g, g.mT @ x]
                    for stream, value in zip(STREAMS, [*values, values[-1] * (number % 2)], strict=True):
                        sums.add(stream, value.to(dtype))
    return found
