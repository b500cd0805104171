from __future__ import annotations

import pytest
from transformers import AutoTokenizer

from benchmarks import save_tiny_llama
from lorainit.errors import LoraInitError
from lorainit.evaluation.templates import find_template, render
from lorainit.tasks import get_task


def test_the_alpaca_template_is_what_the_tasks_train(shared):
    """Token for token, on the real LLaMA's tokenizer, which puts its begin token in front by itself."""
    tokenizer = AutoTokenizer.from_pretrained(shared / "models/llama-tinystories-260k")
    row = {"instruction": "Say {{ hi }} {x}.", "output": "hi"}
    template = find_template("alpaca", tokenizer)
    trained = tokenizer(get_task("wizardlm").ask(row)).input_ids
    asked = [{"role": "user", "content": row["instruction"]}]
    assert render(asked, template, tokenizer) == trained
    two = [*asked, {"role": "assistant", "content": "hi "}, {"role": "user", "content": "More?"}]
    text = tokenizer.decode(render(two, template, tokenizer)).replace(
        "</s> ", "</s>"
    )  # how it decodes, not what it reads
    assert text.endswith("### Response: hi</s>\n\n### Instruction:\nMore?\n\n### Response:")


def test_templates_by_file_and_their_absence(tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(save_tiny_llama(tmp_path / "base"))
    with pytest.raises(LoraInitError, match="has no chat template: name one"):
        find_template("auto", tokenizer)
    with pytest.raises(LoraInitError, match="neither 'auto' nor 'alpaca' nor a file"):
        find_template("vicuna", tokenizer)
    file = tmp_path / "t.jinja"
    file.write_text("{% for m in messages %}<{{ m['content'] }}>{% endfor %}")
    messages = [{"role": "user", "content": "é½"}]
    assert tokenizer.decode(render(messages, find_template(str(file), tokenizer), tokenizer)) == "<é½>"
    tokenizer.chat_template = "own"
    assert find_template("auto", tokenizer) == "own"
    with pytest.raises(LoraInitError, match="the chat template fails"):
        render(messages, "{{ raise_exception('no') }}", tokenizer)
