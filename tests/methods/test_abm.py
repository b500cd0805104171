"""ABM-LoRA as a whole: reference values, exact properties on tiny models, restoration, errors."""

from __future__ import annotations

import copy
import dataclasses
import json
import math

import pytest
import safetensors.torch
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn

import cases
import golden
import lorainit
from cases import BERT, GPT2, LLAMA, VIT
from lorainit import ABMLoRA, LoraInitError, NonFiniteError
from lorainit.boundaries import descent, stage
from lorainit.methods import abm

# --- reference values -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", golden.cases("abm_loss"))
def test_loss_and_gradients_are_those_of_the_published_code(case) -> None:
    count, margin = case.options["layers"], case.options["margin"]
    students = [case.tensors[f"student_{i}"].requires_grad_() for i in range(count)]
    teachers = [case.tensors[f"teacher_{i}"] for i in range(count)]
    loss = abm.boundary_loss(students, teachers, margin, case.tensors["layer_weights"].tolist())
    loss.backward()
    assert float(loss.detach()) == pytest.approx(float(case.tensors["loss"]), rel=case.tolerances["loss, relative"])
    for i, z in enumerate(students):
        assert z.grad is not None
        assert golden.entries(z.grad, case.tensors[f"grad_{i}"]) < case.tolerances["grad entries"]
        assert abm.agreement(z, teachers[i]) == pytest.approx(float(case.tensors["match_accuracy"][i]), abs=1e-6)


def put(model: nn.Module, adapter: str, tensors: dict[str, Tensor], prefix: str) -> None:
    for site in lorainit.find_sites(model, adapter)[0]:
        with torch.no_grad():
            site.lora_A.weight.copy_(tensors[f"{prefix}.{site.name}.lora_A"])
            site.lora_B.weight.copy_(tensors[f"{prefix}.{site.name}.lora_B"])


def test_five_steps_on_a_t5_follow_the_published_code(shared) -> None:
    from transformers import T5ForConditionalGeneration

    folder = shared / "golden" / "abm_t5"
    tensors = {
        k.removeprefix("stage1."): v for k, v in safetensors.torch.load_file(folder / "golden.safetensors").items()
    }
    options = json.loads((folder / "golden.json").read_text())["cases"]["stage1"]["hyper_parameters"]
    model = T5ForConditionalGeneration.from_pretrained(folder)
    config = LoraConfig(r=4, lora_alpha=8, target_modules=options["target_modules"])
    model = get_peft_model(model, config)
    model.add_adapter("teacher", config)
    put(model, "default", tensors, "student0")
    put(model, "teacher", tensors, "teacher")
    steps = options["max_steps"]
    keys = ("input_ids", "attention_mask", "labels", "decoder_attention_mask")
    rows = [{key: tensors[f"step{i}.{key}"] for key in keys} for i in range(steps)]
    # stage 1 draws its rows in an order of its own: hand them over so that they come out as they did
    data = [rows[i] for i in torch.randperm(steps, generator=torch.Generator().manual_seed(0)).argsort().tolist()]
    method = ABMLoRA(
        teacher="teacher", origin="keep", layers=6, steps=steps, batch_size=1, held_out=0, decoder_inputs="labels"
    )
    report = cases.start(model, method, data=data)
    assert report.details["loss_curve"] == pytest.approx(tensors["loss"].tolist(), rel=1e-5)
    assert report.details["frozen_layers"] == ["decoder.block.11.layer.2.DenseReluDense.wo"]
    moved, expected = [], []
    for site in lorainit.find_sites(model)[0]:
        for name, factor in zip(("lora_A", "lora_B"), site.factors(), strict=True):
            before, after = (tensors[f"student{i}.{site.name}.{name}"] for i in (0, 5))
            if site.name in report.details["frozen_layers"]:
                assert torch.equal(factor, before)
            else:
                assert float((factor - after).norm() / (after - before).norm()) < 1e-2
            moved.append((factor - before).flatten())
            expected.append((after - before).flatten())
    gap = torch.cat(moved) - torch.cat(expected)
    assert float(gap.norm() / torch.cat(expected).norm()) < 1e-3


# --- models with a teacher --------------------------------------------------------------------------------------------

WIDE = ("q_proj", "gate_proj", "down_proj")


def taught(case=LLAMA, dtype=torch.float64, targets=WIDE, **config):
    """A model with a fresh adapter and, beside it, one trained on the task as the teacher."""
    model = case.adapted(dtype, target_modules=list(targets), **config)
    with cases.seeded(5):
        model.add_adapter("teacher", case.lora_config(target_modules=list(targets), r=2))
    model.set_adapter("teacher")
    cases.train(model, case.batches(dtype), 15)
    model.set_adapter("default")
    return model


def factors(model, adapter="default") -> dict[str, tuple[Tensor, Tensor]]:
    return {s.name: tuple(f.clone() for f in s.factors()) for s in lorainit.find_sites(model, adapter)[0]}


def assert_close(one, other, atol=1e-10) -> None:
    assert one.keys() == other.keys()
    for name, pair in one.items():
        for a, b in zip(pair, other[name], strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=atol)


def started(method, model=None, data=None, **options):
    model = taught() if model is None else model
    report = cases.start(model, method, data=LLAMA.batches() * 2 if data is None else data, **options)
    return model, report


QUICK = {"steps": 6, "batch_size": 2, "learning_rate": 3e-3, "layers": "all"}

# --- exact properties -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", [LLAMA, GPT2, BERT, VIT], ids=lambda case: case.name)
@pytest.mark.parametrize("origin", ["kaiming", "orthogonal", "pissa"])
def test_a_student_that_computes_what_the_base_does_has_nothing_to_align(case, origin) -> None:
    method = {"origin": origin, "layers": "all", "batch_size": 3}
    for extra in ({"margin": 0.0}, {"margin_kind": "clipped"}, {"margin_kind": "clipped", "margin": 2.0}):
        model, other = case.adapted(torch.float64), case.adapted(torch.float64)
        report = cases.start(model, ABMLoRA(**method, **extra), data=case.batches(torch.float64))
        if origin == "orthogonal":  # BA = 0 up to rounding alone
            assert max(report.details["loss_curve"]) < 1e-12
            continue
        assert report.details["loss_curve"] == [0.0]
        assert report.details["before"]["train"]["agreement"] == 1
        assert "nothing to do" in report.warnings[0]
        cases.start(other, origin)
        assert_close(factors(model), factors(other), atol=0)
        assert torch.equal(
            cases.logits(model, case.batch(torch.float64)), cases.logits(other, case.batch(torch.float64))
        )


def test_a_self_match_costs_no_more_than_the_margin_allows() -> None:
    report = cases.start(LLAMA.adapted(), ABMLoRA(layers="all", steps=1), data=LLAMA.batches())
    weights = list(report.details["matching"]["sites"].values())
    assert weights == [0.25, 1.0]
    assert 0 < report.details["loss_curve"][0] <= 0.25 * sum(weights) / 2
    assert "only pushes pre-activations away from zero" in report.warnings[0]


def test_the_first_step_from_b_zero_leaves_a_and_moves_b_down_the_closed_gradient() -> None:
    model = taught(targets=("gate_proj",))
    gate = {s.name: s for s in lorainit.find_sites(model)[0]}["model.layers.1.mlp.gate_proj"]
    seen = {}
    handle = gate.layer.register_forward_hook(lambda _, i, o: seen.update(x=i[0].detach(), z=o.detach()))
    batch = {"input_ids": LLAMA.batches()[0]["input_ids"]}
    cases.start(model, "kaiming")
    A = gate.factors()[0].clone()
    for adapter in ("teacher", "default"):
        model.set_adapter(adapter)
        cases.logits(model, batch)
        seen[adapter] = seen["z"]
    handle.remove()
    # the student's input of layer 1 is the base's: B = 0 in layer 0 too
    sign = torch.where(seen["teacher"] > 0, 1.0, -1.0).to(torch.float64)
    g = -2 * sign * (0.5 - sign * seen["default"]).clamp(min=0) / sign.numel()
    expected = -0.1 * gate.scaling * g.flatten(0, 1).mT @ (seen["x"].flatten(0, 1) @ A.mT)
    method = ABMLoRA(teacher="teacher", optimizer="sgd", learning_rate=0.1, steps=1, layers=1)
    started(method, model, [batch])
    after_A, after_B = gate.factors()
    assert torch.equal(after_A, A)
    torch.testing.assert_close(after_B, expected, rtol=1e-9, atol=1e-12)


def test_the_symmetric_case_leaves_b_and_moves_a() -> None:
    model = taught(targets=("gate_proj",))
    for site in lorainit.find_sites(model)[0]:
        with torch.no_grad():
            site.lora_B.weight.normal_()
            site.lora_A.weight.zero_()
    before = factors(model)
    started(ABMLoRA(teacher="teacher", origin="keep", optimizer="sgd", steps=1, layers="all"), model)
    for name, (A, B) in factors(model).items():
        assert torch.equal(B, before[name][1])
        assert float(A.abs().max()) > 0


def test_adapters_that_no_site_can_see_keep_their_start_to_the_bit() -> None:
    model, report = started(ABMLoRA(teacher="teacher", **(QUICK | {"layers": "first 1"})))
    other = taught()
    cases.start(other, "kaiming")
    expected = [
        "model.layers.0.mlp.down_proj",
        *(f"model.layers.1.{n}" for n in ("self_attn.q_proj", "mlp.gate_proj", "mlp.down_proj")),
    ]
    assert sorted(report.details["frozen_layers"]) == sorted(expected)
    for name, pair in factors(model).items():
        same = all(torch.equal(a, b) for a, b in zip(pair, factors(other)[name], strict=True))
        assert same == (name in expected)


def test_the_base_the_teacher_and_every_switch_stay() -> None:
    model = taught()
    snapshot, teacher = cases.Snapshot.of(model), factors(model, "teacher")
    started(ABMLoRA(teacher="teacher", **QUICK), model)
    now = cases.Snapshot.of(model)
    assert now.rng == snapshot.rng
    assert {k: v for k, v in now.objects.items() if "config" not in k} == {
        k: v for k, v in snapshot.objects.items() if "config" not in k
    }
    own = [k for k in now.tensors if ".default." in k]
    assert own and all(torch.equal(now.tensors[k], v) for k, v in snapshot.tensors.items() if k not in own)
    assert_close(factors(model, "teacher"), teacher, atol=0)


def variants():
    yield "live", {"cache": False}
    yield "disk", {"cache_bytes": 0}
    yield "full", {"early_stop": False}


@pytest.mark.parametrize("kind", ["absolute", "relative", "clipped"])
@pytest.mark.parametrize(("name", "change"), variants(), ids=lambda v: v if isinstance(v, str) else "")
def test_a_stored_or_live_teacher_and_a_cut_or_full_pass_give_the_same_start(kind, name, change) -> None:
    options = {"teacher": "teacher", "margin_kind": kind, **QUICK}
    model, report = started(ABMLoRA(**options))
    other, changed = started(ABMLoRA(**options, **change))
    assert report.details["loss_curve"] == changed.details["loss_curve"]
    assert_close(factors(model), factors(other), atol=0)
    assert (
        changed.details["stored_bytes"]["disk"] > 0 if name == "disk" else changed.details["stored_bytes"]["disk"] == 0
    )
    assert (changed.details["teacher_passes"] > report.details["teacher_passes"]) == (name == "live")


def test_a_fixed_teacher_runs_once_a_batch() -> None:
    _, report = started(ABMLoRA(teacher="teacher", **(QUICK | {"steps": 20, "batch_size": 1})))
    rows = report.details["rows"]
    assert (rows["training_batches"], rows["held_out_batches"]) == (5, 1)
    assert report.details["teacher_passes"] == 6
    # one bit an entry: 2 sites × 24 units × 6 tokens × 6 rows, and the shapes
    assert report.details["stored_bytes"]["memory"] == 6 * 2 * (24 * 6 // 8 + 5 * 8)


def test_adapter_folder_and_second_model_are_the_same_teacher(tmp_path) -> None:
    model, report = started(ABMLoRA(teacher="teacher", **QUICK))
    source = taught()
    lorainit.save_pretrained(source, tmp_path / "plain", adapter_name="teacher")
    second = copy.deepcopy(source)
    second.set_adapter("teacher")
    for teacher in (str(tmp_path / "plain"), second):
        other = LLAMA.adapted(torch.float64, target_modules=list(WIDE))
        _, found = started(ABMLoRA(teacher=teacher, **QUICK), other)
        assert found.details["loss_curve"] == pytest.approx(report.details["loss_curve"], rel=1e-12)
        assert_close(factors(other), factors(model))
        assert json.loads(json.dumps(found.to_dict()))["options"]["teacher"] in (
            teacher,
            "PeftModelForCausalLM",
            "PeftModel",
        )


def test_a_folder_of_another_rank_on_other_layers_and_one_in_offset_form_teach_as_they_compute(tmp_path) -> None:
    source = LLAMA.adapted(torch.float64, target_modules=["v_proj", "up_proj"], r=3)
    cases.start(source, "pissa")
    cases.train(source, LLAMA.batches(), 10)
    lorainit.save_pretrained(source, tmp_path / "finished")
    source.save_pretrained(tmp_path / "training")
    curves = []
    for teacher in (tmp_path / "finished", tmp_path / "training", source):
        model = LLAMA.adapted(torch.float64, target_modules=list(WIDE))
        curves.append(started(ABMLoRA(teacher=teacher, **QUICK), model)[1].details["loss_curve"])
    assert curves[0] == pytest.approx(curves[2], rel=1e-12)
    assert curves[1] == pytest.approx(curves[2], rel=1e-12)


def test_folders_for_conv1d_and_convolutions_teach_as_they_compute(tmp_path) -> None:
    for case, targets in ((GPT2, ["c_attn", "c_fc"]), (cases.CONV, ["strided", "pointwise"])):
        source = case.adapted(torch.float64, target_modules=targets)
        cases.train(source, case.batches(torch.float64), 10)
        lorainit.save_pretrained(source, tmp_path / case.name)
        curves = []
        for teacher in (tmp_path / case.name, source):
            model = case.adapted(torch.float64)
            report = cases.start(model, ABMLoRA(teacher=teacher, **QUICK), data=case.batches(torch.float64))
            curves.append(report.details["loss_curve"])
        assert curves[0] == pytest.approx(curves[1], rel=1e-12)
        assert curves[0][0] > 1e-3


@pytest.mark.parametrize("side", ["left", "right"])
def test_padded_rows_start_as_unpadded_ones(side) -> None:
    ids = LLAMA.batches()[0]["input_ids"].clamp(min=1)
    rows = [ids[:1], ids[1:2, :4], ids[2:, :2]]
    padding = [torch.zeros(1, 6 - row.shape[1], dtype=torch.long) for row in rows]
    wide = [torch.cat((r, p) if side == "right" else (p, r), 1) for r, p in zip(rows, padding, strict=True)]
    padded = {"input_ids": torch.cat(wide), "attention_mask": (torch.cat(wide) != 0).long()}
    unpadded = [{"input_ids": row, "attention_mask": torch.ones_like(row)} for row in rows]
    for options in (QUICK, QUICK | {"batch_size": 3, "origin": "orthogonal"}):
        one, first = started(ABMLoRA(teacher="teacher", **options), data=[padded])
        other, second = started(ABMLoRA(teacher="teacher", **options), data=unpadded)
        assert first.details["loss_curve"] == second.details["loss_curve"]
        assert_close(factors(one), factors(other), atol=0)


def test_a_padded_batch_has_the_loss_of_its_rows() -> None:
    ids = LLAMA.batches()[0]["input_ids"].clamp(min=1)
    rows = [
        {"input_ids": ids[i : i + 1, :n], "attention_mask": torch.ones(1, n, dtype=torch.long)}
        for i, n in enumerate((6, 3, 1))
    ]
    together = started(ABMLoRA(teacher="teacher", steps=1, batch_size=3, layers="all"), data=rows)[1]
    alone = [
        started(ABMLoRA(teacher="teacher", steps=1, layers="all"), data=[row])[1].details["loss_curve"][0]
        for row in rows
    ]
    tokens = [6, 3, 1]
    expected = sum(n * loss for n, loss in zip(tokens, alone, strict=True)) / 10
    assert together.details["loss_curve"][0] == pytest.approx(expected, rel=1e-10)


def test_checkpointed_blocks_give_the_same_steps() -> None:
    model, report = started(ABMLoRA(teacher="teacher", **QUICK))
    for options in ({}, {"gradient_checkpointing_kwargs": {"use_reentrant": True}}):
        other = taught()
        other.gradient_checkpointing_enable(**options)
        snapshot = cases.Snapshot.of(other)
        _, found = started(ABMLoRA(teacher="teacher", **QUICK), other)
        assert found.details["loss_curve"] == pytest.approx(report.details["loss_curve"], rel=1e-12)
        assert_close(factors(other), factors(model))
        now = cases.Snapshot.of(other)
        assert all(now.objects[k] == v for k, v in snapshot.objects.items() if "config" not in k)


def test_an_origin_that_preserves_the_function_keeps_its_own_product_frozen(tmp_path) -> None:
    for origin in ("pissa", {"method": "lora-ga", "gamma": 4}, "lora-ga"):
        model, other = taught(), taught()
        _, report = started(ABMLoRA(teacher="teacher", origin=origin, **QUICK), model)
        assert {row.base for row in report.layers} == {"offset"}
        if not isinstance(origin, dict):
            cases.start(other, origin, data=LLAMA.batches() * 2)
            for site, twin in zip(lorainit.find_sites(model)[0], lorainit.find_sites(other)[0], strict=True):
                torch.testing.assert_close(site.lora_A.offset, twin.lora_A.offset, rtol=0, atol=1e-12)
        assert report.details["loss_curve"][-1] < report.details["loss_curve"][0]
        drifts = {s.name: descent.drift(s) for s in lorainit.find_sites(model)[0]}
        assert drifts == pytest.approx(report.details["drift"], rel=1e-9, abs=1e-12)
        assert max(drifts.values()) > 1e-3
        lorainit.save_pretrained(model, tmp_path / "adapter")
        from peft import PeftModel

        fresh = PeftModel.from_pretrained(LLAMA.base(torch.float64), tmp_path / "adapter")
        batch = LLAMA.batch()
        torch.testing.assert_close(cases.logits(fresh, batch), cases.logits(model, batch), rtol=1e-5, atol=1e-6)


def test_half_precision_adapters_train_in_single_and_are_rounded_once() -> None:
    model = LLAMA.adapted(torch.bfloat16, autocast=False)
    report = cases.start(model, ABMLoRA(steps=5, learning_rate=1e-5), data=LLAMA.batches(torch.bfloat16))
    assert all(p.dtype == torch.bfloat16 for n, p in model.named_parameters() if "lora_" in n)
    assert report.details["drift"]["model.layers.0.self_attn.q_proj"] > 0
    wide, _ = started(ABMLoRA(steps=5, autocast="bfloat16"), LLAMA.adapted())
    assert all(p.dtype == torch.float32 for p in wide.parameters())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_half_precision_base_moves_as_the_single_precision_one(dtype) -> None:
    method = ABMLoRA(steps=3, optimizer="sgd", learning_rate=1e-2, margin=2.0, layers="all")
    data = LLAMA.batches() * 10
    curves, moved = [], []
    for kind in (torch.float32, dtype):
        model = LLAMA.adapted(kind)
        report = cases.start(model, method, data=data)
        curves.append(report.details["loss_curve"])
        moved.append(torch.cat([B.flatten() for _, B in factors(model).values()]))
    assert curves[1] == pytest.approx(curves[0], rel=3e-2)
    assert float((moved[1] - moved[0]).norm() / moved[0].norm()) < (0.1 if dtype == torch.float16 else 0.3)


def test_train_mode_runs_the_students_dropout_from_the_seed_alone() -> None:
    case = dataclasses.replace(LLAMA, make=lambda: cases.llama(attention_dropout=0.5))
    curves = []
    for train_mode, seed, torch_seed in ((False, 0, 0), (True, 0, 0), (True, 0, 1), (True, 1, 0)):
        model = case.adapted()
        torch.manual_seed(torch_seed)
        rng = cases.rng_state()
        report = cases.start(
            model, ABMLoRA(train_mode=train_mode, **(QUICK | {"batch_size": 3})), data=case.batches(), seed=seed
        )
        assert cases.rng_state() == rng
        assert ("dropout" in str(report.warnings)) == train_mode
        curves.append(report.details["loss_curve"])
    assert curves[1] == curves[2]
    assert curves[1][0] > 1.5 * curves[0][0]  # dropout costs more than the margin
    assert curves[1] != curves[3]


# --- stop rules -------------------------------------------------------------------------------------------------------


def test_stop_rules_end_the_steps_and_say_so() -> None:
    base = {"teacher": "teacher", "layers": "all", "steps": 60, "batch_size": 6, "learning_rate": 1e-2}
    _, target = started(ABMLoRA(**base, agreement_target=0.3, margin=1.0))
    assert target.details["stopped"] == "agreement_target"
    assert target.details["steps"] < 60
    sites = target.details["after"]["train"]["sites"].values()
    assert min(s["agreement"] for s in sites) >= 0.3
    _, plateau = started(ABMLoRA(**(base | {"learning_rate": 1e-9}), plateau=4))
    assert (plateau.details["stopped"], plateau.details["steps"]) == ("plateau", 8)
    _, drift = started(ABMLoRA(**base, max_drift=0.05))
    assert drift.details["stopped"] == "max_drift"
    assert 0 < max(drift.details["drift"].values()) <= 0.05
    _, kl = started(ABMLoRA(**(base | {"learning_rate": 3e-2}), max_kl=1e-3))
    assert kl.details["stopped"] == "max_kl"
    assert kl.details["steps"] in (10, 20, 30)
    _, everything = started(ABMLoRA(**(base | {"steps": 3})))
    assert (everything.details["stopped"], everything.details["steps"]) == ("steps", 3)


def test_a_kl_guard_that_is_passed_goes_back_to_the_last_checked_factors() -> None:
    base = {"teacher": "teacher", "layers": "all", "batch_size": 6, "learning_rate": 3e-2}
    model, report = started(ABMLoRA(**base, steps=10, max_kl=1e-9))
    other = taught()
    cases.start(other, "kaiming")
    assert report.details["stopped"] == "max_kl"
    assert_close(factors(model), factors(other), atol=0)


# --- the report -------------------------------------------------------------------------------------------------------


def test_the_report_tells_before_and_after_on_training_and_held_out_rows() -> None:
    _, report = started(ABMLoRA(teacher="teacher", **(QUICK | {"steps": 40, "learning_rate": 1e-2})))
    before, after = report.details["before"], report.details["after"]
    assert before["train"]["agreement"] < after["train"]["agreement"] <= 1
    for part in (before, after):
        assert part["task_loss"] > 0
        for site in (*part["train"]["sites"].values(), *part["held_out"]["sites"].values()):
            assert 0 <= site["agreement"] <= 1 and 0 <= site["active_hinges"] <= 1
            assert 1 - site["agreement"] <= abm.certificate(site["loss"], 0.5)
    assert after["train"]["loss"] < before["train"]["loss"]
    assert all(v > 0 for v in report.details["drift"].values() if v)
    sizes = {row.name: row.relative_size for row in report.layers}
    assert sizes == pytest.approx(report.details["drift"], rel=1e-6)
    again = lorainit.InitReport.from_dict(json.loads(json.dumps(report.to_dict())))
    assert again.details == json.loads(json.dumps(report.details))


def test_data_without_labels_are_enough() -> None:
    _, report = started(ABMLoRA(teacher="teacher", **QUICK), data=[LLAMA.batch()] * 2)
    assert report.details["after"]["task_loss"] is None
    _, silent = started(ABMLoRA(teacher="teacher", report_batches=0, **QUICK))
    assert silent.details["before"] == {}


def test_mse_distils_the_pre_activations_themselves() -> None:
    options = {
        "teacher": "teacher",
        "loss": "mse",
        "layers": "all",
        "steps": 40,
        "learning_rate": 1e-2,
        "batch_size": 6,
    }
    _, report = started(ABMLoRA(**options))
    curve = report.details["loss_curve"]
    assert curve[-1] < 0.5 * curve[0]
    assert report.details["after"]["train"]["agreement"] > report.details["before"]["train"]["agreement"]


# --- errors, and the model afterwards ---------------------------------------------------------------------------------


def other_base(tmp_path, **sizes) -> str:
    source = get_peft_model(cases.llama(**sizes), LLAMA.lora_config(target_modules=["gate_proj"]))
    lorainit.save_pretrained(source, tmp_path / "other")
    return str(tmp_path / "other")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"sites": "no_such_proj"}, "no matched site"),
        (
            {"teacher": "nobody"},
            r"neither 'base', nor an adapter on this model \(\['default', 'teacher'\]\), nor a folder",
        ),
        ({"teacher": "default"}, "is the adapter that is to be started"),
        ({"teacher": {"intermediate_size": 20}}, "another base: layer 'model.layers.0.mlp.gate_proj'"),
        ({"teacher": {"num_hidden_layers": 3}}, "another base: this model has no module 'model.layers.2"),
        (
            {"teacher": lambda: cases.llama(intermediate_size=20).double()},
            "student's output has shape .*24.*teacher's .*20",
        ),
        ({"teacher": cases.gpt2}, "has no module 'model.layers.0.mlp.gate_proj'"),
        ({"learning_rate": 1e200, "steps": 5}, "stage 1, step 1: the boundary loss is (nan|inf)"),
        ({"origin": "eva", "max_kl": 1e-9, "learning_rate": 1e300}, "boundary loss|not finite"),
    ],
    ids=lambda v: " ".join(v) if isinstance(v, dict) else "",
)
def test_what_cannot_be_is_one_clear_error_and_the_model_is_as_before(tmp_path, options, message) -> None:
    model = taught()
    options = {"teacher": "teacher"} | options
    if callable(options["teacher"]):
        options["teacher"] = options["teacher"]()
    if isinstance(options["teacher"], dict):
        options["teacher"] = other_base(tmp_path, **options["teacher"])
    snapshot = cases.Snapshot.of(model)
    with pytest.raises(LoraInitError, match=message):
        started(ABMLoRA(**(QUICK | options)), model)
    snapshot.assert_unchanged(model)


def test_without_an_adapter_upstream_of_a_site_there_is_nothing_to_train() -> None:
    model = LLAMA.adapted(target_modules=["down_proj"], layers_to_transform=[1])
    snapshot = cases.Snapshot.of(model)
    with pytest.raises(
        LoraInitError, match="no adapter lies upstream of any matched site: .*model.layers.1.mlp.down_proj"
    ):
        started(ABMLoRA(**QUICK), model)
    snapshot.assert_unchanged(model)


def test_nan_in_the_data_is_named() -> None:
    model = VIT.adapted()
    snapshot = cases.Snapshot.of(model)
    broken = {"pixel_values": VIT.batch()["pixel_values"] * math.nan}
    layer = r"'vit\.(layers\.0\.mlp\.fc1|encoder\.layer\.0\.intermediate\.dense)'"  # Transformers 5, and before
    with pytest.raises(NonFiniteError, match=rf"training batch 0 \(step 0\): .* at {layer} holds NaN"):
        cases.start(model, ABMLoRA(report_batches=0), data=[broken])
    snapshot.assert_unchanged(model)


@pytest.mark.parametrize("layer", ["gate_proj", "q_proj"])  # attention may swallow the NaN of a query
@pytest.mark.parametrize("kind", ["adapter", "folder", "model"])
def test_a_teacher_with_nan_is_an_error_that_names_the_layer(tmp_path, kind, layer) -> None:
    model = taught()
    source = copy.deepcopy(model)
    for network in (model, source):
        broken = {s.name: s for s in lorainit.find_sites(network, "teacher")[0]}[
            f"model.layers.0.{'mlp' if layer == 'gate_proj' else 'self_attn'}.{layer}"
        ]
        with torch.no_grad():
            broken.lora_A.weight[0, 0] = math.nan
    source.set_adapter("teacher")
    source.save_pretrained(tmp_path, selected_adapters=["teacher"])
    teacher = {"adapter": "teacher", "folder": tmp_path / "teacher", "model": source}[kind]
    if (kind, layer) == ("model", "q_proj"):
        pytest.skip("what another model computes is all that is known of it")
    snapshot = cases.Snapshot.of(model)
    with pytest.raises(NonFiniteError, match=rf"teacher.*'model\.layers\.0\.\w+\.{layer}' holds NaN"):
        started(ABMLoRA(teacher=teacher, **QUICK), model)
    snapshot.assert_unchanged(model)


def test_the_base_that_peft_has_wrapped_is_no_teacher() -> None:
    base = LLAMA.base()
    model = get_peft_model(base, LLAMA.lora_config())
    for teacher in (base, model):
        with pytest.raises(LoraInitError, match="is the model that is being started.*use teacher='base'"):
            cases.start(model, ABMLoRA(teacher=teacher, **QUICK), data=LLAMA.batches())


def test_an_adapter_that_is_called_base_leaves_no_doubt_who_teaches() -> None:
    model = taught()
    model.add_adapter("base", LLAMA.lora_config())
    with pytest.raises(LoraInitError, match="could be the base model or this model's adapter named 'base'"):
        started(ABMLoRA(**QUICK), model)
    assert started(ABMLoRA(**QUICK), model, adapter_name="base")[1].details["teacher"] == "base"


def test_a_teacher_that_adapts_nothing_before_the_last_site_is_the_base_and_says_so(tmp_path) -> None:
    model = taught()
    model.add_adapter("late", LLAMA.lora_config(target_modules=["lm_head"]))
    model.save_pretrained(tmp_path, selected_adapters=["late"])
    for teacher in ("late", tmp_path / "late"):
        _, report = started(ABMLoRA(teacher=teacher, **QUICK), model)
        assert "adapts no layer that runs before the last matched site" in " ".join(report.warnings)
    assert "adapts no layer" not in " ".join(started(ABMLoRA(teacher="teacher", **QUICK))[1].warnings)


def test_the_adapter_as_it_is_cannot_lose_what_its_start_froze() -> None:
    model = taught()
    cases.start(model, "pissa")
    snapshot = cases.Snapshot.of(model)
    with pytest.raises(LoraInitError, match=r"layer 'model.layers.0.self_attn.q_proj': origin='keep' would drop"):
        started(ABMLoRA(teacher="teacher", origin="keep", **QUICK), model)
    snapshot.assert_unchanged(model)
    started(ABMLoRA(teacher="teacher", origin="kaiming", **QUICK), model)


@pytest.mark.parametrize("guard", [{"max_drift": 1e-6}, {"max_kl": 1e-12}], ids=lambda guard: next(iter(guard)))
def test_a_start_that_matches_already_and_is_past_a_guard_stays(guard) -> None:
    model = taught(r=2)
    taken = {s.name: s.factors() for s in lorainit.find_sites(model, "teacher")[0]}
    for site in lorainit.find_sites(model)[0]:
        with torch.no_grad():
            for module, factor in zip((site.lora_A, site.lora_B), taken[site.name], strict=True):
                module.weight.copy_(factor)
    before = factors(model)
    method = ABMLoRA(teacher="teacher", origin="keep", margin_kind="clipped", **(QUICK | {"batch_size": 1}), **guard)
    _, report = started(dataclasses.replace(method, steps=12), model, data=LLAMA.batches() * 6)
    assert set(report.details["loss_curve"]) == {0.0}
    assert report.details["stopped"] == next(iter(guard))
    assert_close(factors(model), before, atol=0)


def test_the_callers_no_grad_does_not_reach_the_training() -> None:
    model, report = started(ABMLoRA(teacher="teacher", **QUICK))
    twin = taught()
    with torch.no_grad():
        other, found = started(ABMLoRA(teacher="teacher", **QUICK), twin)
        assert not torch.is_grad_enabled()
    assert found.details["loss_curve"] == report.details["loss_curve"]
    assert_close(factors(other), factors(model), atol=0)


@pytest.mark.parametrize("where", ["teacher_outputs", "losses", "scores", "on_device"])
@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
@pytest.mark.parametrize("solver", ["gradient", "local"])
def test_ctrl_c_and_failures_leave_the_model_as_it_was(monkeypatch, where, error, solver) -> None:
    model = taught()
    model.train()
    model.gradient_checkpointing_enable()
    snapshot = cases.Snapshot.of(model)
    original, calls = getattr(stage.Stage, where), []

    def fails(self, *args, **kwargs):
        result = original(self, *args, **kwargs)
        calls.append(where)
        if len(calls) == 2:
            raise error
        return result

    monkeypatch.setattr(stage.Stage, where, fails)
    if (where, solver) == ("losses", "local"):
        pytest.skip("the local solver has no backward pass")
    with pytest.raises(error):
        started(ABMLoRA(teacher="teacher", origin="pissa", solver=solver, **QUICK), model)
    snapshot.assert_unchanged(model)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"weights": "cubic"}, "weights='cubic' is not one of"),
        ({"layers": "some"}, "layers='some' is none of"),
        ({"layers": 0}, "at least 1"),
        ({"layers": 1.5}, "as a fraction"),
        ({"layers": []}, "must list"),
        ({"margin": -1}, "margin must be at least 0"),
        ({"steps": 0}, "steps must be positive"),
        ({"steps": 2.5}, "steps must be an integer, got 2.5"),
        ({"samples": None}, "samples must be an integer, got None"),
        ({"learning_rate": "3e-4"}, "learning_rate must be a number, got '3e-4'"),
        ({"teacher": ""}, "teacher is empty"),
        ({"origin": "abm"}, "short training itself"),
        ({"origin": "piss"}, "did you mean 'pissa'"),
        ({"origin": {"gain": 1}}, "names no 'method'"),
        ({"agreement_target": 0.9, "margin_kind": "clipped"}, "needs a certificate"),
        ({"agreement_target": 1.9}, "at most 1"),
        ({"solver": "local", "loss": "mse"}, "works on the hinge"),
    ],
    ids=lambda v: " ".join(v) if isinstance(v, dict) else "",
)
def test_wrong_options_are_refused_when_the_method_is_made(options, message) -> None:
    with pytest.raises(LoraInitError, match=message):
        lorainit.get_method("abm", **options)
