from __future__ import annotations

import types

import pytest
import torch
from torch import nn

import cases
from lorainit import LoraInitError
from lorainit.boundaries.rows import collate, position_mask, read_rows, without_labels


def model(encoder_decoder: bool = False, **config) -> nn.Module:
    module = nn.Linear(2, 2)
    names = {"pad_token_id": 9, "is_encoder_decoder": encoder_decoder, "decoder_start_token_id": 0}
    module.config = types.SimpleNamespace(**(names | config))
    return module


def padded(side: str) -> dict[str, torch.Tensor]:
    rows = [[1, 2, 3], [4, 5], [6]]
    pads = [[9] * (4 - len(r)) for r in rows]
    ids = [r + p if side == "right" else p + r for r, p in zip(rows, pads, strict=True)]
    ids = torch.tensor(ids)
    return {"input_ids": ids, "attention_mask": (ids != 9).long(), "labels": torch.where(ids == 9, -100, ids)}


@pytest.mark.parametrize("side", ["left", "right"])
def test_rows_lose_their_padding_and_get_only_as_much_as_a_batch_needs(side) -> None:
    rows = read_rows([padded(side)], None, model())
    assert [row["input_ids"].tolist() for row in rows] == [[[1, 2, 3]], [[4, 5]], [[6]]]
    batch = collate(rows[1:], model())
    assert batch["input_ids"].tolist() == [[4, 5], [6, 9]]
    assert batch["attention_mask"].tolist() == [[1, 1], [1, 0]]
    assert batch["labels"].tolist() == [[4, 5], [6, -100]]
    assert len(read_rows([padded(side)] * 2, 4, model())) == 4


def test_rows_of_nothing_but_padding_are_left_out_and_refused_where_there_is_nothing_else() -> None:
    empty = {key: torch.zeros_like(value) for key, value in padded("right").items()}
    rows = read_rows([empty, padded("right")], None, model())
    assert [row["input_ids"].tolist() for row in rows] == [[[1, 2, 3]], [[4, 5]], [[6]]]
    with pytest.raises(LoraInitError, match="nothing but padding"):
        read_rows([empty], None, model())


def test_an_encoder_decoders_two_sides_are_cut_apart() -> None:
    ids, labels = torch.tensor([[1, 2, 9]]), torch.tensor([[5, 6, 7]])
    (row,) = read_rows([{"input_ids": ids, "attention_mask": (ids != 9).long(), "labels": labels}], None, model(True))
    assert (row["input_ids"].tolist(), row["labels"].tolist()) == ([[1, 2]], [[5, 6, 7]])
    labels = torch.tensor([[5, -100, -100]])
    (row,) = read_rows([{"input_ids": ids, "labels": labels}], None, model(True))
    assert (row["input_ids"].tolist(), row["labels"].tolist()) == ([[1, 2, 9]], [[5]])


def test_rows_without_a_mask_get_one_where_their_lengths_differ() -> None:
    rows = [{"input_ids": torch.tensor([[1, 2]])}, {"input_ids": torch.tensor([[3]])}]
    batch = collate(rows, model())
    assert batch["attention_mask"].tolist() == [[1, 1], [1, 0]]
    assert "attention_mask" not in collate(rows[:1] * 2, model())


def test_batches_that_are_no_mappings_are_rows_too() -> None:
    pair = (torch.arange(6.0).reshape(3, 2), torch.arange(3))
    rows = read_rows([pair], None, model())
    joined = collate(rows, model())
    assert all(torch.equal(a, b) for a, b in zip(joined, pair, strict=True))
    assert torch.equal(collate(read_rows([pair[0]], None, model()), model()), pair[0])
    with pytest.raises(LoraInitError, match="different shapes"):
        collate([torch.ones(1, 2), torch.ones(1, 3)], model())


def test_rows_that_do_not_fit_together_are_refused() -> None:
    with pytest.raises(LoraInitError, match="different keys"):
        collate([{"a": torch.ones(1, 2)}, {"b": torch.ones(1, 2)}], model())
    with pytest.raises(LoraInitError, match="'pixel_values', which cannot be padded"):
        collate([{"pixel_values": torch.ones(1, 3, n, n)} for n in (4, 5)], model())
    with pytest.raises(LoraInitError, match="empty"):
        read_rows([], None, model())


def test_what_the_model_is_fed_holds_no_labels_unless_a_decoder_is_to_read_them() -> None:
    batch = {"input_ids": torch.ones(2, 3, dtype=torch.long), "labels": torch.ones(2, 2, dtype=torch.long)}
    assert without_labels(batch, model(), "start_token").keys() == {"input_ids"}
    fed = without_labels(batch, model(True), "start_token")
    assert fed["decoder_input_ids"].tolist() == [[0], [0]]
    assert "labels" not in fed
    assert without_labels(batch, model(True), "labels") is batch
    with pytest.raises(LoraInitError, match="has none"):
        without_labels({"input_ids": batch["input_ids"]}, model(True), "labels")
    with pytest.raises(LoraInitError, match="decoder_start_token_id"):
        without_labels(batch, model(True, decoder_start_token_id=None), "start_token")


def test_positions_are_matched_with_the_mask_of_their_side() -> None:
    batch = padded("right") | {"decoder_attention_mask": torch.tensor([[1, 0], [1, 1], [1, 1]])}
    mask = batch["attention_mask"] != 0
    assert torch.equal(position_mask("x", torch.ones(3, 4, 5), batch, model(), False), mask)
    assert torch.equal(position_mask("x", torch.ones(12, 5), batch, model(), False), mask.flatten())
    assert position_mask("x", torch.ones(3, 5), batch, model(), False) is None  # one vector a row
    decoder = position_mask("x", torch.ones(3, 2, 5), batch, model(True), True)
    assert torch.equal(decoder, batch["decoder_attention_mask"] != 0)
    with pytest.raises(LoraInitError, match="'x'.*does not fit the attention mask"):
        position_mask("x", torch.ones(3, 7, 5), batch, model(), False)
    assert position_mask("x", torch.ones(3, 7, 5), cases.VIT.batch(), model(), False) is None


def test_the_choices_of_a_multiple_choice_row_are_rows_of_their_own() -> None:
    mask = torch.tensor([[[1, 1, 0], [1, 0, 0]]])
    found = position_mask("x", torch.ones(2, 3, 5), {"attention_mask": mask}, model(), False)
    assert torch.equal(found, mask[0] != 0)
    square = {"attention_mask": torch.tril(torch.ones(2, 3, 3))}  # queries × keys: says nothing of positions
    assert position_mask("x", torch.ones(2, 3, 5), square, model(), False) is None
