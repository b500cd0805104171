from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from benchmarks import save_adapter, save_tiny_llama
from lorainit.errors import LoraInitError
from lorainit.evaluation.generation import Generation, Prompt, Writer
from lorainit.evaluation.records import Records

CONTEXT = 256


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    folder = tmp_path_factory.mktemp("writer")
    base = save_tiny_llama(folder / "base", CONTEXT)
    return str(base), str(save_adapter(base, folder / "adapter"))


def prompts(texts, temperature=0.0):
    return [Prompt(str(i), [0, *(2 + ord(c) % 200 for c in text)], temperature) for i, text in enumerate(texts)]


TEXTS = ["a", "a longer one", "", "another quite long prompt", "b"]


def plain(folders, prompt, length, adapter):
    """Return the tokens that Transformers and PEFT alone write for one prompt."""
    model = AutoModelForCausalLM.from_pretrained(folders[0])
    model = PeftModel.from_pretrained(model, folders[1]) if adapter else model
    ids = torch.tensor([prompt.tokens])
    return model.eval().generate(input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=length)[
        0, ids.shape[1] :
    ]


@pytest.mark.parametrize("adapter", [False, True], ids=["base", "adapter"])
@pytest.mark.parametrize("batch_size", [1, 2, 8])
def test_a_batch_writes_what_each_prompt_gives_alone(folders, tmp_path, adapter, batch_size):
    options = Generation(max_new_tokens=12, batch_size=batch_size)
    writer = Writer(folders[0], folders[1] if adapter else None, options)
    found = writer.write(prompts(TEXTS), Records(tmp_path / "r.jsonl"))
    assert [line["id"] for line in found] == ["0", "1", "2", "3", "4"]
    for line, prompt in zip(found, prompts(TEXTS), strict=True):
        tokens = plain(folders, prompt, 12, adapter).tolist()
        finished = 1 in tokens
        expected = writer.tokenizer.decode(tokens[: tokens.index(1)] if finished else tokens, skip_special_tokens=True)
        assert line["reply"] == expected.strip()
        assert line["finish"] == ("stop" if finished else "length")


def test_the_adapter_changes_what_is_written(folders, tmp_path):
    replies = [
        [
            r["reply"]
            for r in Writer(folders[0], a, Generation(max_new_tokens=12)).write(prompts(TEXTS), Records(tmp_path / n))
        ]
        for a, n in ((None, "base"), (folders[1], "adapter"))
    ]
    assert replies[0] != replies[1]


@pytest.mark.parametrize("lost", [1, 3, 5])
def test_a_run_cut_short_ends_with_the_same_samples(folders, tmp_path, lost):
    """Lines lost at the end: what is there is kept, what is missing comes out as it would have."""
    writer = Writer(folders[0], None, Generation(max_new_tokens=10, batch_size=2))
    path = tmp_path / "r.jsonl"
    state = torch.random.get_rng_state()
    whole = writer.write(prompts(TEXTS, 1.0), Records(path))
    assert torch.equal(state, torch.random.get_rng_state())
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join(lines[:-lost]))
    assert writer.write(prompts(TEXTS, 1.0), Records(path)) == whole
    assert path.read_text().startswith("".join(lines[:-lost]))
    before = path.read_text()
    assert writer.write(prompts(TEXTS, 1.0), Records(path)) == whole
    assert path.read_text() == before


def test_seeds_and_temperatures_matter(folders, tmp_path):
    def replies(seed, temperature):
        writer = Writer(folders[0], None, Generation(max_new_tokens=20, seed=seed))
        return [
            r["reply"] for r in writer.write(prompts(TEXTS, temperature), Records(tmp_path / f"{seed}-{temperature}"))
        ]

    assert replies(0, 1.0) != replies(1, 1.0)
    assert replies(0, 1.0) != replies(0, 0.0)
    assert replies(0, 0.0) == replies(1, 0.0)


def test_an_adapter_trained_anew_in_the_same_folder_writes_anew(folders, tmp_path):
    adapter = save_adapter(Path(folders[0]), tmp_path / "adapter", seed=1)
    first = Writer(folders[0], str(adapter), Generation(max_new_tokens=8)).write(
        prompts(TEXTS), Records(tmp_path / "r")
    )
    save_adapter(Path(folders[0]), tmp_path / "adapter", seed=2)
    again = Writer(folders[0], str(adapter), Generation(max_new_tokens=8)).write(
        prompts(TEXTS), Records(tmp_path / "r")
    )
    config = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(json.dumps(config | {"lora_alpha": 99}))
    scaled = Writer(folders[0], str(adapter), Generation(max_new_tokens=8)).write(
        prompts(TEXTS), Records(tmp_path / "r")
    )
    assert len({line["fingerprint"] for lines in (first, again, scaled) for line in lines}) == 3 * len(TEXTS)


def test_the_context_bounds_each_reply_by_its_own_prompt(folders, tmp_path):
    long = [Prompt("full", [5] * CONTEXT, 0.0), Prompt("three", [5] * (CONTEXT - 3), 0.0), Prompt("short", [5, 6], 0.0)]
    writer = Writer(folders[0], None, Generation(max_new_tokens=9, batch_size=3))
    full, three, short = writer.write(long, Records(tmp_path / "r"))
    assert (full["reply"], full["finish"]) == ("", "no room")
    assert three["tokens"] <= 3
    assert short["tokens"] <= 9
    alone = writer.write([Prompt("x", [5, 6], 0.0)], Records(tmp_path / "alone"))[0]
    assert alone["reply"] == short["reply"]
    assert writer.write(long[:1], Records(tmp_path / "one"))[0]["finish"] == "no room"


def test_a_text_that_stops_is_no_part_of_the_reply(folders, tmp_path):
    free = Writer(folders[0], None, Generation(max_new_tokens=12)).write(prompts(["a"]), Records(tmp_path / "r"))[0][
        "reply"
    ]
    stop = free[4]
    found = Writer(folders[0], None, Generation(max_new_tokens=12, stop=(stop,))).write(
        prompts(["a"]), Records(tmp_path / "s")
    )[0]
    assert found["reply"] == free[: free.index(stop)].strip()
    assert found["finish"] == "stop"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_new_tokens": 0}, "max_new_tokens and batch_size must be ≥ 1"),
        ({"batch_size": 0}, "batch_size must be ≥ 1"),
        ({"temperature": -1.0}, "temperature ≥ 0"),
    ],
)
def test_wrong_options(options, message):
    with pytest.raises(LoraInitError, match=message):
        Generation(**options)


def test_a_folder_that_is_no_adapter_is_an_error(folders, tmp_path):
    with pytest.raises(LoraInitError, match="adapter_config"):
        Writer(folders[0], str(tmp_path), Generation())


def test_files_hold_what_was_written(folders, tmp_path):
    Writer(folders[0], None, Generation(max_new_tokens=4)).write(prompts(["a"]), Records(tmp_path / "r.jsonl"))
    assert set(json.loads((tmp_path / "r.jsonl").read_text())) == {"id", "reply", "tokens", "finish", "fingerprint"}
