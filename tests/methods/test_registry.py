"""The registry, and what holds for every method that needs no data."""

from __future__ import annotations

import dataclasses
import importlib
import sys
import typing

import pytest
import torch

import lorainit
from lorainit import Factors, LoraInitError, Method, MethodInfo, available, catalog, get_method, methods, register
from lorainit.methods import registry
from lorainit.methods.method import Product
from lorainit.numerics.linalg import product_norm
from matrices import decaying

NAMES = {
    "kaiming": lorainit.Kaiming,
    "gaussian": lorainit.Gaussian,
    "orthogonal": lorainit.Orthogonal,
    "init-ab": lorainit.InitAB,
    "pissa": lorainit.PiSSA,
    "milora": lorainit.MiLoRA,
    "olora": lorainit.OLoRA,
    "loram": lorainit.LoRAM,
    "loftq": lorainit.LoftQ,
}
DATA_FREE = [info for info in available() if not info.needs]
data_free = pytest.mark.parametrize("info", DATA_FREE, ids=lambda info: info.name)


@pytest.fixture
def registered(monkeypatch) -> None:
    """Forget what the test registers."""
    monkeypatch.setattr(registry, "_METHODS", dict(registry._METHODS))


def start(self, site, generator):
    return Factors(torch.zeros(site.rank, site.in_features), torch.zeros(site.out_features, site.rank))


def make(name: str, *aliases: str, class_name: str = "Mine") -> type[Method]:
    """Return a new method class with one option."""
    info = MethodInfo(name=name, aliases=aliases, summary="s", paper="p", product="zero")
    return dataclasses.make_dataclass(
        class_name, [("strength", float, 1.0)], bases=(Method,), namespace={"info": info, "start": start}, frozen=True
    )


# --- names ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "cls"), NAMES.items(), ids=NAMES)
def test_name_gives_the_method_with_its_defaults(name, cls):
    assert get_method(name) == cls()
    assert get_method(name.upper()) == cls()
    assert getattr(lorainit, cls.__name__) is cls


def test_every_alias_gives_the_same_class():
    for info in available():
        for alias in info.aliases:
            assert type(get_method(alias)) is type(get_method(info.name))


def test_available_lists_every_method_once():
    names = [info.name for info in available()]
    assert set(NAMES) <= set(names)
    assert len(set(names)) == len(names)


@pytest.mark.parametrize("info", available(), ids=lambda info: info.name)
def test_info_says_what_a_user_has_to_know(info):
    assert info.summary and info.paper
    assert info.product in typing.get_args(Product)
    assert set(info.needs) <= {"forward", "backward", "training", "weights"}
    assert info.status in ("paper", "reconstruction")


def test_method_object_passes_through():
    method = lorainit.PiSSA(exact=True)
    assert get_method(method) is method


def test_options_reach_the_method():
    assert get_method("pissa", exact=True, oversample=3) == lorainit.PiSSA(exact=True, oversample=3)


@pytest.mark.parametrize(
    ("method", "options", "message"),
    [
        pytest.param("pisa", {}, "unknown method 'pisa'; did you mean .*'pissa'", id="near-miss"),
        pytest.param("LORAMM", {}, "unknown method 'LORAMM'; did you mean .*'loram'", id="near-miss-in-capitals"),
        pytest.param("xyzzy", {}, "unknown method 'xyzzy'; known: kaiming, .*loram", id="far-off-lists-all"),
        pytest.param("", {}, "unknown method ''; known: kaiming", id="empty"),
        pytest.param(3, {}, "a name or a lorainit method object, got 3", id="number"),
        pytest.param(lorainit.PiSSA, {}, "a name or a lorainit method object, got .*PiSSA", id="class-not-object"),
        pytest.param("pissa", {"exakt": 1}, r"'pissa' has no option \['exakt'\]; its options: \['exact'", id="option"),
        pytest.param("kaiming", {"gain": 1}, r"'kaiming' has no option \['gain'\]; its options: \[\]", id="no-options"),
        pytest.param("pissa", {"oversample": "3"}, "method 'pissa': '<' not supported", id="wrong-type"),
        pytest.param("init-ab", {"c_a": 0.0}, "method 'init-ab': c_a and c_b must be positive", id="wrong-value"),
        pytest.param(lorainit.PiSSA(), {"exact": True}, r"options \['exact'\] .* ready PiSSA", id="object-and-options"),
    ],
)
def test_wrong_request_says_what_is_wrong(method, options, message):
    with pytest.raises(LoraInitError, match=message):
        get_method(method, **options)


# --- registration -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["mine", "MyStart"])
def test_registered_method_is_found_by_name_and_alias_in_any_case(registered, name):
    cls = make(name, "My-Alias")
    assert register(cls) is cls
    assert register(cls) is cls  # once more changes nothing
    for request in (name, name.lower(), name.upper(), "my-alias", "My-Alias"):
        assert get_method(request, strength=2.0) == cls(strength=2.0)
    assert [info.name for info in available()].count(name) == 1


@pytest.mark.parametrize(
    "cls",
    [make("pissa"), make("PiSSA"), make("fresh", "vanilla"), make("fresh", "loram")],
    ids=["name", "name-in-capitals", "alias-is-an-alias", "alias-is-a-name"],
)
def test_taken_names_are_refused_and_nothing_is_registered(registered, cls):
    before = available()
    with pytest.raises(ValueError, match="already belongs to"):
        register(cls)
    assert available() == before
    with pytest.raises(LoraInitError, match="unknown method 'fresh'"):
        get_method("fresh")


MINE = """
import dataclasses
from typing import ClassVar

from ..adapter.factors import Factors
from .method import Method, MethodInfo
from .registry import register


@register
@dataclasses.dataclass(frozen=True)
class MineToo(Method):
    info: ClassVar = MethodInfo(name="mine-too", summary="s", paper="p", product="zero")

    def start(self, site, generator):
        return Factors(site.weight()[: site.rank], site.weight().new_zeros(site.out_features, site.rank))
"""


def test_a_new_built_in_method_is_one_file(registered, tmp_path, monkeypatch):
    (tmp_path / "mine_too.py").write_text(MINE)
    monkeypatch.setattr(methods, "__path__", [*methods.__path__, str(tmp_path)])
    importlib.invalidate_caches()
    try:
        registry.discover(methods.__name__, methods.__path__)
        method = get_method("mine-too")
        assert available()[-1] == method.info == catalog.builtin(tmp_path)[0]
        assert lorainit.MineToo is type(method)
        assert "MineToo" in dir(lorainit)
        assert methods.mine_too.MineToo is type(method)
    finally:
        sys.modules.pop("lorainit.methods.mine_too", None)
        for module, name in ((methods, "mine_too"), (lorainit, "MineToo")):
            vars(module).pop(name, None)


class Undecorated(Method):
    info = MethodInfo(name="undecorated", summary="s", paper="p", product="zero")
    strength: float = 1.0  # without the decorator this is no option
    start = start


@dataclasses.dataclass(frozen=True)
class Uninformed(Method):
    start = start


@dataclasses.dataclass(frozen=True)
class NoMethod:
    info = MethodInfo(name="no-method", summary="s", paper="p", product="zero")


@pytest.mark.parametrize(
    ("cls", "message"),
    [
        (Undecorated, "must be a frozen dataclass"),
        (NoMethod, "subclasses lorainit.Method"),
        (lorainit.PiSSA(), "must be a frozen dataclass"),
        (Uninformed, "Uninformed needs a class attribute `info`"),
    ],
    ids=["undecorated", "no-method", "object", "no-info"],
)
def test_what_is_no_method_class_is_refused(registered, cls, message):
    with pytest.raises(TypeError, match=message):
        register(cls)


# --- every data-free method -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("info", available(), ids=lambda info: info.name)
def test_methods_are_frozen(info):
    method = get_method(info.name)
    with pytest.raises(dataclasses.FrozenInstanceError):
        method.anything = 1
    assert hash(method) == hash(get_method(info.name))


@data_free
@pytest.mark.parametrize(("out", "in_"), [(30, 20), (20, 30), (24, 24)], ids=["tall", "wide", "square"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_start_has_the_layers_shape_is_finite_and_leaves_the_weight(site, generator, info, out, in_, dtype):
    layer = site(decaying(out, in_, 0.5).to(dtype), 4, alpha=8)
    before = layer.stored_weight().clone()
    A, B = get_method(info.name).start(layer, generator)
    assert (A.shape, B.shape) == ((4, in_), (out, 4))
    assert A.dtype == B.dtype == torch.float32
    assert bool(A.isfinite().all()) and bool(B.isfinite().all())
    assert bool(A.any())  # with A = 0 and B = 0 nothing would ever train
    assert torch.equal(layer.stored_weight(), before)


@data_free
def test_global_random_state_is_neither_read_nor_moved(site, info):
    layer = site(decaying(30, 20, 0.5).float(), 4)
    starts = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        before = torch.get_rng_state()
        starts.append(get_method(info.name).start(layer, torch.Generator().manual_seed(0)))
        assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(starts[0].A, starts[1].A) and torch.equal(starts[0].B, starts[1].B)


@data_free
def test_seed_matters_exactly_where_info_says_so(site, info):
    layer = site(decaying(30, 20, 0.5).float(), 4)
    first, second = (get_method(info.name).start(layer, torch.Generator().manual_seed(s)).A for s in (0, 1))
    assert torch.equal(first, second) is info.deterministic


@data_free
def test_product_is_what_info_says(site, generator, info):
    A, B = get_method(info.name).start(site(decaying(30, 20, 0.5).float(), 4), generator)
    relative = product_norm(A, B) / max(float(A.norm() * B.norm()), 1e-30)
    if info.product == "zero":
        assert relative <= 1e-6
    else:
        assert relative >= 1e-2
