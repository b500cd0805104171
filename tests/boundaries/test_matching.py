"""Which modules are matched: found by tracing in many architectures, chosen by layer, stack and pattern."""

from __future__ import annotations

import pytest
import torch
import transformers
from torch import nn

import cases
from lorainit import LoraInitError
from lorainit.boundaries.matching import match
from lorainit.boundaries.tracing import trace

SIZES = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
CAUSAL = SIZES | {"num_key_value_heads": 1, "vocab_size": 40, "head_dim": 8, "pad_token_id": 0, "eos_token_id": 1}
BERT_LIKE = SIZES | {"vocab_size": 40}
IMAGE = {"image_size": 8, "patch_size": 4}
T5 = {"d_model": 16, "d_ff": 24, "d_kv": 8, "num_layers": 2, "num_heads": 2, "vocab_size": 40}
CONVNEXT = {"hidden_sizes": [8, 16], "depths": [1, 2], "num_stages": 2, "image_size": 32}
BART = {f"{part}_{what}": n for part in ("encoder", "decoder") for what, n in (("layers", 2), ("attention_heads", 2))}
BART |= {"d_model": 16, "encoder_ffn_dim": 24, "decoder_ffn_dim": 24, "vocab_size": 40}
GPT2 = {"n_embd": 16, "n_layer": 2, "n_head": 2, "vocab_size": 40}

# (configuration, model, options, ends of the modules that are to be found)
ARCHITECTURES = [
    ("LlamaConfig", "LlamaForCausalLM", CAUSAL, {"gate_proj"}),
    ("Qwen2Config", "Qwen2ForCausalLM", CAUSAL, {"gate_proj"}),
    ("Qwen3Config", "Qwen3ForCausalLM", CAUSAL, {"gate_proj"}),
    ("GemmaConfig", "GemmaForCausalLM", CAUSAL, {"gate_proj"}),
    ("Gemma2Config", "Gemma2ForCausalLM", CAUSAL, {"gate_proj"}),
    ("MistralConfig", "MistralForCausalLM", CAUSAL, {"gate_proj"}),
    ("PhiConfig", "PhiForCausalLM", SIZES | {"vocab_size": 40}, {"fc1"}),
    ("GPT2Config", "GPT2LMHeadModel", GPT2, {"c_fc"}),
    ("GPTNeoXConfig", "GPTNeoXForCausalLM", BERT_LIKE, {"dense_h_to_4h"}),
    ("BertConfig", "BertForSequenceClassification", BERT_LIKE, {"dense"}),
    ("RobertaConfig", "RobertaForSequenceClassification", BERT_LIKE, {"dense"}),
    ("DistilBertConfig", "DistilBertModel", {"dim": 16, "hidden_dim": 24, "n_layers": 2, "n_heads": 2}, {"lin1"}),
    ("ViTConfig", "ViTForImageClassification", SIZES | IMAGE, {"fc1"}),
    ("CLIPVisionConfig", "CLIPVisionModel", SIZES | IMAGE, {"fc1"}),
    ("ConvNextConfig", "ConvNextForImageClassification", CONVNEXT, {"pwconv1"}),
    ("T5Config", "T5ForConditionalGeneration", T5 | {"feed_forward_proj": "relu"}, {"wi"}),
    ("T5Config", "T5ForConditionalGeneration", T5 | {"feed_forward_proj": "gated-gelu"}, {"wi_0"}),
    ("BartConfig", "BartForConditionalGeneration", BART, {"fc1"}),
]


def build(config: str, model: str, options: dict) -> nn.Module:
    with cases.seeded():
        return getattr(transformers, model)(getattr(transformers, config)(**options)).eval()


def traced(model: nn.Module):
    config = model.config
    with cases.seeded(1):
        if hasattr(config, "image_size") and hasattr(config, "num_channels"):
            batch = {"pixel_values": torch.randn(1, 3, config.image_size, config.image_size)}
        else:
            batch = {"input_ids": torch.randint(40, (2, 5))}
            if config.is_encoder_decoder:
                batch |= {"decoder_input_ids": batch["input_ids"]}
        return trace(model, lambda: model(**batch))


def chosen(model: nn.Module, sites: str = "auto", **options):
    return match(model, traced(model), sites, **options)


@pytest.mark.parametrize(
    ("config", "model", "options", "ends"), ARCHITECTURES, ids=lambda v: v if isinstance(v, str) else ""
)
def test_the_layers_that_feed_an_activation_are_found(config, model, options, ends) -> None:
    found = chosen(build(config, model, options), layers="all")
    assert {site.name.rpartition(".")[2] for site in found.sites} == ends
    assert found.warnings == ()  # the table of known architectures agrees
    assert not any(word in site.name for site in found.sites for word in ("pooler", "classifier", "lm_head"))
    layers = {site.stack: [] for site in found.sites}
    for site in found.sites:
        layers[site.stack].append(site.layer)
    assert all(len(inside) >= 2 or "stages" in stack for stack, inside in layers.items())
    assert sum(found.details["sites"].values()) == pytest.approx(sum(s.weight for s in found.sites))


def test_encoder_and_decoder_are_stacks_of_their_own() -> None:
    model = build("T5Config", "T5ForConditionalGeneration", T5 | {"num_layers": 4, "num_decoder_layers": 2})
    found = chosen(model, layers=0.5)
    assert [(s.name.split(".")[0], s.layer[0], s.weight) for s in found.sites] == [
        ("encoder", 2, 0.25),
        ("encoder", 3, 1.0),
        ("decoder", 1, 1.0),
    ]
    assert {s.name.split(".")[0] for s in chosen(model, scope="encoder").sites} == {"encoder"}
    assert {s.name.split(".")[0] for s in chosen(model, scope="decoder").sites} == {"decoder"}


@pytest.mark.parametrize(
    ("layers", "expected"),
    [
        (1, [3]),
        (3, [1, 2, 3]),
        (9, [0, 1, 2, 3]),
        (0.5, [2, 3]),
        (0.3, [2, 3]),
        (1.0, [0, 1, 2, 3]),
        ("all", [0, 1, 2, 3]),
        ("first 2", [0, 1]),
        ("last 2", [2, 3]),
        ("1-2", [1, 2]),
        ([0, 3], [0, 3]),
    ],
    ids=str,
)
def test_layers_are_counted_from_the_end_by_fraction_range_or_list(layers, expected) -> None:
    model = cases.llama(num_hidden_layers=4)
    found = chosen(model, layers=layers, weights="linear")
    assert [site.layer[0] for site in found.sites] == expected
    assert [site.weight for site in found.sites] == [(j + 1) / len(expected) for j in range(len(expected))]


def test_a_pattern_chooses_modules_and_those_of_one_block_share_their_weight() -> None:
    found = chosen(cases.llama(num_hidden_layers=4), "q_proj|v_proj", layers=2)
    assert [s.name.split(".")[2] + s.name[-7:] for s in found.sites] == ["2.q_proj", "2.v_proj", "3.q_proj", "3.v_proj"]
    assert [s.weight for s in found.sites] == [0.25, 0.25, 1, 1]
    # what comes next, outside of the last matched block
    assert found.stop == "model.norm"
    assert chosen(cases.llama(num_hidden_layers=4), layers="1-2").stop == "model.layers.3"


def test_adapters_do_not_change_what_is_found() -> None:
    case = cases.Case("llama", cases.llama, ("gate_proj", "q_proj"), cases._tokens, cases._token_labels)
    assert chosen(case.adapted()).sites == chosen(case.base()).sites


class Odd(nn.Module):
    """Activations written out by hand: σ(1.7x)·x, a slice of a fused projection, and a residual in between."""

    def __init__(self) -> None:
        super().__init__()
        self.quick, self.fused, self.residual, self.out = (nn.Linear(6, 6) for _ in range(4))
        self.config = transformers.PretrainedConfig()

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        x = torch.nn.functional.one_hot(input_ids % 6, 6).to(self.quick.weight.dtype)
        h = self.quick(x).view(-1, 6)
        x = (h * torch.sigmoid(1.7 * h)).view_as(x)
        a, b = self.fused(x).chunk(2, dim=-1)
        x = torch.cat((torch.relu(a), b), -1)
        x = torch.tanh(x + self.residual(x))
        return self.out(x).softmax(-1)


def test_only_a_whole_output_that_nothing_else_is_added_to_feeds_an_activation() -> None:
    assert [site.name for site in chosen(Odd(), layers="all").sites] == ["quick"]


class Attending(nn.Module):
    """A layer before torch's own attention, which lies among torch's activations, and one before an activation."""

    def __init__(self) -> None:
        super().__init__()
        self.before, self.up = nn.Linear(6, 6), nn.Linear(6, 6)
        self.attention, self.act = nn.MultiheadAttention(6, 2, batch_first=True), nn.ReLU()
        self.config = transformers.PretrainedConfig()

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        x = self.before(torch.nn.functional.one_hot(input_ids % 6, 6).to(self.up.weight.dtype))
        return self.act(self.up(self.attention(x, x, x)[0]))


def test_attention_is_no_activation() -> None:
    assert [site.name for site in chosen(Attending(), layers="all").sites] == ["up"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"sites": "nothing"}, "no matched site: sites='nothing' fits the end of no layer"),
        ({"sites": "("}, "no regular expression"),
        ({"sites": "auto", "layers": "7-9"}, "no matched site is left.*layers='7-9'"),
        ({"sites": "auto", "scope": "decoder"}, "no matched site is left.*scope='decoder'"),
    ],
    ids=str,
)
def test_no_matched_site_is_an_error_that_says_why(options, message) -> None:
    with pytest.raises(LoraInitError, match=message):
        chosen(cases.llama(), **options)


def test_a_model_without_activations_is_an_error() -> None:
    model = cases.Net(linear=nn.Linear(8, 8), other=nn.Linear(8, 8))
    seen = trace(model, lambda: model(torch.randn(2, 8)))
    with pytest.raises(LoraInitError, match="no layer of this model was seen to feed a pointwise activation"):
        match(model, seen, "auto")


def test_a_known_architecture_that_is_built_otherwise_gives_a_warning() -> None:
    model = Odd()
    model.config.model_type = "llama"
    assert "usually feeds its activation from 'gate_proj'" in chosen(model).warnings[0]


def test_tracing_leaves_no_hook() -> None:
    model = cases.llama()
    before = cases.Snapshot.of(model)
    traced(model)
    before.assert_unchanged(model)
