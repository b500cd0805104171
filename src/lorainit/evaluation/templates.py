"""How a conversation becomes the text that a model continues."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import LoraInitError
from ..tasks.instruct import ALPACA

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# as the tasks alpaca and wizardlm train it; further turns follow the end of a reply
_PREAMBLE, _, _TURN = ALPACA.partition("### ")
_JINJA = (
    "{{ bos_token or '' }}" + _PREAMBLE + "{% for message in messages %}"
    "{% if message['role'] == 'user' %}"
    "{{ '' if loop.first else '\n\n' }}### "
    + _TURN.replace("{instruction}", "{{ message['content'] }}")
    + "{% elif message['role'] == 'assistant' %}"
    " {{ message['content'].strip() }}{{ eos_token }}{% endif %}{% endfor %}"
)


def find_template(name: str, tokenizer: PreTrainedTokenizerBase) -> str:
    """Return a chat template in Jinja: ``auto`` (the tokenizer's own), ``alpaca``, or the content of a file.

    Raises:
        LoraInitError: the tokenizer has none, or there is no such file.
    """
    if name == "alpaca":
        return _JINJA
    if name == "auto":
        own: Any = tokenizer.chat_template
        if not isinstance(own, str):
            raise LoraInitError("the tokenizer has no chat template: name one, 'alpaca' or a file in Jinja")
        return own
    if not Path(name).is_file():
        raise LoraInitError(f"template '{name}' is neither 'auto' nor 'alpaca' nor a file")
    return Path(name).read_text(encoding="utf-8")


def render(messages: list[dict[str, str]], template: str, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Return a conversation's tokens, up to where the reply begins.

    Raises:
        LoraInitError: the template fails on this conversation.
    """
    from jinja2 import TemplateError

    try:
        text: Any = tokenizer.apply_chat_template(
            messages, chat_template=template, add_generation_prompt=True, tokenize=False
        )
    except TemplateError as error:
        raise LoraInitError(f"the chat template fails: {error}") from error
    return tokenizer(text, add_special_tokens=False).input_ids
