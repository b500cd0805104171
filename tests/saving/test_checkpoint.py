"""Saving and loading: what is saved is one plain LoRA for the original base; what cannot be right is an error."""

from __future__ import annotations

import copy
import json
import os
import shutil
import subprocess
import sys
import warnings

import numpy as np
import peft
import pytest
import torch
import transformers
from peft import LoraConfig, PeftModel, get_peft_model
from peft.utils import get_peft_model_state_dict
from safetensors.torch import load_file, save_file
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import lorainit
from cases import (
    BERT,
    CONV,
    DTYPES,
    GPT2,
    LLAMA,
    TIED,
    TWIN,
    Experts,
    Net,
    Snapshot,
    Tokens,
    assert_same_tensors,
    each_case,
    each_dtype,
    each_method,
    logits,
    relative_difference,
    seeded,
    start,
    train,
)
from lorainit.adapter import offset
from lorainit.saving.checkpoint import PROVENANCE_NAME, read_adapter
from lorainit.saving.config import StartedLoraConfig
from lorainit.saving.folder import write_json

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"


def trained(case, method="loram", dtype=torch.float32, *, base="auto", **config):
    """A model of the case that was started and then moved away from its start."""
    model = case.adapted(dtype, **config)
    start(model, method, base=base, data=case.batches(dtype))
    train(model, case.batches(dtype))
    return model


def reloaded(case, path, dtype=torch.float32):
    """The folder on a fresh base, by PEFT alone."""
    return PeftModel.from_pretrained(case.base(dtype), path).eval()


def assert_plain(path, *, base_weights=False):
    """The folder is what any loader of LoRA understands; PEFT adds the base weight of an adapted output layer."""
    config = json.loads((path / CONFIG).read_text())
    assert config["peft_type"] == "LORA"
    assert config["init_lora_weights"] is True
    assert not {key for key in config if key.startswith("_")}
    assert set(config) <= {*LoraConfig().to_dict(), "peft_version"}
    keys = [key for key in load_file(path / WEIGHTS) if not (base_weights and ".base_layer." in key)]
    assert {key.rpartition(".lora_")[2] for key in keys} == {"A.weight", "B.weight"}


def read_json(path):
    return json.loads(path.read_text())


def edit_json(path, **fields):
    path.write_text(json.dumps(read_json(path) | fields))


def updates(model, adapter_name="default"):
    """Each layer's update of the original base, out×in in float64."""
    result = {}
    for site in lorainit.find_sites(model, adapter_name)[0]:
        A, B = offset.update_factors(site.lora_A, site.lora_B)
        result[site.name] = site.scaling * B.flatten(1).double() @ A.flatten(1).double()
    return result


def trained_state(model):
    """What training changes and what it is relative to: to be compared bit by bit."""
    names = ("lora_", "offset")
    every = [*model.named_parameters(), *model.named_buffers()]
    return {name: tensor.detach().clone() for name, tensor in every if any(part in name for part in names)}


@pytest.fixture(autouse=True)
def no_model_card(request, monkeypatch):
    """PEFT's model card takes longer than all the rest of a save here."""
    if "model_card" not in request.node.name:
        monkeypatch.setattr(PeftModel, "create_or_update_model_card", lambda self, path: None)


# --- one plain LoRA for the original base -------------------------------------------------------------------------


@each_dtype
@each_case
@each_method
def test_the_saved_adapter_gives_the_trained_model_s_outputs_by_peft_alone(method, case, dtype, tmp_path):
    model = trained(case, method, dtype)
    errors = lorainit.save_pretrained(model, tmp_path)
    assert set(errors.values()) == {0.0}
    assert_plain(tmp_path)
    again = reloaded(case, tmp_path, dtype)
    assert type(again.peft_config["default"]) is LoraConfig
    assert relative_difference(logits(again, case.batch(dtype)), logits(model, case.batch(dtype))) <= 1e-5
    assert relative_difference(logits(again, case.batch(dtype)), logits(case.base(dtype), case.batch(dtype))) > 0.01


VARIANTS = {
    "rslora": (LLAMA, {"use_rslora": True}),
    "patterns": (TWIN, {"rank_pattern": {"^layers.1.q": 2}, "alpha_pattern": {"encoder.layers.1.q": 3, "v": 8}}),
    "rslora patterns": (
        TWIN,
        {"use_rslora": True, "rank_pattern": {"^layers.1.q": 2, "v": 6}, "alpha_pattern": {"encoder.layers.1.q": 3}},
    ),
    "regex targets": (TWIN, {"target_modules": r"(encoder\.)?layers\.1\.[qv]", "rank_pattern": {"^layers.1.q": 2}}),
    "bias": (BERT, {"lora_bias": True}),
    "dora": (LLAMA, {"use_dora": True}),
    "dora conv1d": (GPT2, {"use_dora": True}),
    "dora conv": (CONV, {"use_dora": True}),
    "trained head": (BERT, {"modules_to_save": ["classifier"]}),
    "trained biases": (BERT, {"bias": "lora_only"}),
    "dropout": (LLAMA, {"lora_dropout": 0.3}),
    "all linear": (LLAMA, {"target_modules": "all-linear"}),
    "odd alpha": (LLAMA, {"lora_alpha": 7}),
    "head": (LLAMA, {"target_modules": ["q_proj", "lm_head"]}),
    "trainable tokens": (LLAMA, {"trainable_token_indices": [1, 8]}),
    "invocation tokens": (LLAMA, {"alora_invocation_tokens": [3]}),
}
each_variant = pytest.mark.parametrize("case, config", VARIANTS.values(), ids=VARIANTS)
each_base = pytest.mark.parametrize("base", ["offset", "keep", "subtract"])


@each_base
@each_variant
def test_every_option_of_lora_and_treatment_of_the_base_comes_back(case, config, base, tmp_path):
    if base == "subtract" and ("lm_head" in config.get("target_modules", ()) or "alora_invocation_tokens" in config):
        pytest.skip("refused, see test_initialize.py")
    model = trained(case, "loram", base=base, **config)
    lorainit.save_pretrained(model, tmp_path / "lorainit")
    model.save_pretrained(tmp_path / "peft")
    for folder in (tmp_path / "lorainit", tmp_path / "peft"):
        actual = logits(reloaded(case, folder), case.batch())
        # the edited base rounds once more than the original one
        assert relative_difference(actual, logits(model, case.batch())) <= 1e-5
        assert read_json(folder / CONFIG)["init_lora_weights"] is True


@pytest.mark.parametrize("case", [LLAMA, TIED, GPT2, CONV], ids=lambda case: case.name)
@each_method
def test_peft_s_own_save_is_right_too_at_any_time(method, case, tmp_path):
    model = case.adapted()
    start(model, method, data=case.batches())
    for name in ("before training", "after"):
        model.save_pretrained(tmp_path / name)
        again = reloaded(case, tmp_path / name)
        assert relative_difference(logits(again, case.batch()), logits(model, case.batch())) <= 1e-5
        train(model, case.batches())


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("method", ["pissa", "loram", "init-ab"])
def test_a_pretrained_llama_starts_as_a_no_op_and_comes_back(method, dtype, shared, tmp_path):
    def base():
        path = shared / "models" / "llama-tinystories-260k"
        return transformers.AutoModelForCausalLM.from_pretrained(path, dtype=DTYPES[dtype]).eval()

    tokens = torch.arange(3, 67).reshape(2, 32)
    batch = {"input_ids": tokens}
    config = LoraConfig(r=8, lora_alpha=16, target_modules="all-linear", lora_dropout=0.1)
    model = get_peft_model(base(), config).eval()
    expected = logits(base(), batch)
    start(model, method, base="offset")
    assert torch.equal(logits(model, batch), expected)
    train(model, [batch | {"labels": tokens}])
    lorainit.save_pretrained(model, tmp_path)
    outputs = logits(model, batch)
    again = PeftModel.from_pretrained(base(), tmp_path).eval()
    assert relative_difference(logits(again, batch), outputs) <= 1e-5
    assert relative_difference(outputs, expected) > 0.01
    with model.disable_adapter():
        assert torch.equal(logits(model, batch), expected)


def test_patterns_are_anchored_where_one_layer_s_name_is_the_end_of_another_s(tmp_path):
    model = trained(TWIN, rank_pattern={"^layers.1.q": 2})
    for path, factor in {"exact": 2, "truncated": None}.items():
        lorainit.save_pretrained(model, tmp_path / path, rank=None if factor else 3)
        ranks = {s.name: s.rank for s in lorainit.find_sites(reloaded(TWIN, tmp_path / path))[0]}
        small, large = (4, 8) if factor else (3, 3)
        assert ranks == {name: small if name == "layers.1.q" else large for name in ranks}


@pytest.mark.slow
def test_a_process_that_cannot_import_lorainit_loads_the_adapter(tmp_path):
    with seeded():
        base = nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 4))
        x = torch.randn(3, 8)
    fresh = copy.deepcopy(base)
    model = get_peft_model(base, LoraConfig(r=2, target_modules=["0", "2"]))
    start(model, "pissa")
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1)
        torch.save((fresh, x, model(x)), tmp_path / "expected.pt")
    lorainit.save_pretrained(model, tmp_path / "exact")
    model.save_pretrained(tmp_path / "peft")
    script = """
import sys
sys.modules["lorainit"] = None
import torch, peft
base, x, expected = torch.load("expected.pt", weights_only=False)
for folder in ("exact", "peft"):
    y = peft.PeftModel.from_pretrained(base, folder)(x)
    print(float((y - expected).abs().max() / expected.abs().max()))
"""
    env = os.environ | {"PYTHONWARNINGS": "ignore"}
    run = subprocess.run(
        [sys.executable, "-c", script], cwd=tmp_path, env=env, capture_output=True, text=True, check=True
    )
    assert all(float(line) <= 1e-5 for line in run.stdout.split())
    assert len(run.stdout.split()) == 2


def test_saving_does_not_change_the_model(tmp_path):
    model = trained(LLAMA)
    before = Snapshot.of(model)
    lorainit.save_pretrained(model, tmp_path / "exact")
    lorainit.save_pretrained(model, tmp_path / "truncated", rank=2)
    model.save_pretrained(tmp_path / "peft")
    before.assert_unchanged(model)
    assert model.peft_config["default"].r == 4
    assert model.peft_config["default"].inference_mode is False


def test_each_of_two_adapters_is_saved_on_its_own(tmp_path):
    model = LLAMA.adapted()
    model.add_adapter("other", LLAMA.lora_config(r=2, target_modules=["q_proj", "o_proj"]))
    expected = {}
    for name, method in {"default": "pissa", "other": "kaiming"}.items():
        start(model, method, adapter_name=name)
        model.set_adapter(name)
        train(model, LLAMA.batches())
        expected[name] = logits(model, LLAMA.batch())
    model.save_pretrained(tmp_path / "peft")  # PEFT puts the other adapter into a folder of its own
    for name, outputs in expected.items():
        lorainit.save_pretrained(model, tmp_path / name, adapter_name=name)
        for folder in (tmp_path / name, tmp_path / "peft" / ("" if name == "default" else name)):
            assert relative_difference(logits(reloaded(LLAMA, folder), LLAMA.batch()), outputs) <= 1e-5
            assert read_json(folder / PROVENANCE_NAME)["start"]["adapter_name"] == name


@pytest.mark.parametrize("method", ["pissa", "kaiming", "init-ab"])
@pytest.mark.parametrize("case", [LLAMA, TIED, GPT2, BERT], ids=lambda case: case.name)
def test_the_add_adapter_route_saves_and_loads_by_either_library(case, method, tmp_path):
    model = case.base()
    model.add_adapter(case.lora_config())
    start(model, method, data=case.batches())
    train(model, case.batches())
    expected = logits(model.eval(), case.batch())
    lorainit.save_pretrained(model, tmp_path / "lorainit")
    model.save_pretrained(tmp_path / "transformers")
    for folder in (tmp_path / "lorainit", tmp_path / "transformers"):
        assert_plain(folder, base_weights=folder.name == "transformers")
        assert relative_difference(logits(reloaded(case, folder), case.batch()), expected) <= 1e-5
        by_transformers = case.base()
        by_transformers.load_adapter(str(folder))
        assert relative_difference(logits(by_transformers.eval(), case.batch()), expected) <= 1e-5
    again = case.base()
    again.add_adapter(case.lora_config())
    lorainit.load(again, tmp_path / "transformers")
    assert_same_tensors(trained_state(again), trained_state(model))


def test_a_compiled_model_is_saved_like_the_model_itself(tmp_path):
    model = trained(LLAMA)
    compiled = torch.compile(model)  # nothing is compiled before the first call
    assert [s.name for s in lorainit.find_sites(compiled)[0]] == [s.name for s in lorainit.find_sites(model)[0]]
    lorainit.save_pretrained(compiled, tmp_path)
    assert torch.equal(logits(reloaded(LLAMA, tmp_path), LLAMA.batch()), logits(model, LLAMA.batch()))


@pytest.fixture
def resized(tmp_path):
    """Bases from one folder that get the same new tokens, with other random rows for each seed."""
    LLAMA.base().save_pretrained(tmp_path / "base")

    def base(seed):
        model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "base", dtype=torch.float32).eval()
        with seeded(seed):
            model.resize_token_embeddings(45, mean_resizing=False)
        return model

    return base


@pytest.mark.parametrize("targets", [["q_proj"], ["q_proj", "lm_head"]], ids=["others", "output layer"])
@pytest.mark.parametrize("tokens", ["old", "new"])
def test_a_resized_vocabulary_goes_with_the_adapter(targets, tokens, resized, tmp_path):
    model = get_peft_model(resized(1), LLAMA.lora_config(target_modules=targets)).eval()
    start(model, "pissa")
    train(model, LLAMA.batches())
    batch = LLAMA.batch() if tokens == "old" else {"input_ids": torch.tensor([[3, 42, 44, 7]])}
    outputs = logits(model, batch)
    lorainit.save_pretrained(model, tmp_path / "exact")
    lorainit.export(tmp_path / "exact", tmp_path / "exported")
    model.save_pretrained(tmp_path / "peft")
    lorainit.export(tmp_path / "peft", tmp_path / "exported from peft")
    resumed = get_peft_model(resized(2), LLAMA.lora_config(target_modules=targets)).eval()
    lorainit.load(resumed, tmp_path / "peft")
    folders = ["exact", "exported", "peft", "exported from peft"]
    again = {folder: PeftModel.from_pretrained(resized(2), tmp_path / folder).eval() for folder in folders}
    if tokens == "new" and "lm_head" in targets:  # what PEFT saves lacks the embedding then
        again = {folder: again[folder] for folder in ("exact", "exported")}
    else:
        assert torch.equal(logits(resumed, batch), outputs)
    for folder, loaded in again.items():
        assert relative_difference(logits(loaded, batch), outputs) <= 1e-5, folder


def test_a_load_that_is_interrupted_puts_the_output_layer_back(resized, tmp_path, monkeypatch):
    config = {"target_modules": ["lm_head"]}
    model = get_peft_model(resized(1), LLAMA.lora_config(**config))
    start(model, "pissa")
    model.save_pretrained(tmp_path / "peft")
    again = get_peft_model(resized(2), LLAMA.lora_config(**config))
    before = Snapshot.of(again)

    def interrupted(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(lorainit.saving.checkpoint, "mark_started", interrupted)
    with pytest.raises(KeyboardInterrupt):
        lorainit.load(again, tmp_path / "peft")
    before.assert_unchanged(again)


def test_an_output_layer_is_not_saved_where_its_base_cannot_be_read_and_that_is_said(tmp_path):
    model = LLAMA.adapted(target_modules=["lm_head"])
    model.peft_config["default"].base_model_name_or_path = str(tmp_path / "moved")
    start(model, "pissa")
    with pytest.warns(UserWarning, match="the config of '.*moved' cannot be read, so the weight of the adapted embedd"):
        lorainit.save_pretrained(model, tmp_path / "out")
    assert_plain(tmp_path / "out")


NUMPY = {
    "method": (lorainit.PiSSA(iterations=np.int64(3)), {}),
    "seed": ("pissa", {"seed": np.int64(3)}),
    "threshold": ("pissa", {"ranks": lorainit.RankRule("energy", threshold=np.float32(0.5))}),
}


@pytest.mark.parametrize("method, options", NUMPY.values(), ids=NUMPY)
def test_numpy_s_scalars_are_numbers_in_the_provenance(method, options, tmp_path):
    model = LLAMA.adapted()
    start(model, method, **options)
    model.save_pretrained(tmp_path / "peft")
    lorainit.save_pretrained(model, tmp_path / "exact")
    for folder in ("peft", "exact"):
        record = read_json(tmp_path / folder / PROVENANCE_NAME)["start"]
        assert 3 in (record["seed"], record["options"]["iterations"]) or record["ranks"]["threshold"] == 0.5
    lorainit.load(LLAMA.adapted(), tmp_path / "peft")


def test_what_json_cannot_hold_is_an_error_and_no_file(tmp_path):
    write_json(tmp_path / "good", {"dtype": torch.bfloat16, "count": np.int64(2), "flag": np.bool_(True)})
    assert read_json(tmp_path / "good") == {"dtype": "torch.bfloat16", "count": 2, "flag": True}
    with pytest.raises(lorainit.LoraInitError, match=r"bad cannot hold \{1\}: JSON has no form for a set"):
        write_json(tmp_path / "bad", {"names": {1}})
    assert not (tmp_path / "bad").exists()


def test_the_name_of_the_base_model_is_recorded(tmp_path):
    LLAMA.base().save_pretrained(tmp_path / "base")
    base = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "base").eval()
    model = get_peft_model(base, LLAMA.lora_config()).eval()
    start(model, "loram")
    train(model, LLAMA.batches())
    lorainit.save_pretrained(model, tmp_path / "out")
    assert read_adapter(tmp_path / "out")[0].base_model_name_or_path == str(tmp_path / "base")
    again = peft.AutoPeftModel.from_pretrained(tmp_path / "out").eval()
    assert relative_difference(logits(again, LLAMA.batch()), logits(model, LLAMA.batch())) <= 1e-5


def test_a_model_card_is_written(tmp_path):
    lorainit.save_pretrained(LLAMA.adapted(), tmp_path)
    assert "lora" in (tmp_path / "README.md").read_text()


@each_method
def test_the_provenance_says_what_the_start_was(method, tmp_path):
    model = LLAMA.adapted()
    report = start(model, method, seed=3, data=LLAMA.batches())
    model.save_pretrained(tmp_path / "checkpoint")
    lorainit.save_pretrained(model, tmp_path / "exact")
    lorainit.save_pretrained(model, tmp_path / "truncated", rank=2)
    lorainit.export(tmp_path / "checkpoint", tmp_path / "exported")
    for folder, form in {
        "checkpoint": "training",
        "exact": "exact",
        "truncated": "truncated",
        "exported": "exact",
    }.items():
        record = read_json(tmp_path / folder / PROVENANCE_NAME)
        assert record["form"] == form
        assert record["versions"]["lorainit"] == lorainit.__version__
        assert record["start"]["method"] == method and record["start"]["seed"] == 3
        assert record["start"]["options"] == report.to_dict()["options"]
        assert [row["name"] for row in record["start"]["layers"]] == [row.name for row in report.layers]


def test_a_plain_peft_adapter_is_saved_as_well_without_a_start_in_the_provenance(tmp_path):
    model = LLAMA.adapted()
    train(model, LLAMA.batches())
    lorainit.save_pretrained(model, tmp_path)
    assert torch.equal(logits(reloaded(LLAMA, tmp_path), LLAMA.batch()), logits(model, LLAMA.batch()))
    assert read_json(tmp_path / PROVENANCE_NAME)["start"] is None


# --- truncation ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rank", [1, 3, 8, 20])
@pytest.mark.parametrize("case", [LLAMA, GPT2, CONV, TWIN], ids=lambda case: case.name)
def test_truncation_is_the_best_approximation_and_reports_its_error(case, rank, tmp_path):
    model = trained(case, "pissa", torch.float64)
    errors = lorainit.save_pretrained(model, tmp_path / "saved", rank=rank)
    model.save_pretrained(tmp_path / "checkpoint")
    assert lorainit.export(tmp_path / "checkpoint", tmp_path / "exported", rank=rank) == pytest.approx(
        errors, abs=1e-12
    )
    dense = updates(model)
    for folder in ("saved", "exported"):
        again = reloaded(case, tmp_path / folder, torch.float64)
        assert updates(again).keys() == dense.keys()
        for name, update in updates(again).items():
            singular = torch.linalg.svdvals(dense[name])
            best = float(singular[rank:].norm() / singular.norm())
            assert errors[name] == pytest.approx(best, abs=1e-9)
            assert float((update - dense[name]).norm() / dense[name].norm()) == pytest.approx(best, abs=1e-9)
        assert max(site.rank for site in lorainit.find_sites(again)[0]) <= min(rank, 8)


@pytest.mark.parametrize("variant", ["rslora patterns", "bias", "dora", "dora conv", "trained head", "trained biases"])
def test_truncation_to_the_full_rank_keeps_the_outputs_of_every_option(variant, tmp_path):
    case, config = VARIANTS[variant]
    model = trained(case, "loram", **config)
    full = max(2 * site.rank for site in lorainit.find_sites(model)[0])
    for rank in (full, full - 1):
        errors = lorainit.save_pretrained(model, tmp_path / str(rank), rank=rank)
        moved = relative_difference(
            logits(reloaded(case, tmp_path / str(rank)), case.batch()), logits(model, case.batch())
        )
        assert moved <= 1e-5 + 30 * max(errors.values())
        assert max(errors.values()) < 0.5


class LargestTensor(TorchDispatchMode):
    """Remember the size of the largest tensor that an operation makes; views of its arguments do not count."""

    entries = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        given, made = ([t for t in tree_leaves(tree) if isinstance(t, torch.Tensor)] for tree in (args, result))
        known = {t.untyped_storage().data_ptr() for t in given}
        sizes = [t.numel() for t in made if t.untyped_storage().data_ptr() not in known]
        self.entries = max(self.entries, *sizes, 0)
        return result


def test_truncation_never_forms_the_update(tmp_path):
    model = get_peft_model(nn.Sequential(nn.Linear(600, 500)), LoraConfig(r=3, target_modules=["0"]))
    start(model, "loram")
    with torch.no_grad():
        lorainit.find_sites(model)[0][0].lora_B.trained.mul_(1.5)
    with LargestTensor() as largest:
        lorainit.save_pretrained(model, tmp_path, rank=2)
    assert 0 < largest.entries <= 2 * 6 * 600


@pytest.mark.parametrize("rank", [0, -1])
def test_a_rank_below_one_is_refused(rank, tmp_path):
    model = trained(LLAMA)
    model.save_pretrained(tmp_path / "checkpoint")
    with pytest.raises(lorainit.LoraInitError, match=f"at least 1, got {rank}"):
        lorainit.save_pretrained(model, tmp_path / "out", rank=rank)
    with pytest.raises(lorainit.LoraInitError, match=f"at least 1, got {rank}"):
        lorainit.export(tmp_path / "checkpoint", tmp_path / "out", rank=rank)
    assert not (tmp_path / "out").exists()


# --- Trainer ------------------------------------------------------------------------------------------------------


def trainer_for(model, path, **arguments):
    with seeded(11):
        rows = [{"input_ids": ids, "labels": ids} for ids in torch.randint(40, (8, 6))]
    options = {
        **{"output_dir": str(path), "per_device_train_batch_size": 2, "max_steps": 6, "save_steps": 3, "seed": 1},
        **{"learning_rate": 1e-2, "logging_steps": 1, "report_to": [], "use_cpu": True, "disable_tqdm": True},
        **{"save_strategy": "steps", "warmup_steps": 2},
    }
    return transformers.Trainer(model, transformers.TrainingArguments(**(options | arguments)), train_dataset=rows)


def losses(trainer):
    return [row["loss"] for row in trainer.state.log_history if "loss" in row]


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Uninterrupted runs of six steps with dropout, with a checkpoint after three, by (method, base)."""
    done = {}

    def run(method, base):
        if (method, base) not in done:
            path = tmp_path_factory.mktemp("trainer")
            model = LLAMA.adapted(lora_dropout=0.2)
            start(model, method, base=base)
            trainer = trainer_for(model, path)
            trainer.train()
            done[method, base] = (model, losses(trainer), path / "checkpoint-3")
        return done[method, base]

    return run


def started_again(method, base, seed):
    return lambda model, _: start(model, method, base=base, seed=seed)


def by_load(model, checkpoint):
    lorainit.load(model, checkpoint)


RESUMES = {
    "same start": ("pissa", "offset", started_again("pissa", "offset", 0)),
    "other seed": ("pissa", "offset", started_again("pissa", "offset", 7)),
    "other method": ("pissa", "offset", started_again("loram", "offset", 0)),
    "load": ("pissa", "offset", by_load),
    "edited base": ("pissa", "subtract", started_again("pissa", "subtract", 0)),
    "kept step": ("pissa", "keep", started_again("loram", "keep", 0)),
    "plain": ("kaiming", "auto", by_load),
}


@pytest.mark.parametrize("method, base, prepare", RESUMES.values(), ids=RESUMES)
def test_a_trainer_checkpoint_resumes_the_trajectory_to_the_last_bit(method, base, prepare, runs, tmp_path):
    model, expected, checkpoint = runs(method, base)
    again = LLAMA.adapted(lora_dropout=0.2)
    prepare(again, checkpoint)
    trainer = trainer_for(again, tmp_path)
    trainer.train(resume_from_checkpoint=str(checkpoint))
    assert losses(trainer) == expected  # the first three come from the checkpoint
    assert_same_tensors(trained_state(again), trained_state(model))
    assert torch.equal(logits(again.eval(), LLAMA.batch()), logits(model.eval(), LLAMA.batch()))


WRONG_RESUMES = {
    "offset into plain": ("pissa", "offset", lambda model, _: None, "size mismatch"),
    "plain into offset": ("kaiming", "auto", started_again("pissa", "offset", 0), "offset form"),
    "edited into plain": ("pissa", "subtract", lambda model, _: None, "size mismatch"),
    "another edit": ("pissa", "subtract", started_again("loram", "subtract", 0), "edited for another start"),
}


@pytest.mark.parametrize("method, base, prepare, message", WRONG_RESUMES.values(), ids=WRONG_RESUMES)
def test_a_resume_that_would_be_wrong_is_an_error(method, base, prepare, message, runs, tmp_path):
    *_, checkpoint = runs(method, base)
    again = LLAMA.adapted(lora_dropout=0.2)
    prepare(again, checkpoint)
    with pytest.raises(RuntimeError, match=message):
        trainer_for(again, tmp_path).train(resume_from_checkpoint=str(checkpoint))


@pytest.mark.parametrize("method, base", [("pissa", "offset"), ("pissa", "subtract"), ("kaiming", "auto")])
def test_a_trainer_checkpoint_is_an_adapter_that_peft_loads_and_export_finishes(method, base, runs, tmp_path):
    model, _, checkpoint = runs(method, base)
    final = checkpoint.parent / "checkpoint-6"
    lorainit.export(final, tmp_path / "exported")
    lorainit.save_pretrained(model, tmp_path / "saved")
    for folder in (final, tmp_path / "exported", tmp_path / "saved"):
        outputs = logits(reloaded(LLAMA, folder), LLAMA.batch())
        assert relative_difference(outputs, logits(model.eval(), LLAMA.batch())) <= 1e-5
    assert relative_difference(logits(reloaded(LLAMA, checkpoint), LLAMA.batch()), outputs) > 0.01


# --- load ---------------------------------------------------------------------------------------------------------


@each_case
@each_method
def test_load_puts_a_training_state_back_to_the_last_bit(method, case, tmp_path):
    model = case.adapted()
    report = start(model, method, data=case.batches())
    train(model, case.batches())
    model.save_pretrained(tmp_path)
    again = case.adapted()
    stored = lorainit.load(again, tmp_path)
    assert stored.method == report.method and [r.name for r in stored.layers] == [r.name for r in report.layers]
    assert_same_tensors(trained_state(again), trained_state(model))
    for each in (again, model):
        train(each, case.batches())
    assert_same_tensors(trained_state(again), trained_state(model))
    assert torch.equal(logits(again, case.batch()), logits(model, case.batch()))
    again.save_pretrained(tmp_path / "later")
    lorainit.load(case.adapted(), tmp_path / "later")


@pytest.mark.parametrize("variant", VARIANTS)
def test_load_takes_every_option_along(variant, tmp_path):
    case, config = VARIANTS[variant]
    model = trained(case, **config)
    model.save_pretrained(tmp_path)
    again = case.adapted(**config)
    lorainit.load(again, tmp_path)
    assert_same_tensors(trained_state(again), trained_state(model))
    assert torch.equal(logits(again, case.batch()), logits(model, case.batch()))


@pytest.mark.parametrize("earlier", [None, "kaiming", "pissa", "loram"])
@pytest.mark.parametrize("method", ["kaiming", "pissa"])
def test_load_does_not_mind_what_the_adapter_held(method, earlier, tmp_path):
    model = trained(LLAMA, method)
    model.save_pretrained(tmp_path)
    again = LLAMA.adapted()
    if earlier:
        start(again, earlier)
    lorainit.load(again, tmp_path)
    assert_same_tensors(trained_state(again), trained_state(model))


def test_load_into_one_of_two_adapters_leaves_the_other_alone(tmp_path):
    model = trained(LLAMA, "pissa")
    model.save_pretrained(tmp_path)
    again = LLAMA.adapted()
    again.add_adapter("other", LLAMA.lora_config())
    start(again, "loram")
    before = trained_state(again)
    lorainit.load(again, tmp_path, adapter_name="other")
    after = trained_state(again)
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items() if ".other." not in name)
    again.set_adapter("other")
    assert torch.equal(logits(again, LLAMA.batch()), logits(model, LLAMA.batch()))


def drop(path, part):
    tensors = load_file(path / WEIGHTS)
    save_file({k: v for k, v in tensors.items() if part not in k}, path / WEIGHTS)


def resize(path, part):
    tensors = load_file(path / WEIGHTS)
    save_file({k: v[:-1].contiguous() if part in k else v for k, v in tensors.items()}, path / WEIGHTS)


def rename(path, part):
    tensors = load_file(path / WEIGHTS)
    save_file({k.replace(part, "elsewhere"): v for k, v in tensors.items()}, path / WEIGHTS)


# what is wrong with the folder, or with the model that it is loaded into
WRONG_LOADS = {
    "a finished adapter": (lambda path: edit_json(path / PROVENANCE_NAME, form="exact"), {}, "no training checkpoint"),
    "no provenance": (lambda path: (path / PROVENANCE_NAME).unlink(), {}, "no training checkpoint"),
    "damaged provenance": (lambda path: (path / PROVENANCE_NAME).write_text("{"), {}, "damaged"),
    "incomplete provenance": (lambda path: (path / PROVENANCE_NAME).write_text('{"form": "training"}'), {}, "damaged"),
    "provenance of another kind": (lambda path: (path / PROVENANCE_NAME).write_text("[1]"), {}, "damaged"),
    "no weights": (lambda path: (path / WEIGHTS).unlink(), {}, "has no adapter_model.safetensors"),
    "damaged weights": (lambda path: (path / WEIGHTS).write_bytes(b"123"), {}, "damaged"),
    "a layer without lora_B": (lambda path: drop(path, "layers.1.self_attn.v_proj.lora_B"), {}, r"v_proj\.lora_B"),
    "a missing layer": (lambda path: drop(path, "layers.1.self_attn.v_proj"), {}, r"layers\.1\.self_attn\.v_proj"),
    "a layer of another size": (lambda path: resize(path, "layers.1.mlp.down_proj.lora_A"), {}, "does not fit"),
    "a layer of another name": (lambda path: rename(path, "down_proj"), {}, "(elsewhere|down_proj)"),
    "another rank": (lambda path: None, {"r": 2}, "rank|does not fit"),
    "another alpha": (lambda path: None, {"lora_alpha": 12}, r"scaling"),
    "another kind of scaling": (lambda path: None, {"use_rslora": True}, r"scaling"),
    "fewer layers": (lambda path: None, {"target_modules": ["q_proj", "v_proj"]}, "down_proj"),
    "more layers": (lambda path: None, {"target_modules": ["q_proj", "v_proj", "down_proj", "o_proj"]}, "o_proj"),
    "dora": (lambda path: None, {"use_dora": True}, "lora_magnitude_vector"),
}


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    """What PEFT saves of a LLaMA in training, by method."""
    folders = {method: tmp_path_factory.mktemp(method) for method in ("pissa", "kaiming")}
    for method, path in folders.items():
        trained(LLAMA, method).save_pretrained(path)
    return folders


@pytest.mark.parametrize("method, started", [("pissa", False), ("pissa", True), ("kaiming", True)])
@pytest.mark.parametrize("spoil, config, message", WRONG_LOADS.values(), ids=WRONG_LOADS)
def test_a_checkpoint_that_does_not_fit_is_an_error_and_changes_nothing(
    spoil, config, message, method, started, checkpoints, tmp_path
):
    shutil.copytree(checkpoints[method], tmp_path, dirs_exist_ok=True)
    spoil(tmp_path)
    model = LLAMA.adapted(**config)
    if started:
        start(model, "loram")
    before = Snapshot.of(model)
    with pytest.raises(lorainit.LoraInitError, match=message):
        lorainit.load(model, tmp_path)
    before.assert_unchanged(model, buffers_remade=True)


@pytest.mark.parametrize("variant", ["dora", "bias", "trained head", "trained biases", "trainable tokens", "head"])
def test_a_load_that_is_interrupted_puts_back_more_than_the_factors(variant, tmp_path, monkeypatch):
    case, config = VARIANTS[variant]
    trained(case, "pissa", **config).save_pretrained(tmp_path)
    model = case.adapted(**config)
    before = Snapshot.of(model)
    really = lorainit.saving.checkpoint.set_peft_model_state_dict

    def interrupted(*args, **kwargs):
        really(*args, **kwargs)
        with pytest.raises(AssertionError):
            before.assert_unchanged(model)
        raise KeyboardInterrupt

    monkeypatch.setattr(lorainit.saving.checkpoint, "set_peft_model_state_dict", interrupted)
    with pytest.raises(KeyboardInterrupt):
        lorainit.load(model, tmp_path)
    before.assert_unchanged(model)


def test_a_checkpoint_with_an_edited_base_is_to_be_started_again_instead(tmp_path):
    trained(LLAMA, base="subtract").save_pretrained(tmp_path)
    with pytest.raises(lorainit.LoraInitError, match=r"base='subtract'; call lorainit\.initialize again"):
        lorainit.load(LLAMA.adapted(), tmp_path)


def test_peft_refuses_to_load_the_wrong_form_over_an_adapter(tmp_path):
    plain, started = trained(LLAMA, "kaiming"), trained(LLAMA, "pissa")
    plain.save_pretrained(tmp_path / "plain")
    started.save_pretrained(tmp_path / "started")
    for model, folder, message in ((started, "plain", "offset form"), (plain, "started", "size mismatch")):
        outputs = logits(model, LLAMA.batch())
        with pytest.raises(RuntimeError, match=message):
            model.load_adapter(tmp_path / folder, "default")
        assert torch.equal(logits(model, LLAMA.batch()), outputs)


def test_peft_loads_a_folder_beside_a_started_adapter(tmp_path):
    model = trained(LLAMA, "pissa")
    outputs = logits(model, LLAMA.batch())
    lorainit.save_pretrained(model, tmp_path)
    model.load_adapter(tmp_path, "copy")
    assert torch.equal(logits(model, LLAMA.batch()), outputs)
    model.set_adapter("copy")
    assert relative_difference(logits(model, LLAMA.batch()), outputs) <= 1e-5
    model.delete_adapter("default")
    assert [s.adapter for s in lorainit.find_sites(model, "copy")[0]] == ["copy"] * 6


# --- merge --------------------------------------------------------------------------------------------------------


@each_case
@each_method
def test_merge_gives_the_plain_model_with_the_trained_outputs(method, case):
    model = trained(case, method)
    outputs = logits(model, case.batch())
    merged = lorainit.merge(model)
    assert type(merged) is type(case.base())
    assert {n: type(m) for n, m in merged.named_modules()} == {n: type(m) for n, m in case.base().named_modules()}
    assert relative_difference(logits(merged, case.batch()), outputs) <= 1e-5


@each_base
@pytest.mark.parametrize("variant", ["rslora patterns", "bias", "dora", "dora conv1d", "dora conv"])
def test_merge_takes_every_option_along(variant, base):
    case, config = VARIANTS[variant]
    model = trained(case, base=base, **config)
    outputs = logits(model, case.batch())
    assert relative_difference(logits(lorainit.merge(model), case.batch()), outputs) <= 1e-5


def test_merge_unties_a_head_so_that_the_embedding_stays(tmp_path):
    model = trained(TIED, "pissa")
    embedding, outputs = TIED.base().model.embed_tokens.weight, logits(model, TIED.batch())
    merged = lorainit.merge(model)
    assert torch.equal(merged.model.embed_tokens.weight, embedding)
    assert not torch.equal(merged.lm_head.weight, embedding)
    assert merged.config.tie_word_embeddings is False
    merged.save_pretrained(tmp_path)
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert relative_difference(logits(again, TIED.batch()), outputs) <= 1e-5


def test_merge_keeps_a_tie_that_it_need_not_break():
    model = trained(TIED, "pissa", target_modules=["q_proj"])
    merged = lorainit.merge(model)
    assert merged.lm_head.weight is merged.model.embed_tokens.weight
    assert merged.config.tie_word_embeddings is True


def test_merge_of_one_of_two_adapters_drops_the_other():
    model = trained(LLAMA, "pissa")
    outputs = logits(model, LLAMA.batch())
    model.add_adapter("other", LLAMA.lora_config())
    start(model, "loram", adapter_name="other")
    model.set_adapter("other")
    train(model, LLAMA.batches())
    assert relative_difference(logits(lorainit.merge(model), LLAMA.batch()), outputs) <= 1e-5


def test_merge_of_an_adapter_that_is_already_merged_counts_it_once():
    model = trained(LLAMA, "pissa")
    outputs = logits(model, LLAMA.batch())
    model.merge_adapter()
    assert relative_difference(logits(lorainit.merge(model), LLAMA.batch()), outputs) <= 1e-5


def test_merge_beside_another_merged_adapter_is_refused():
    model = trained(LLAMA, "pissa")
    model.add_adapter("other", LLAMA.lora_config())
    model.merge_adapter(["other"])
    with pytest.raises(lorainit.LoraInitError, match="'other' is merged"):
        lorainit.merge(model)


def test_merge_beside_an_adapter_that_is_merged_elsewhere_is_refused_by_layer():
    model = trained(LLAMA, "pissa", target_modules=["q_proj"])
    model.add_adapter("other", LLAMA.lora_config(target_modules=["v_proj"]))
    model.merge_adapter(["other"])
    before = Snapshot.of(model)
    with pytest.raises(lorainit.LoraInitError, match=r"layer 'model\.layers\.0.*v_proj': adapter 'other' is merged"):
        lorainit.merge(model)
    before.assert_unchanged(model)


@pytest.mark.parametrize("name", ["default2", "nan", "weight"])
def test_merge_does_not_mind_another_adapter_that_is_not_finite(name):
    model = trained(LLAMA, "pissa")
    outputs = logits(model, LLAMA.batch())
    model.add_adapter(name, LLAMA.lora_config())
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if f".{name}." in key:
                parameter.fill_(float("nan"))
    assert relative_difference(logits(lorainit.merge(model), LLAMA.batch()), outputs) <= 1e-5


@pytest.mark.parametrize("case", [LLAMA, TIED], ids=lambda case: case.name)
def test_a_merge_that_is_not_finite_is_an_error_and_changes_nothing(case):
    model = trained(case, "pissa")
    with torch.no_grad():
        lorainit.find_sites(model)[0][-1].lora_A.trained[0, 0] = float("nan")
    before = Snapshot.of(model)
    with pytest.raises(lorainit.LoraInitError, match="'default' cannot be merged: .*NaN"):
        lorainit.merge(model)
    before.assert_unchanged(model)
    assert getattr(model.config, "tie_word_embeddings", False) == (case is TIED)


@pytest.mark.parametrize("make", [LLAMA.base, LLAMA.adapted], ids=["no lora", "other adapter"])
def test_merge_of_an_unknown_adapter_is_refused(make):
    with pytest.raises(lorainit.LoraInitError, match=r"has no PEFT LoRA layers|adapters on this model: \['default'\]"):
        lorainit.merge(make(), adapter_name="nope")


def test_merge_of_a_model_that_is_no_peft_model_says_so():
    model = LLAMA.base()
    model.add_adapter(LLAMA.lora_config())
    start(model, "loram")
    with pytest.raises(lorainit.LoraInitError, match="LlamaForCausalLM is no peft.PeftModel"):
        lorainit.merge(model)


# --- folders ------------------------------------------------------------------------------------------------------


def pickle_only(path):
    torch.save(load_file(path / WEIGHTS), path / "adapter_model.bin")
    (path / WEIGHTS).unlink()


BROKEN_FOLDERS = {
    "not there": (shutil.rmtree, "has no adapter_config.json"),
    "no config": (lambda path: (path / CONFIG).unlink(), "has no adapter_config.json"),
    "no JSON": (lambda path: (path / CONFIG).write_text("{"), "adapter_config.json is damaged"),
    "JSON of another kind": (lambda path: (path / CONFIG).write_text("[]"), "adapter_config.json is damaged"),
    "binary config": (lambda path: (path / CONFIG).write_bytes(b"\xff\xfe\x00"), "adapter_config.json is damaged"),
    "no type": (lambda path: edit_json(path / CONFIG, peft_type=None), "adapter_config.json is damaged"),
    "unknown type": (lambda path: edit_json(path / CONFIG, peft_type="NEW"), "adapter_config.json is damaged"),
    "another type": (peft.LoHaConfig(target_modules=["q_proj"]).save_pretrained, "holds a .*LOHA adapter, not LoRA"),
    "no weights": (lambda path: (path / WEIGHTS).unlink(), "has no adapter_model.safetensors$"),
    "pickle only": (pickle_only, "adapter_model.bin, a pickle, which is never loaded"),
    "empty file": (lambda path: (path / WEIGHTS).write_bytes(b""), "adapter_model.safetensors is damaged"),
    "no header": (lambda path: (path / WEIGHTS).write_bytes(b"\x00" * 64), "adapter_model.safetensors is damaged"),
    "cut short": (
        lambda path: (path / WEIGHTS).write_bytes((path / WEIGHTS).read_bytes()[:-64]),
        "adapter_model.safetensors is damaged",
    ),
}
each_broken = pytest.mark.parametrize("spoil, message", BROKEN_FOLDERS.values(), ids=BROKEN_FOLDERS)


@each_broken
def test_a_broken_folder_is_an_error_that_names_the_file(spoil, message, checkpoints, tmp_path):
    shutil.copytree(checkpoints["pissa"], tmp_path / "in")
    spoil(tmp_path / "in")
    with pytest.raises(lorainit.LoraInitError, match=message):
        read_adapter(tmp_path / "in")
    with pytest.raises(lorainit.LoraInitError, match=message):
        lorainit.export(tmp_path / "in", tmp_path / "out")
    assert not (tmp_path / "out").exists()


# folders whose parts are sound and do not belong together
UNEXPORTABLE = {
    "no lora tensors": (lambda path: save_file({"x": torch.zeros(1)}, path / WEIGHTS), "holds no LoRA layer"),
    "empty": (lambda path: save_file({}, path / WEIGHTS), "holds no LoRA layer"),
    "no lora_B": (lambda path: drop(path, "layers.1.self_attn.v_proj.lora_B"), r"v_proj' .*lora_B of shape \(0, 0\)"),
    "no lora_A": (lambda path: drop(path, "layers.1.self_attn.v_proj.lora_A"), r"v_proj' .*lora_A of shape \(0, 0\)"),
    "ranks differ": (lambda path: resize(path, "layers.1.mlp.down_proj.lora_A"), r"down_proj' .*shape \(7, 24\)"),
    "config of another rank": (lambda path: edit_json(path / CONFIG, r=6), r"down_proj' has rank 6 .*shape \(8, 24\)"),
    "no plain lora": (lambda path: edit_json(path / CONFIG, kasa_config={}), "is no plain LoRA: .*kasa_config"),
    "base edited by peft": (
        lambda path: edit_json(path / CONFIG, init_lora_weights="pissa"),
        r"init_lora_weights='pissa'.*edited the base",
    ),
    "damaged provenance": (lambda path: (path / PROVENANCE_NAME).write_text("{"), r"lorainit.json is damaged"),
}


@pytest.mark.parametrize("spoil, message", UNEXPORTABLE.values(), ids=UNEXPORTABLE)
def test_what_cannot_be_exported_rightly_is_an_error(spoil, message, checkpoints, tmp_path):
    shutil.copytree(checkpoints["pissa"], tmp_path / "in")
    spoil(tmp_path / "in")
    with pytest.raises(lorainit.LoraInitError, match=message):
        lorainit.export(tmp_path / "in", tmp_path / "out")
    assert not (tmp_path / "out").exists()


@each_variant
def test_export_needs_no_model_for_any_option(case, config, tmp_path):
    model = trained(case, "loram", **config)
    model.save_pretrained(tmp_path / "checkpoint")
    lorainit.export(tmp_path / "checkpoint", tmp_path / "exported")
    lorainit.save_pretrained(model, tmp_path / "saved")
    exported, saved = (tmp_path / folder for folder in ("exported", "saved"))
    assert_same_tensors(load_file(exported / WEIGHTS), load_file(saved / WEIGHTS))
    assert read_json(exported / CONFIG) == read_json(saved / CONFIG)
    targets = read_json(saved / CONFIG)["target_modules"]
    assert targets == (targets if isinstance(targets, str) else sorted(targets))  # in any process, whatever its hashes


def test_export_of_an_ordinary_peft_adapter(tmp_path):
    model = LLAMA.adapted(torch.float64)
    train(model, LLAMA.batches())
    model.save_pretrained(tmp_path / "peft")
    assert set(lorainit.export(tmp_path / "peft", tmp_path / "same").values()) == {0.0}
    assert torch.equal(
        logits(reloaded(LLAMA, tmp_path / "same", torch.float64), LLAMA.batch()), logits(model, LLAMA.batch())
    )
    assert min(lorainit.export(tmp_path / "peft", tmp_path / "less", rank=1).values()) > 0


def test_export_may_write_over_its_source(tmp_path):
    model = trained(LLAMA)
    model.save_pretrained(tmp_path)
    lorainit.export(tmp_path, tmp_path)
    assert relative_difference(logits(reloaded(LLAMA, tmp_path), LLAMA.batch()), logits(model, LLAMA.batch())) <= 1e-5
    assert read_json(tmp_path / PROVENANCE_NAME)["form"] == "exact"
    with pytest.raises(lorainit.LoraInitError, match="no training checkpoint"):
        lorainit.load(LLAMA.adapted(), tmp_path)


def test_a_file_in_the_place_of_the_folder_is_an_error(tmp_path):
    model = trained(LLAMA)
    model.save_pretrained(tmp_path / "checkpoint")
    (tmp_path / "file").write_text("")
    with pytest.raises(lorainit.LoraInitError, match="is a file; a folder is needed"):
        lorainit.save_pretrained(model, tmp_path / "file")
    with pytest.raises(lorainit.LoraInitError, match="is a file; a folder is needed"):
        lorainit.export(tmp_path / "checkpoint", tmp_path / "file")


def test_saving_an_unknown_adapter_or_none_is_refused(tmp_path):
    with pytest.raises(lorainit.LoraInitError, match=r"'nope'; adapters on this model: \['default'\]"):
        lorainit.save_pretrained(LLAMA.adapted(), tmp_path, adapter_name="nope")
    with pytest.raises(lorainit.LoraInitError, match="has no PEFT LoRA layers"):
        lorainit.save_pretrained(LLAMA.base(), tmp_path)


def test_saving_layers_without_a_config_is_refused(tmp_path):
    model = LLAMA.adapted()
    bare = Net(inner=model.base_model.model.model.layers[0].self_attn.q_proj)
    start(bare, "loram")  # the layers alone can be started
    with pytest.raises(lorainit.LoraInitError, match="Net holds no LoraConfig for adapter 'default'"):
        lorainit.save_pretrained(bare, tmp_path)


def test_an_adapter_inside_one_of_another_kind_is_not_saved(tmp_path):
    model = get_peft_model(LLAMA.base(), LLAMA.lora_config(), mixed=True)
    start(model, "pissa")
    lorainit.save_pretrained(model, tmp_path / "alone")
    reloaded(LLAMA, tmp_path / "alone")
    model.add_adapter("around", peft.LoHaConfig(r=4, target_modules=["q_proj"]))
    with pytest.raises(lorainit.LoraInitError, match=r"layer '.*q_proj': its LoRA layer is inside a loha layer"):
        lorainit.save_pretrained(model, tmp_path / "inside")
    assert not (tmp_path / "inside").exists()


def test_a_variant_of_lora_is_not_saved_as_a_plain_one(tmp_path):
    kasa = getattr(peft.tuners.lora.config, "KasaConfig", dict)  # LLAMA skips it where PEFT has none
    model = LLAMA.adapted(kasa_config=kasa())
    with pytest.raises(lorainit.LoraInitError, match="adapter 'default' is no plain LoRA: .*kasa_config"):
        lorainit.save_pretrained(model, tmp_path / "out")


@pytest.mark.parametrize("peft_init", ["pissa", "olora"])
def test_an_adapter_for_a_base_that_peft_edited_is_not_saved_as_one_for_the_original(peft_init, tmp_path):
    model = LLAMA.adapted(init_lora_weights=peft_init)
    with pytest.raises(lorainit.LoraInitError, match=rf"init_lora_weights='{peft_init}'.*edited the base"):
        lorainit.save_pretrained(model, tmp_path / "out")
    assert not (tmp_path / "out").exists()


# --- layers that were left alone ----------------------------------------------------------------------------------


def mixed(odd):
    layers = {
        "experts": {"odd": Experts()},
        "embedding": {"tokens": Tokens(), "odd": nn.Embedding(7, 6)},
        "grouped": {"odd": nn.Conv2d(4, 4, 3, groups=2)},
    }[odd]
    base = Net(first=nn.Conv2d(3, 4, 3, padding=1), **layers, flat=nn.Flatten(), last=nn.LazyLinear(5)).eval()
    logits(base, CONV.batch())
    return base


@pytest.mark.parametrize("targets", [["last"], ["first", "last"], []], ids=["one", "most", "none"])
@pytest.mark.parametrize("odd", ["experts", "embedding", "grouped"])
def test_layers_that_were_left_alone_are_saved_and_loaded_with_the_others(odd, targets, tmp_path):
    def base():
        with seeded():
            return mixed(odd)

    experts = {"target_parameters": ["odd.up", "down"]} if odd == "experts" else {}
    targets = targets + ([] if experts else ["odd"])
    config = LoraConfig(r=2, lora_alpha=3, target_modules=targets, rank_pattern={"odd.up": 3}, **experts)
    with seeded(1):
        model = get_peft_model(base(), copy.deepcopy(config)).eval()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        start(model, "pissa", on_unsupported="default")
    train(model, CONV.batches())
    outputs = logits(model, CONV.batch())
    model.save_pretrained(tmp_path / "peft")
    lorainit.save_pretrained(model, tmp_path / "exact")
    lorainit.export(tmp_path / "peft", tmp_path / "exported")
    errors = [
        lorainit.save_pretrained(model, tmp_path / "truncated", rank=3),
        lorainit.export(tmp_path / "peft", tmp_path / "exported truncated", rank=3),
    ]
    assert errors[0] == pytest.approx(errors[1])
    assert all(error == 0 for name, error in errors[0].items() if name.startswith("odd"))
    for folder in ("peft", "exact", "exported", "truncated", "exported truncated"):
        again = PeftModel.from_pretrained(base(), tmp_path / folder).eval()
        tolerance = 1e-5 if "truncated" not in folder else 1e-5 + 10 * max(errors[0].values())
        assert relative_difference(logits(again, CONV.batch()), outputs) <= tolerance, folder
    with seeded(2):
        resumed = get_peft_model(base(), copy.deepcopy(config)).eval()
    lorainit.load(resumed, tmp_path / "peft")
    assert torch.equal(logits(resumed, CONV.batch()), outputs)


# --- the config of a started adapter ------------------------------------------------------------------------------


def test_the_started_config_behaves_as_the_one_it_replaces():
    model = LLAMA.adapted(lora_dropout=0.25)
    before = model.peft_config["default"]
    start(model, "pissa")
    config = model.peft_config["default"]
    assert isinstance(config, LoraConfig) and isinstance(config, StartedLoraConfig)
    fields = {name: getattr(before, name) for name in LoraConfig.__dataclass_fields__}
    assert {name: getattr(config, name) for name in fields} == fields
    assert config.to_dict()["r"] == 8 and before.to_dict()["r"] == 4
    assert copy.deepcopy(config).to_dict() == config.to_dict()


def test_peft_s_weighted_sum_of_a_started_and_another_adapter_is_right_or_an_error():
    model = trained(LLAMA, "pissa")
    model.add_adapter("other", LLAMA.lora_config())
    start(model, "kaiming", adapter_name="other")
    model.set_adapter("other")
    train(model, LLAMA.batches())
    exact = {name: 0.5 * a + 0.25 * updates(model, "other")[name] for name, a in updates(model).items()}
    model.add_weighted_adapter(["default", "other"], [0.5, 0.25], "svd", combination_type="svd")
    for name, update in updates(model, "svd").items():
        best = torch.linalg.svdvals(exact[name])[4:].norm()
        assert float((update - exact[name]).norm()) == pytest.approx(float(best), rel=1e-3)
    try:
        model.add_weighted_adapter(["default", "other"], [0.5, 0.25], "cat", combination_type="cat")
    except RuntimeError:  # it counts on the rank in the config
        return
    for name, update in updates(model, "cat").items():
        torch.testing.assert_close(update, exact[name], rtol=1e-4, atol=1e-5)


COMBINATIONS = {
    "one": (["default"], [1.0], "linear", {}),
    "half of one": (["default"], [0.5], "linear", {}),
    "pruned": (["default"], [1.0], "magnitude_prune", {"density": 0.5}),
    "sum": (["default", "other"], [0.5, 0.25], "linear", {}),
    "ties": (["default", "other"], [0.5, 0.25], "ties", {"density": 1.0}),
    "dropped": (["default", "other"], [0.5, 0.25], "dare_linear", {"density": 1.0}),
    "svd": (["default", "other"], [0.5, 0.25], "svd", {}),
}


@pytest.mark.parametrize("case, config", [(LLAMA, {}), VARIANTS["rslora patterns"]], ids=["llama", "rslora patterns"])
@pytest.mark.parametrize("adapters, weights, kind, options", COMBINATIONS.values(), ids=COMBINATIONS)
def test_what_peft_combines_is_saved_as_the_adapter_that_it_is(
    case, config, adapters, weights, kind, options, tmp_path
):
    model = trained(case, "pissa", **config)
    model.add_adapter("other", case.lora_config(**config))
    start(model, "milora", adapter_name="other")
    model.set_adapter("other")
    train(model, case.batches())
    model.add_weighted_adapter(adapters, weights, "sum", combination_type=kind, **options)
    model.set_adapter("sum")
    outputs = logits(model, case.batch())
    model.save_pretrained(tmp_path / "peft")
    lorainit.save_pretrained(model, tmp_path / "exact", adapter_name="sum")
    lorainit.export(tmp_path / "peft" / "sum", tmp_path / "exported")
    for folder in ("peft/sum", "exact", "exported"):
        assert relative_difference(logits(reloaded(case, tmp_path / folder), case.batch()), outputs) <= 1e-5, folder
    assert not (tmp_path / "peft" / "sum" / PROVENANCE_NAME).exists()


def reduce_intruders(model):
    intruders = pytest.importorskip("peft.tuners.lora.intruders", reason="came with PEFT 0.19")
    intruders.reduce_intruder_dimension(model, logging_sink=None)


@pytest.mark.parametrize(
    "add",
    [lambda model: model.add_adapter("ref", model.peft_config["default"]), reduce_intruders],
    ids=["by hand", "without intruders"],
)
def test_an_adapter_of_the_config_of_one_in_offset_form_is_refused(add, tmp_path):
    model = trained(LLAMA, "pissa")
    model.save_pretrained(tmp_path / "before")
    with pytest.raises(lorainit.LoraInitError, match="cannot be made from the config of adapter 'default'"):
        add(model)
    assert list(model.peft_config) == ["default"]
    assert torch.equal(logits(copy.deepcopy(model), LLAMA.batch()), logits(model, LLAMA.batch()))
    assert lorainit.load(model, tmp_path / "before").method == "pissa"


def test_the_adapter_that_was_saved_can_be_edited_by_peft(tmp_path):
    lorainit.save_pretrained(trained(LLAMA, "pissa"), tmp_path / "exact")
    model = reloaded(LLAMA, tmp_path / "exact")
    reduce_intruders(model)
    lorainit.save_pretrained(model, tmp_path / "reduced", adapter_name="intruder_reduced")
    outputs = logits(model, LLAMA.batch())
    assert relative_difference(logits(reloaded(LLAMA, tmp_path / "reduced"), LLAMA.batch()), outputs) <= 1e-5


def second(config):
    """A model with a fresh adapter beside another one."""
    model = LLAMA.adapted()
    model.add_adapter("second", config)
    model.set_adapter("second")
    return model


# who else gets the config, and what is in the folder that is then saved
REUSES = {
    "another model": ("pissa", lambda config: get_peft_model(LLAMA.base(), config), ""),
    "a copy, another model": ("pissa", lambda config: get_peft_model(LLAMA.base(), copy.deepcopy(config)), ""),
    "a copy, a second adapter": ("pissa", lambda config: second(copy.deepcopy(config)), "second"),
    "a second adapter, no offset": ("kaiming", second, "second"),
}


@pytest.mark.parametrize("method, reuse, folder", REUSES.values(), ids=REUSES)
def test_another_adapter_of_a_started_config_is_saved_as_what_it_is(method, reuse, folder, tmp_path):
    first = trained(LLAMA, method)
    outputs = logits(first, LLAMA.batch())
    other = reuse(first.peft_config["default"]).eval()
    train(other, LLAMA.batches())
    for name, model in {"other": other, "first": first}.items():
        model.save_pretrained(tmp_path / name)
    expected = logits(other, LLAMA.batch())
    assert relative_difference(logits(reloaded(LLAMA, tmp_path / "other" / folder), LLAMA.batch()), expected) <= 1e-5
    assert relative_difference(logits(reloaded(LLAMA, tmp_path / "first"), LLAMA.batch()), outputs) <= 1e-5
    assert read_json(tmp_path / "first" / PROVENANCE_NAME)["form"] == "training"


def test_a_save_over_a_checkpoint_does_not_leave_its_provenance(tmp_path):
    first = trained(LLAMA, "pissa")
    first.save_pretrained(tmp_path)
    other = get_peft_model(LLAMA.base(), first.peft_config["default"])
    other.save_pretrained(tmp_path)
    assert not (tmp_path / PROVENANCE_NAME).exists()
    lorainit.export(tmp_path, tmp_path / "exported")
    assert (
        relative_difference(
            logits(reloaded(LLAMA, tmp_path / "exported"), LLAMA.batch()), logits(other.eval(), LLAMA.batch())
        )
        <= 1e-5
    )


def test_the_state_dict_that_peft_saves_is_plain_and_complete():
    model = trained(LLAMA, "pissa")
    state = get_peft_model_state_dict(model)
    assert {key.rpartition(".lora_")[2] for key in state} == {"A.weight", "B.weight"}
    for name, update in updates(model).items():
        a, b = (state[f"base_model.model.{name}.lora_{f}.weight"].double() for f in "AB")
        scaling = lorainit.find_sites(model)[0][0].scaling
        torch.testing.assert_close(scaling * b @ a, update, rtol=1e-5, atol=1e-6)
