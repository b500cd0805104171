"""The T5 tokenizer cut to the pieces that a text uses most.

A unigram tokenizer splits a word whose piece is gone into smaller pieces, so that nothing becomes unknown as long as
the single characters stay.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable
from typing import Any

from tokenizers import Tokenizer
from transformers import AutoTokenizer, PreTrainedTokenizerFast

SPECIAL = ("<pad>", "</s>", "<unk>")
SENTINELS = [f"<extra_id_{i}>" for i in reversed(range(100))]


def cut(folder: str, texts: Iterable[str], always: Iterable[str], size: int) -> PreTrainedTokenizerFast:
    """Return a tokenizer with ``size`` pieces.

    Args:
        folder: of the full tokenizer.
        texts: whose most frequent pieces are kept.
        always: texts all of whose pieces are kept: prompts and label words.
        size: pieces that are left, special ones and sentinels counted.
    """
    full: Any = AutoTokenizer.from_pretrained(folder)
    counts = Counter(i for ids in full(list(texts), add_special_tokens=False, verbose=False).input_ids for i in ids)
    model = json.loads(full.backend_tokenizer.to_str())
    pieces = [piece for piece, _ in model["model"]["vocab"]]
    scores = dict(model["model"]["vocab"])
    wanted = {full.convert_ids_to_tokens(i) for i in full(list(always), add_special_tokens=False).input_ids for i in i}
    wanted |= {piece for piece in pieces if piece == "▁" or (len(piece) == 1 and ord(piece) < 0x2100)}
    wanted -= {*SPECIAL, *SENTINELS}
    for i, _ in counts.most_common():
        if len(wanted) >= size - len(SPECIAL) - len(SENTINELS):
            break
        if pieces[i] not in SPECIAL:
            wanted.add(pieces[i])
    kept = [*SPECIAL, *(piece for piece in pieces if piece in wanted), *SENTINELS]
    model["model"]["vocab"] = [[piece, scores[piece]] for piece in kept]
    for token in model["added_tokens"]:
        token["id"] = kept.index(token["content"])
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(json.dumps(model)),
        pad_token="<pad>",
        eos_token="</s>",
        unk_token="<unk>",
        additional_special_tokens=SENTINELS,
        model_max_length=512,
    )
