"""Ranks that layers share out on a live model: what changes, what stays, what is saved, what comes back."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from peft import PeftModel

import cases
import lorainit
from cases import CASES, CONV, GPT2, LLAMA, TWIN
from lorainit import LoraInitError, RankRule
from lorainit.adapter import offset
from lorainit.adapter.rank import resize
from lorainit.adapter.sites import find_sites
from lorainit.adapter.undo import Undo

SPECTRAL = [info.name for info in lorainit.available() if info.variable_ranks]
OTHERS = [*(info.name for info in lorainit.available() if not info.variable_ranks), lorainit.CorDA(mode="kpm")]
each_method = pytest.mark.parametrize("method", SPECTRAL)
each_case = pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)


def ranks(model, adapter="default"):
    return {site.name: site.rank for site in find_sites(model, adapter)[0]}


def scalings(model):
    return {site.name: site.scaling for site in find_sites(model)[0]}


def emptied(case, name, **config):
    """A model in which one layer's weight has a flat spectrum, so that the others' components are worth more."""
    model = case.adapted(**config)
    for site in find_sites(model)[0]:
        weight = site.base_layer.weight.data
        if site.name == name:
            torch.nn.init.eye_(weight)
        else:
            weight.zero_()
            weight[:2, :2] = torch.tensor([[1.0, 0.2], [-0.1, 0.9]])
    return model


def test_every_spectral_method_shares_ranks():
    assert SPECTRAL == ["pissa", "lora-da", "cntlora", "eva", "corda", "lora-ga", "lora-one", "ag-lora"]


@each_case
@each_method
def test_the_sum_and_the_scalings_stay_and_the_saved_adapter_is_right(method, case, tmp_path):
    model = case.adapted(r=2, lora_alpha=3)
    before, scaled = ranks(model), scalings(model)
    report = cases.start(model, method, data=case.batches(), ranks="budget")
    after = ranks(model)
    assert sum(after.values()) == sum(before.values())
    assert all(rank <= 2 * before[name] for name, rank in after.items())
    assert {name: scaled[name] for name in after} == pytest.approx(scalings(model))
    assert {row.name: row.rank for row in report.layers} == dict.fromkeys(before, 0) | after
    assert report.ranks == dataclasses.asdict(RankRule("budget"))
    for site in find_sites(model)[0]:
        A, B = site.factors()
        assert (A.shape, B.shape) == ((site.rank, site.in_features), (site.out_features, site.rank))
    cases.train(model, case.batches())
    lorainit.save_pretrained(model, tmp_path)
    again = PeftModel.from_pretrained(case.base(), tmp_path).eval()
    assert cases.relative_difference(cases.logits(again, case.batch()), cases.logits(model, case.batch())) < 1e-5


@each_method
def test_ranks_differ_where_spectra_do_and_the_config_says_it(method):
    model = LLAMA.adapted(r=3, lora_alpha=6)
    cases.start(model, method, data=LLAMA.batches(), ranks="budget")
    assert len(set(ranks(model).values())) > 1
    config = model.peft_config["default"]
    # PEFT builds the same adapter from the live config's own patterns
    rebuilt = cases.get_peft_model(
        LLAMA.base(),
        LLAMA.lora_config(
            r=3,
            lora_alpha=6,
            rank_pattern=config.rank_pattern,
            alpha_pattern=config.alpha_pattern,
            exclude_modules=config.exclude_modules,
        ),
    )
    assert ranks(rebuilt) == ranks(model)
    assert scalings(rebuilt) == pytest.approx(scalings(model))


@pytest.mark.parametrize("rslora", [False, True])
def test_a_layer_with_rank_0_is_again_the_base_s_own(rslora, tmp_path):
    name = "encoder.layers.0.q"
    model = emptied(TWIN, name, r=1, lora_alpha=3, use_rslora=rslora)
    scaled = scalings(model)
    report = cases.start(model, "pissa", ranks="budget")
    assert name not in ranks(model)
    assert "layers.0.q" in ranks(model)  # whose name is a suffix of the other's
    assert type(model.get_submodule(f"base_model.model.{name}")) is torch.nn.Linear
    row = next(row for row in report.layers if row.name == name)
    assert (row.rank, row.base) == (0, "none")
    assert "rank 0" in row.warnings[0]
    assert "rank 0" in str(report)
    assert scalings(model) == pytest.approx({k: v for k, v in scaled.items() if k != name})
    before = cases.logits(model, TWIN.batch())
    lorainit.save_pretrained(model, tmp_path / "saved")
    model.save_pretrained(tmp_path / "checkpoint")
    lorainit.export(tmp_path / "checkpoint", tmp_path / "exported")
    for folder in ("saved", "exported", "checkpoint"):
        base = emptied(TWIN, name, r=1).unload()
        again = PeftModel.from_pretrained(base, tmp_path / folder).eval()
        assert name not in ranks(again)
        assert cases.relative_difference(cases.logits(again, TWIN.batch()), before) < 1e-5


def test_another_adapter_on_a_layer_that_loses_one_stays():
    name = "encoder.layers.0.q"
    model = emptied(TWIN, name, r=1)
    model.add_adapter("other", TWIN.lora_config())
    cases.start(model, "pissa", ranks="budget")
    layer = model.get_submodule(f"base_model.model.{name}")
    assert "default" not in layer.lora_A
    assert "other" in layer.lora_A
    assert name in ranks(model, "other")
    cases.logits(model, TWIN.batch())


def test_one_of_two_dora_adapters_leaves_a_layer_and_comes_back_on_failure():
    model = TWIN.adapted(use_dora=True)
    model.add_adapter("other", TWIN.lora_config(use_dora=True))
    sites, undo = find_sites(model)[0], Undo()
    tables = [sites[0].layer.lora_A, sites[0].layer.lora_magnitude_vector]
    resize(model, sites, {site.name: site.rank for site in sites} | {sites[0].name: 0}, undo)
    assert [list(table) for table in tables] == [["other"], ["other"]]
    undo.restore()
    assert [list(table) for table in tables] == [["default", "other"], ["default", "other"]]


def test_excluded_modules_of_the_config_stay_excluded(tmp_path):
    name = "encoder.layers.0.q"
    model = emptied(TWIN, name, r=1, exclude_modules=["layers.1.v"])
    cases.start(model, "pissa", ranks="budget")
    lorainit.save_pretrained(model, tmp_path)
    again = PeftModel.from_pretrained(TWIN.base(), tmp_path)
    assert ranks(again).keys() == ranks(model).keys()


@pytest.mark.parametrize("case", [LLAMA, GPT2, CONV], ids=lambda case: case.name)
@pytest.mark.parametrize("method", ["pissa", "eva"])
def test_a_checkpoint_comes_back_with_its_ranks(method, case, tmp_path):
    model = case.adapted(r=2)
    cases.start(model, method, data=case.batches(), ranks=RankRule("budget", rho=3.0))
    cases.train(model, case.batches())
    model.save_pretrained(tmp_path)
    again = case.adapted(r=2)
    lorainit.load(again, tmp_path)
    assert ranks(again) == ranks(model)
    assert torch.equal(cases.logits(again, case.batch()), cases.logits(model, case.batch()))
    for site, other in zip(find_sites(model)[0], find_sites(again)[0], strict=True):
        assert torch.equal(offset.trained_factor(site.lora_A), offset.trained_factor(other.lora_A))


@pytest.mark.parametrize("rule", ["budget", "cost", "energy"])
def test_a_memory_budget_gives_the_same_ranks(rule):
    found = []
    for budget in (None, 14000):
        model = LLAMA.adapted(r=2)
        cases.start(model, "eva", data=LLAMA.batches(), ranks=rule, memory_budget=budget)
        found.append((ranks(model), cases.logits(model, LLAMA.batch())))
    assert found[0][0] == found[1][0]
    torch.testing.assert_close(*(output for _, output in found))


def test_equal_spectra_give_equal_ranks():
    model = TWIN.adapted(r=2)
    for site in find_sites(model)[0]:
        torch.nn.init.eye_(site.base_layer.weight.data)
    cases.start(model, "pissa", ranks="budget")
    assert set(ranks(model).values()) == {2}


def test_an_offset_adapter_can_be_started_again_with_shared_ranks():
    model = LLAMA.adapted(r=2)
    before = cases.logits(model, LLAMA.batch())
    cases.start(model, "pissa")
    cases.start(model, "pissa", ranks="budget")
    assert len(set(ranks(model).values())) > 1
    assert torch.equal(cases.logits(model, LLAMA.batch()), before)


@pytest.mark.parametrize("at", [0, 2])
@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError], ids=lambda error: error.__name__)
def test_a_failure_gives_every_layer_its_rank_and_its_adapter_back(at, error):
    name = "encoder.layers.0.q"
    model = emptied(TWIN, name, r=1)
    model.add_adapter("other", TWIN.lora_config(target_modules=["q"]))
    snapshot = cases.Snapshot.of(model)

    @dataclasses.dataclass(frozen=True)
    class Failing(lorainit.PiSSA):
        def start(self, site, generator):
            if site.name == f"{'encoder.' if at == 0 else ''}layers.{at // 2}.v":
                raise error
            return super().start(site, generator)

    with pytest.raises(error):
        cases.start(model, Failing(), ranks="budget")
    snapshot.assert_unchanged(model)


def test_the_config_that_the_user_holds_stays_for_other_models():
    config = LLAMA.lora_config(r=3)
    model, other = (cases.get_peft_model(LLAMA.base(), config) for _ in range(2))
    before = config.to_dict()
    cases.start(model, "pissa", ranks="budget")
    assert len(set(ranks(model).values())) > 1
    assert config.to_dict() == before
    assert other.peft_config["default"] is config


@pytest.mark.parametrize("method", OTHERS, ids=str)
def test_a_method_without_components_says_so_before_it_touches_anything(method):
    model = LLAMA.adapted(r=2)
    snapshot = cases.Snapshot.of(model)
    with pytest.raises(LoraInitError, match="ranks='fixed' is the only rule"):
        cases.start(model, method, data=LLAMA.batches(), ranks="budget")
    snapshot.assert_unchanged(model)


@pytest.mark.parametrize("wrong", ["most", RankRule("energy", minimum=0, threshold=1e-9, rho=1)], ids=["name", "none"])
def test_wrong_rules_are_refused(wrong):
    model = TWIN.adapted(r=1)
    if wrong != "most":
        for site in find_sites(model)[0]:
            site.base_layer.weight.data.fill_(0)
        with pytest.raises(LoraInitError, match="no layer would keep its adapter"):
            cases.start(model, "pissa", ranks=wrong)
        return
    with pytest.raises(LoraInitError, match="is not one of"):
        cases.start(model, "pissa", ranks=wrong)


def test_lora_ga_never_gets_more_than_half_of_the_gradient_s_directions():
    model = LLAMA.adapted(r=6)
    cases.start(model, "lora-ga", data=LLAMA.batches(), ranks=RankRule("budget", rho=4.0))
    for site in find_sites(model)[0]:
        assert 2 * site.rank <= min(site.in_features, site.out_features)


def test_a_layer_that_cannot_be_started_keeps_its_rank():
    case = dataclasses.replace(LLAMA, targets=("q_proj", "embed_tokens"))
    model = case.adapted(r=2)
    with pytest.warns(UserWarning, match="embed_tokens"):
        cases.start(model, "eva", data=case.batches(), ranks="budget", on_unsupported="default")
    assert model.base_model.model.model.embed_tokens.r["default"] == 2
