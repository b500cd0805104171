"""What is read from a batch of any kind of model: which positions count, how many terms its loss has, its rows."""

from __future__ import annotations

import collections

import pytest
import torch
import transformers
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.nn import functional as F

import cases
from lorainit import LoraInitError, find_sites
from lorainit.statistics import Request, collect
from lorainit.statistics.batches import (
    count_rows,
    count_terms,
    position_masks,
    split_rows,
    summed_loss,
    take_rows,
    to_device,
)
from lorainit.statistics.positions import reads_decoder, side

FORWARD = Request(frozenset({"input_second_moment"}), dtype=torch.float64)
ROWS, LENGTH = 4, 8
SIZES = {"vocab_size": cases.VOCAB, "num_hidden_layers": 1, "num_attention_heads": 2, "hidden_size": 16}
SIDES = {"d_model": 16, "encoder_layers": 1, "decoder_layers": 1, "encoder_ffn_dim": 24, "decoder_ffn_dim": 24}
SIDES |= {"encoder_attention_heads": 2, "decoder_attention_heads": 2, "vocab_size": cases.VOCAB, "dropout": 0.0}
T5 = {"d_model": 16, "d_kv": 8, "d_ff": 24, "num_layers": 1, "num_heads": 2, "vocab_size": cases.VOCAB}
TEXT = SIZES | {"intermediate_size": 24, "num_key_value_heads": 2, "head_dim": 8}
IMAGES = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 8}
GEMMA3 = {"text_config": TEXT, "vision_config": IMAGES | {"patch_size": 4}, "mm_tokens_per_image": 4}
T5GEMMA = {"encoder": dict(TEXT), "decoder": dict(TEXT), "vocab_size": cases.VOCAB}
OPT = SIZES | {"ffn_dim": 24, "max_position_embeddings": 64, "word_embed_proj_dim": 16}


def built(kind: str, sizes: dict, **more) -> nn.Module:
    """A tiny model by the name of its class, in float64."""
    made = getattr(transformers, kind)
    with cases.seeded():
        return made(made.config_class(**(sizes | more))).double().eval()


def tokens(*shape: int) -> torch.Tensor:
    with cases.seeded(3):
        return torch.randint(3, cases.VOCAB - 4, shape)


def with_columns(batch: dict, names: dict[str, int], columns: int = 5) -> dict:
    """The batch with so many more columns of padding in some of its tensors."""
    return batch | {name: F.pad(batch[name], (0, columns), value=value) for name, value in names.items()}


def sums(model: nn.Module, targets: list[str], batch: dict) -> dict:
    with cases.seeded(1):
        adapted = get_peft_model(model, LoraConfig(r=2, target_modules=targets))
    found = collect(adapted, find_sites(adapted)[0], [batch], FORWARD, progress=False)
    adapted.unload()
    return found


INPUT = {"input_ids": 1, "attention_mask": 0}
OWN = {"decoder_input_ids": 1, "decoder_attention_mask": 0}


def text(*shape: int) -> dict:
    return {"input_ids": tokens(*shape), "attention_mask": torch.ones(shape, dtype=torch.long)}


def two_sided() -> dict:
    return text(ROWS, LENGTH) | {f"decoder_{name}": value[:, 2:] for name, value in text(ROWS, LENGTH).items()}


PADDED = {
    "opt": ("OPTForCausalLM", OPT, ["q_proj", "fc2"], text(ROWS, LENGTH), INPUT),
    "bert's head": ("BertForMaskedLM", TEXT, ["cls.predictions.decoder"], text(ROWS, LENGTH), INPUT),
    "bart's decoder": ("BartForCausalLM", SIDES, ["fc2"], text(ROWS, LENGTH), INPUT),
    "multiple choice": ("BertForMultipleChoice", TEXT, ["query"], text(ROWS, 2, LENGTH), INPUT),
    "t5, no labels": ("T5ForConditionalGeneration", T5, ["q", "wo", "lm_head"], two_sided(), OWN),
    "t5, input": ("T5ForConditionalGeneration", T5, ["q", "k", "wo"], two_sided(), INPUT),
    "bart as classifier": ("BartForSequenceClassification", SIDES, ["k_proj", "fc2"], text(ROWS, LENGTH), INPUT),
}


@pytest.mark.parametrize("kind, sizes, targets, batch, padding", PADDED.values(), ids=PADDED)
def test_columns_of_padding_change_nothing(kind, sizes, targets, batch, padding) -> None:
    if kind == "BartForSequenceClassification":  # its last token is asked for, so that it ends alike in every row
        batch = batch | {"input_ids": batch["input_ids"].index_fill(1, torch.tensor([LENGTH - 1]), 2)}
    model = built(kind, sizes)
    plain, padded = (sums(model, targets, each) for each in (batch, with_columns(batch, padding)))
    for name, expected in plain.items():
        # the decoder of a classifier reads the input one to the right: its last token as well, where there is room
        more = ROWS if kind == "BartForSequenceClassification" and reads_decoder(name) else 0
        assert padded[name].tokens == expected.tokens + more
        if not more:
            torch.testing.assert_close(padded[name].input_second_moment, expected.input_second_moment)


CROSS = {
    "t5": ("T5ForConditionalGeneration", T5, ["EncDecAttention.k", "EncDecAttention.v"]),
    "bart": ("BartForConditionalGeneration", SIDES, ["encoder_attn.k_proj"]),
    "t5gemma": ("T5GemmaForConditionalGeneration", T5GEMMA, ["cross_attn.k_proj", "cross_attn.v_proj"]),
}


@pytest.mark.parametrize("kind, sizes, targets", CROSS.values(), ids=CROSS)
def test_keys_and_values_of_cross_attention_are_the_encoders_tokens(kind, sizes, targets) -> None:
    batch = text(ROWS, LENGTH)
    batch["attention_mask"][0, 5:] = 0
    batch["labels"] = batch["input_ids"].clone()
    batch["labels"][:, 3:] = -100  # as long as the input, so that only the name of a layer can tell
    for found in sums(built(kind, sizes, decoder_start_token_id=0), targets, batch).values():
        assert found.tokens == ROWS * LENGTH - 3


@pytest.mark.parametrize(
    "name, reads",
    [
        ("text_decoder.layers.0.cross_attention.v_proj", "encoder"),  # SeamlessM4T
        ("text_decoder.layers.0.cross_attention.q_proj", "decoder"),
        ("prophetnet.decoder.layers.0.cross_attn.key_proj", "encoder"),
        ("perceiver.encoder.cross_attention.attention.self.key", "input"),  # it has no other side
        ("decoder.layer.0.encoder_decoder_attention.attention.value", "encoder"),  # Pix2Struct
        ("encoder.layers.0.self_attn.k_proj", "input"),
        ("lm_head", "decoder"),
    ],
)
def test_the_side_that_a_layer_reads_is_in_its_name(name, reads) -> None:
    assert side(name) == reads


def test_the_decoder_of_an_image_model_reads_images_by_cross_attention() -> None:
    gpt2 = transformers.GPT2Config(n_embd=16, n_layer=1, n_head=2, vocab_size=cases.VOCAB, add_cross_attention=True)
    with cases.seeded():
        model = transformers.GPT2LMHeadModel(gpt2).double().eval()
    batch = text(ROWS, LENGTH) | {"encoder_hidden_states": torch.randn(ROWS, LENGTH, 16, dtype=torch.float64)}
    batch["attention_mask"][:, 6:] = 0
    (found,) = sums(model, ["crossattention.c_attn"], batch).values()
    assert found.tokens == ROWS * LENGTH  # what the text's mask says is of the text
    batch["encoder_attention_mask"] = torch.ones(ROWS, LENGTH)
    batch["encoder_attention_mask"][:, 7:] = 0
    (found,) = sums(model, ["crossattention.c_attn"], batch).values()
    assert found.tokens == ROWS * 7


class Wrapper(nn.Module):
    """A module of one's own around a language model."""

    def __init__(self, inside: nn.Module) -> None:
        super().__init__()
        self.inside = inside

    def forward(self, **batch):
        return self.inside(**batch)


def adapted(model: nn.Module) -> nn.Module:
    return get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj"]))


SHIFTING = {
    "llama": cases.llama,
    "in a module of one's own": lambda: Wrapper(cases.llama()),
    "in peft in a module of one's own": lambda: adapted(Wrapper(cases.llama())),
    "gemma3": lambda: built("Gemma3ForConditionalGeneration", GEMMA3),
    "gpt2 with two heads": lambda: built("GPT2DoubleHeadsModel", SIZES),
}
NOT_SHIFTING = {
    "bert": lambda: built("BertForMaskedLM", TEXT),
    "t5": lambda: built("T5ForConditionalGeneration", T5, decoder_start_token_id=0),
    "bart's decoder": lambda: built("BartForCausalLM", SIDES),
    "pegasus' decoder": lambda: built("PegasusForCausalLM", SIDES),
    "xlm": lambda: built("XLMWithLMHeadModel", {"vocab_size": cases.VOCAB, "emb_dim": 16, "n_layers": 1, "n_heads": 2}),
}
MODELS = [pytest.param(make, 1, id=name) for name, make in SHIFTING.items()]
MODELS += [pytest.param(make, 0, id=name) for name, make in NOT_SHIFTING.items()]


@pytest.mark.parametrize("make, shift", MODELS)
@torch.no_grad()
def test_terms_and_scored_positions_are_the_models(make, shift) -> None:
    model, ids = make().eval(), tokens(2, LENGTH)
    labels = ids.clone()
    labels[0, :5], labels[1, 7:] = -100, -100
    batch = {"input_ids": ids, "labels": labels}
    logits = model(**batch).logits.double()
    expected = F.cross_entropy(
        logits[:, : LENGTH - shift].reshape(-1, logits.shape[-1]), labels[:, shift:].reshape(-1), reduction="sum"
    )
    loss, terms = summed_loss(model, batch)
    assert terms == int((labels[:, shift:] != -100).sum())
    assert float(loss) == pytest.approx(float(expected), rel=1e-5)
    masks = position_masks(model, batch, "labels")
    (scored,) = {tuple(mask.flatten().tolist()) for side, mask in masks.items() if side in ("input", "decoder")}
    assert scored == tuple(F.pad(labels[:, shift:] != -100, (0, shift)).flatten().tolist())


def test_a_compiled_model_is_read_as_it_was_written() -> None:
    ids = tokens(ROWS, LENGTH)
    for model in (torch.compile(cases.llama()), adapted(torch.compile(cases.llama()))):
        assert count_terms(model, {"input_ids": ids, "labels": ids}) == ROWS * (LENGTH - 1)


def test_a_trainers_number_of_items_is_no_business_of_the_batchs_mean() -> None:
    model, ids = cases.llama().eval(), tokens(ROWS, LENGTH)
    batch = {"input_ids": ids, "labels": ids}
    with torch.no_grad():
        loss, terms = summed_loss(model, batch | {"num_items_in_batch": torch.tensor(1000)})
        assert (float(loss), terms) == (float(summed_loss(model, batch)[0]), ROWS * (LENGTH - 1))


Pair = collections.namedtuple("Pair", "input_ids attention_mask")
IDS, POSITIONS = tokens(ROWS, LENGTH), torch.arange(LENGTH)[None]
WITH_ROWS = {
    "positions for all rows, first": {"position_ids": POSITIONS, "input_ids": IDS},
    "three positions a token": {"position_ids": POSITIONS.expand(3, ROWS, LENGTH), "input_ids": IDS},
    "a named tuple": Pair(IDS, torch.ones_like(IDS)),
    "a plain tuple": (torch.ones(1), IDS, IDS),
    "features in a list": [{"input_ids": IDS}, {"input_ids": IDS}],
}
LEFT = {"positions for all rows, first": (1, LENGTH), "three positions a token": (3, 2, LENGTH)}


@pytest.mark.parametrize("name", WITH_ROWS)
def test_only_what_has_the_batchs_rows_is_cut_into_rows(name) -> None:
    batch = WITH_ROWS[name]
    assert count_rows(batch) == ROWS
    parts = split_rows(batch, 2)
    assert [count_rows(part) for part in parts] == [2, 2]
    assert type(parts[0]) is type(to_device(batch, torch.device("cpu"))) is type(batch)
    if name in LEFT:
        assert parts[0]["position_ids"].shape == LEFT[name]


def test_the_three_positions_of_three_rows_are_cut_by_row() -> None:
    batch = {"input_ids": IDS[:3], "position_ids": torch.arange(9).reshape(3, 3, 1).expand(3, 3, LENGTH)}
    assert take_rows(batch, slice(0, 1))["position_ids"][:, 0, 0].tolist() == [0, 3, 6]


def test_positions_for_all_rows_go_with_any_number_of_samples_and_any_micro_batch() -> None:
    case = cases.LLAMA
    batch = {"input_ids": tokens(ROWS, LENGTH)}
    request = Request(FORWARD.streams, dtype=torch.float64, samples=2)
    model = case.adapted(torch.float64)
    sites = find_sites(model)[0]
    wanted = collect(model, sites, [batch], request, progress=False)
    given = {"position_ids": POSITIONS} | batch
    for options in ({}, {"micro_batch": 1}):
        found = collect(model, sites, [given], request, progress=False, **options)
        for name, expected in wanted.items():
            assert (found[name].sequences, found[name].tokens) == (2, 2 * LENGTH)
            torch.testing.assert_close(found[name].input_second_moment, expected.input_second_moment)


def test_the_mask_in_a_named_tuple_is_read() -> None:
    mask = torch.ones_like(IDS)
    mask[:, 5:] = 0
    (found, *_) = sums(cases.llama().double(), ["q_proj"], Pair(IDS, mask)).values()
    assert found.tokens == ROWS * 5


LABELS = torch.ones(ROWS, LENGTH - 1, dtype=torch.long)
UNREADABLE = {
    "of pairs of tokens": ({"attention_mask": torch.ones(ROWS, LENGTH, LENGTH)}, r"attention_mask\[4, 8, 8\]"),
    "of heads": ({"attention_mask": torch.ones(ROWS, 1, LENGTH, LENGTH)}, r"attention_mask\[4, 1, 8, 8\]"),
    "of other labels": ({"attention_mask": torch.ones(ROWS, LENGTH), "labels": LABELS}, r"\[4, 8\].*\[4, 7\]"),
}


@pytest.mark.parametrize("fields, message", UNREADABLE.values(), ids=UNREADABLE)
def test_masks_that_name_no_positions_are_refused(fields, message) -> None:
    with pytest.raises(LoraInitError, match=message):
        position_masks(cases.llama(), {"input_ids": IDS} | fields, "labels")
