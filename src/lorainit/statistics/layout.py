"""Finds which of a layer's positions belong to which row of a batch, and whether the batch's tokens reach the layer.

A mask says of each token of each row whether it counts. A layer's positions are its tokens in one order or the other
(rows × tokens, as in most models; tokens × rows in XLNet, Longformer or `torch.nn.Transformer`), or something else
altogether: patches of an image beside the text, frames of a sound, latent vectors. The shapes do not tell, where counts
coincide, so the model is asked: it runs once on some rows and once more with the tokens of one of them replaced by
others. Rows never mix in a forward pass, so the positions that change are those of that row; a layer at which nothing
changes is not reached by the tokens, and their mask says nothing about it.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ..adapter.sites import LoraSite
from .batches import count_rows, forward, named_fields, split_rows
from .row_cuts import RowCutter, like

# "unreached": the batch's tokens have no part in the layer's input, so all of its positions count;
# "other": the positions are not the tokens of the rows, in either order
Layout = Literal["rows first", "tokens first", "unreached", "other"]

_TOKENS = ("input_ids", "decoder_input_ids", "labels")  # labels: a decoder reads them, shifted
_FEATURES = ("inputs_embeds", "decoder_inputs_embeds", "encoder_hidden_states")
_SIGNALS = ("input_features", "input_values")  # the tokens of speech, where there are no others
_REACHED = 1e-4  # a smaller relative change is rounding: kernels may group their work differently
_OWN_SHARE = 0.99  # of all change, what lies on the row's own positions


def find_layouts(
    model: nn.Module, sites: Sequence[LoraSite], batch: Any, tokens: Mapping[str, int]
) -> dict[str, Layout]:
    """Run the model on a few rows of a batch, and once more with one row's tokens replaced; compare what layers get.

    Args:
        model: the model, in the state in which the data are run.
        sites: the layers to watch; experts of a stack are left out.
        batch: as the model takes it; with tokens to replace.
        tokens: how many tokens a row's mask names, by layer; layers that no mask is about may be missing.

    Returns:
        The layout of each layer that ran; of none if the batch names no tokens that could be replaced.
    """
    rows, row = _some_rows(model, batch)
    count = count_rows(rows)
    changed = _other_tokens(model, rows, row)
    if changed is None:
        return {}
    before, after = _inputs(model, sites, rows), _inputs(model, sites, changed)
    found: dict[str, Layout] = {}
    for name in before.keys() & after.keys():
        changes = [_change(a, b) for a, b in zip(before[name], after[name], strict=False)]
        found[name] = _layout(changes, count, row, tokens.get(name))
    return found


def _some_rows(model: nn.Module, batch: Any) -> tuple[Any, int]:
    """Return two rows of a batch, one of them its fullest, and which that is.

    A batch that cannot be cut into rows comes back whole.
    """
    lengths = _lengths(batch)
    fullest = int(lengths.argmax()) if lengths is not None else 0
    if RowCutter(batch, count_rows(batch), model).uncut() is not None:
        return batch, fullest
    pairs = split_rows(batch, 2, model)
    pair, row = pairs[fullest // 2], fullest % 2
    if count_rows(pair) == 1 and len(pairs) > 1:  # the last of an odd number: the pair before it will do
        lengths = _lengths(pairs[-2])
        return pairs[-2], int(lengths.argmax()) if lengths is not None else 0
    return pair, row


def _lengths(batch: Any) -> Tensor | None:
    """Return how many tokens of each row count."""
    mask = named_fields(batch).get("attention_mask")
    return mask.bool().flatten(1).sum(1) if isinstance(mask, Tensor) and mask.dim() > 1 else None


def _other_tokens(model: nn.Module, batch: Any, row: int) -> Any | None:
    """Return the batch with the tokens of one row replaced; None if there are none.

    Special ones (places of images, ends of sentences) stay, so that the model reads the row as it did.
    """
    fields, count, special = named_fields(batch), count_rows(batch), _special_tokens(model)
    names = [name for name in (*_TOKENS, *_FEATURES) if isinstance(fields.get(name), Tensor)] or _SIGNALS

    def replace(value: Any, name: str) -> Any:
        if isinstance(value, Mapping):
            return {k: replace(v, str(k)) for k, v in value.items()}
        if hasattr(value, "_asdict"):
            return like(value, (replace(v, k) for k, v in value._asdict().items()))
        if isinstance(value, (tuple, list)):
            return like(value, (replace(v, "") for v in value))
        if name not in names or not isinstance(value, Tensor) or value.shape[:1] != (count,):
            return value
        other = value.clone()
        other[row] = _other(value[row], special)
        replaced.append(not torch.equal(value, other))
        return other

    replaced: list[bool] = []
    changed = replace(batch, "")
    return changed if any(replaced) else None


def _other(values: Tensor, special: Tensor) -> Tensor:
    """Return other tokens, or features of another sign."""
    if values.is_floating_point():
        return -values
    changed = torch.where(values > 0, values - 1, values + 1)
    stays = (
        torch.isin(values, special.to(values.device)) | torch.isin(changed, special.to(values.device)) | (values < 0)
    )
    return torch.where(stays, values, changed)


def _special_tokens(model: nn.Module) -> Tensor:
    """Return the ids that a model's configs give a meaning: padding, ends, places of images."""
    config: Any = getattr(model, "config", None)
    known: dict[str, Any] = config.to_dict() if hasattr(config, "to_dict") else {}
    ids: set[int] = set()
    pending: list[Mapping[str, Any]] = [known]
    while pending:
        for name, value in pending.pop().items():
            if isinstance(value, Mapping):
                pending.append(value)
            elif str(name).endswith(("_token_id", "_token_index", "_token_ids")):
                ids |= {v for v in (value if isinstance(value, (list, tuple)) else [value]) if isinstance(v, int)}
    return torch.tensor(sorted(ids), dtype=torch.long)


def _inputs(model: nn.Module, sites: Sequence[LoraSite], batch: Any) -> dict[str, list[Tensor]]:
    """Return, for each call of each layer, the sums over its input's features, one a position (2 × positions)."""
    found: dict[str, list[Tensor]] = {}

    def note(name: str) -> Any:
        def hook(module: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
            x = inputs[0].detach().float()
            x = x.reshape(-1, x.shape[-1])
            found.setdefault(name, []).append(torch.stack((x.sum(-1), x.abs().sum(-1))))

        return hook

    with _hooked({site.base_layer: note(site.name) for site in sites}), torch.no_grad():
        forward(model, batch)
    return found


@contextlib.contextmanager
def _hooked(hooks: Mapping[Any, Any]) -> Iterator[None]:
    """Attach forward hooks and remove them."""
    handles = [module.register_forward_hook(hook) for module, hook in hooks.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _change(before: Tensor, after: Tensor) -> Tensor | None:
    """Return how much each position has changed, relative to the largest value; None where their number has."""
    if before.shape != after.shape:
        return None
    scale = before.abs().amax().clamp_min(torch.finfo(before.dtype).tiny)
    return ((after - before).abs() / scale).amax(0)


def _layout(changes: Sequence[Tensor | None], count: int, row: int, tokens: int | None) -> Layout:
    """Return the order that explains what has changed at a layer in all of its calls."""
    found: set[Layout] = {_layout_of(change, count, row, tokens) for change in changes}
    return found.pop() if len(found) == 1 else "other"


def _layout_of(change: Tensor | None, count: int, row: int, tokens: int | None) -> Layout:
    if change is None or change.numel() % count:
        return "other"
    if float(change.max()) < _REACHED:
        return "unreached"
    if tokens is not None and change.numel() // count not in (1, tokens):
        return "other"
    if count == 1:  # both orders are the same
        return "rows first"
    total, by_row = change.sum(), change.reshape(count, -1)
    rows_first = bool(by_row[row].sum() >= _OWN_SHARE * total)
    tokens_first = bool(change.reshape(-1, count)[:, row].sum() >= _OWN_SHARE * total)
    if rows_first == tokens_first:  # one position a row is in both orders at once
        return "rows first" if rows_first and by_row.shape[1] == 1 else "other"
    return "rows first" if rows_first else "tokens first"
