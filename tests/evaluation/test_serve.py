"""Judging by a real model on a real server: `transformers serve` with the small LLaMA."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.request

import pytest
from transformers import AutoTokenizer

from benchmarks import save_annotator, save_lines, save_mt_bench
from lorainit.cli import main

needed = [name for name in ("fastapi", "uvicorn") if importlib.util.find_spec(name) is None]
pytestmark = [pytest.mark.slow, pytest.mark.skipif(bool(needed), reason=f"transformers serve needs {needed}")]


@pytest.fixture(scope="module")
def judge(shared, tmp_path_factory):
    """Serve the small LLaMA, with a chat template, and return (its name, the address)."""
    folder = tmp_path_factory.mktemp("serve") / "llama"
    shutil.copytree(shared / "models/llama-tinystories-260k", folder)
    for path in (folder, *folder.iterdir()):
        path.chmod(0o755)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.chat_template = "{{ bos_token }}{% for m in messages %}{{ m['content'] }}\n{% endfor %}"
    tokenizer.save_pretrained(folder)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "transformers.cli.transformers", "serve", "--host", "127.0.0.1"]
    options = ["--port", str(port), "--device", "cpu"]
    # offline: it would look for unknown models on the hub until the request times out
    environment = os.environ | {"HF_HUB_OFFLINE": "1"}
    with (folder / "log").open("w") as log:
        process = subprocess.Popen([*command, *options], stdout=log, stderr=log, env=environment)
    try:
        for _ in range(240):
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=1)
                break
            except OSError:
                assert process.poll() is None, (folder / "log").read_text()
                time.sleep(0.5)
        yield str(folder), f"http://127.0.0.1:{port}/v1"
    finally:
        process.terminate()
        process.wait(30)


def command(benchmark, shared, judge, output, *options):
    name, url = judge
    writer = ["--model", str(shared / "models/llama-tinystories-260k"), "--generation.template", "alpaca"]
    asked = ["--judge.model", name, "--judge.base_url", url, "--judge.input_price", "1", "--judge.output_price", "2"]
    return [
        "evaluate",
        benchmark,
        *writer,
        "--generation.max_new_tokens",
        "20",
        *asked,
        "--output",
        str(output),
        *options,
    ]


def test_a_judge_of_stories_gives_no_verdict_and_the_report_says_so(shared, judge, tmp_path, capsys):
    """Two questions of MT-Bench, answered and judged by a model that knows nothing but stories."""
    data = save_mt_bench(tmp_path / "data")
    save_lines(
        data / "question.jsonl", [{"question_id": i, "category": "stem", "turns": ["Hi", "Why?"]} for i in (1, 2)]
    )
    run = command("mt-bench", shared, judge, tmp_path / "out", "--data", str(data), "--turns", "1")
    assert main(run) == 0
    printed = capsys.readouterr().out
    assert "first turn  no score: none of 2 verdicts could be read" in printed
    assert "warning: 2 replies of the judge could not be read\n  2 × no rating in the reply" in printed
    result = json.loads((tmp_path / "out/result.json").read_text())
    assert result["usage"]["prompt_tokens"] > 20
    assert result["usage"]["completion_tokens"] > 20
    tokens = result["usage"]["prompt_tokens"] + 2 * result["usage"]["completion_tokens"]
    assert result["usage"]["cost"] == pytest.approx(tokens / 1e6)
    verdicts = (tmp_path / "out/verdicts.jsonl").read_text()
    assert main(run) == 0
    assert (tmp_path / "out/verdicts.jsonl").read_text() == verdicts


def test_a_server_without_log_probabilities_gives_no_verdict(shared, judge, tmp_path, capsys):
    data = tmp_path / "data"
    save_annotator(
        data,
        "mine",
        fn_completion_parser="logprob_parser",
        completions_kwargs={"max_tokens": 3},
        completion_parser_kwargs={"numerator_token": "m", "denominator_tokens": ["m", "M"], "is_binarize": False},
    )
    (data / "reference.json").write_text(json.dumps([{"instruction": "Tell a story.", "output": "No."}]))
    options = ["--data", str(data), "--reference", "reference.json", "--annotators", str(data), "--annotator", "mine"]
    assert main(command("alpaca-eval", shared, judge, tmp_path / "out", *options, "--length_control", "null")) == 0
    assert "1 × the reply has no log-probabilities" in capsys.readouterr().out


def test_a_model_that_the_server_does_not_know_is_one_line(shared, judge, tmp_path, capsys):
    data = save_mt_bench(tmp_path / "data")
    options = ["--data", str(data), "--turns", "1", "--questions", "1", "--judge.retries", "0"]
    run = command("mt-bench", shared, ("no/such-judge", judge[1]), tmp_path / "out", *options)
    assert main(run) == 1
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith(f"lorainit: error: {judge[1]} refuses")
    assert "run the same command again for the rest" in error
