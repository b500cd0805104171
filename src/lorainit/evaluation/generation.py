"""Replies of a base model with an adapter, in batches, each kept in a file as soon as it is there."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel

from ..errors import LoraInitError
from ..machine import provenance
from ..saving import checkpoint
from ..tasks import get_task
from ..train.model import load_base, resolve_model
from .records import Records, fingerprint


@dataclasses.dataclass(frozen=True)
class Generation:
    """How replies are generated.

    Attributes:
        template: makes a conversation text: ``auto`` (the tokenizer's chat template), ``alpaca``, or a Jinja file.
        max_new_tokens: tokens a reply holds at most; less where the model's context ends before.
        temperature: 0 takes the likeliest token; MT-Bench has its own temperature for each category instead.
        stop: texts that end a reply, besides the model's own end tokens.
        batch_size: prompts at a time.
        dtype: of the base weights.
        seed: of the sampling.
    """

    template: str = "auto"
    max_new_tokens: int = 1024
    temperature: float = 0.0
    stop: tuple[str, ...] = ()
    batch_size: int = 8
    dtype: str = "float32"
    seed: int = 0

    def __post_init__(self) -> None:
        if self.max_new_tokens < 1 or self.batch_size < 1 or self.temperature < 0:
            raise LoraInitError(
                "generation: max_new_tokens and batch_size must be ≥ 1 and temperature ≥ 0, got "
                f"{self.max_new_tokens}, {self.batch_size} and {self.temperature}"
            )


@dataclasses.dataclass(frozen=True)
class Prompt:
    """What to continue.

    Attributes:
        id: names the reply.
        tokens: the whole prompt.
        temperature: of this reply.
    """

    id: str
    tokens: list[int]
    temperature: float


class Writer:
    """A model that writes replies.

    Args:
        model: hub name, local folder or ``package:NAME/FOLDER`` of the base.
        adapter: adapter folder; it is loaded by PEFT alone.
        options: how replies are generated.

    Raises:
        LoraInitError: nothing loadable at these names.
    """

    def __init__(self, model: str, adapter: str | None, options: Generation) -> None:
        network, self.tokenizer, _ = load_base(model, get_task("text"), options.dtype)
        self._ends = _ends(network.generation_config, self.tokenizer)
        # the content, not the name: an adapter trained anew in the same folder writes anew
        self._identity: list[Any] = [model, provenance.hash_weights(resolve_model(model))]
        if adapter is not None:
            checkpoint.read_adapter(adapter)  # one clear line for a folder that is no adapter
            config = Path(adapter) / "adapter_config.json"
            self._identity += [provenance.hash_weights(adapter), config.read_text() if config.is_file() else adapter]
            network = PeftModel.from_pretrained(network, adapter)
        self._network: Any = network.eval()
        self._network.to("cuda" if torch.cuda.is_available() else "cpu")
        self._options = options

    def write(self, prompts: Sequence[Prompt], records: Records) -> list[dict[str, Any]]:
        """Return a line for each prompt; those that the file has are not generated again.

        A line's ``finish`` is ``stop``, ``length`` (cut) or ``no room`` (the prompt fills the context: an empty reply).
        Sampling is seeded batch by batch and batches do not depend on what the file has: a run that was interrupted
        ends with the same replies as one that was not.
        """
        from rich.console import Console
        from rich.progress import track

        console = Console(stderr=True)
        quiet = not console.is_terminal  # a log has no use for a bar
        options = self._options
        keys = {p.id: fingerprint(self._identity, p.tokens, p.temperature, _texts(options), p.id) for p in prompts}
        order = sorted(prompts, key=lambda p: (p.temperature, len(p.tokens)))  # little padding
        batches = []
        for temperature in sorted({p.temperature for p in order}):
            alike = [p for p in order if p.temperature == temperature]
            batches += [alike[i : i + options.batch_size] for i in range(0, len(alike), options.batch_size)]
        missing = [batch for batch in batches if any(keys[p.id] not in records for p in batch)]
        for batch in track(missing, "writing", console=console, transient=True, disable=quiet):
            replies = self._batch(batch)
            records.append(*({"id": p.id, **r, "fingerprint": keys[p.id]} for p, r in zip(batch, replies, strict=True)))
        return [records[keys[prompt.id]] for prompt in prompts]

    def _batch(self, batch: list[Prompt]) -> list[dict[str, Any]]:
        """Continue prompts of one temperature, padded on the left."""
        context = getattr(self._network.config, "max_position_embeddings", None)
        wanted = self._options.max_new_tokens
        room = [wanted if context is None else min(wanted, context - len(p.tokens)) for p in batch]
        if max(room) < 1:
            return [_reply("", 0, "no room") for _ in batch]
        longest = max(len(p.tokens) for p in batch)
        padding = self._ends[0] if self.tokenizer.pad_token_id is None else self.tokenizer.pad_token_id
        ids = torch.tensor([[padding] * (longest - len(p.tokens)) + p.tokens for p in batch])
        mask = torch.tensor([[0] * (longest - len(p.tokens)) + [1] * len(p.tokens) for p in batch])
        written = self._continue(ids, mask, max(room), batch, padding)
        return [self._cut(tokens.tolist(), limit) for tokens, limit in zip(written, room, strict=True)]

    @torch.inference_mode()
    def _continue(self, ids: Any, mask: Any, length: int, batch: list[Prompt], padding: Any) -> torch.Tensor:
        device = self._network.device
        sampled = batch[0].temperature > 0
        # the model's own sampling defaults (Llama-2-chat: top_p 0.9) are switched off: the temperature alone counts
        how = {"temperature": batch[0].temperature, "top_p": 1.0, "top_k": 0} if sampled else {}
        stop = {"stop_strings": list(self._options.stop), "tokenizer": self.tokenizer} if self._options.stop else {}
        digest = hashlib.sha256(f"{self._options.seed} {[p.id for p in batch]}".encode()).digest()
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
            torch.manual_seed(int.from_bytes(digest[:4], "big"))
            written = self._network.generate(
                input_ids=ids.to(device),
                attention_mask=mask.to(device),
                max_new_tokens=length,
                do_sample=sampled,
                eos_token_id=self._ends,
                pad_token_id=padding,
                **how,
                **stop,
            )
        return written[:, ids.shape[1] :].cpu()

    def _cut(self, tokens: list[int], limit: int) -> dict[str, Any]:
        """Return the reply up to its end token, its end text or its limit."""
        if limit < 1:
            return _reply("", 0, "no room")
        ends = [i for i, token in enumerate(tokens) if token in self._ends]
        finish = "stop" if ends and ends[0] < limit else "length"
        tokens = tokens[: min(limit, *ends[:1], len(tokens))]
        text: Any = self.tokenizer.decode(tokens, skip_special_tokens=True)
        cuts = [at for at in map(text.find, self._options.stop) if at >= 0]
        if cuts:
            text, finish = text[: min(cuts)], "stop"
        return _reply(text.strip(), len(tokens), finish)


def _reply(text: str, tokens: int, finish: str) -> dict[str, Any]:
    return {"reply": text, "tokens": tokens, "finish": finish}


def _texts(options: Generation) -> list[Any]:
    return [options.max_new_tokens, list(options.stop), options.dtype, options.seed]


def _ends(config: Any, tokenizer: Any) -> list[int]:
    """Return the end tokens of the generation config and of the tokenizer.

    Raises:
        LoraInitError: there is none.
    """
    own = getattr(config, "eos_token_id", None)
    found = {*(own if isinstance(own, list) else [own]), tokenizer.eos_token_id} - {None}
    if not found:
        raise LoraInitError("the model has no end token: neither its generation config nor its tokenizer names one")
    return sorted(found)
