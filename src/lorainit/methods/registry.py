"""The methods by name. Each file of a method registers its own class; none of them is imported here."""

from __future__ import annotations

import dataclasses
import difflib
import importlib
import os
import pkgutil
import re
import sys
from collections.abc import Iterable
from typing import Any, TypeVar

from ..catalog import MethodInfo, in_order
from ..errors import LoraInitError
from .method import Method

M = TypeVar("M", bound=Method)

_METHODS: dict[str, type[Method]] = {}


def register(cls: type[M]) -> type[M]:
    """Add a method to the registry; usable as a class decorator.

    The class is a frozen dataclass that subclasses `Method` and carries a `MethodInfo` as ``info``. From then on its
    name works in `initialize`, in recipes and on the command line.

    Raises:
        TypeError: not such a class.
        ValueError: its name or one of its aliases is taken by another class.
    """
    # not dataclasses.is_dataclass: a subclass that lacks the decorator inherits the mark, but its fields are no options
    if not (isinstance(cls, type) and issubclass(cls, Method) and "__dataclass_fields__" in vars(cls)):
        raise TypeError(f"{cls!r} must be a frozen dataclass that subclasses lorainit.Method")
    if not isinstance(getattr(cls, "info", None), MethodInfo):
        raise TypeError(f"{cls.__name__} needs a class attribute `info` of type lorainit.MethodInfo")
    names = [name.lower() for name in (cls.info.name, *cls.info.aliases)]
    for name in names:
        if _METHODS.get(name, cls) is not cls:
            raise ValueError(f"the name '{name}' already belongs to {_METHODS[name].__name__}")
    for name in names:
        _METHODS[name] = cls
    return cls


def discover(package: str, folders: Iterable[str]) -> None:
    """Import every module of a package, so that each of its classes marked with `register` is known.

    Args:
        package: name of the package.
        folders: where its modules are, the package's ``__path__``.
    """
    for module in pkgutil.iter_modules(folders, f"{package}."):
        importlib.import_module(module.name)


def builtin() -> dict[str, type[Method]]:
    """Return lorainit's own methods by the name of their class."""
    return {cls.__name__: cls for cls in _METHODS.values() if cls.__module__.startswith(f"{__package__}.")}


def import_modules(names: str | Iterable[str]) -> None:
    """Import modules that call `register`, from the current folder too.

    Raises:
        LoraInitError: one cannot be found, or fails.
    """
    names = [names] if isinstance(names, str) else list(names)
    # a console script, unlike `python -m`, does not look there
    if names and os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())
    for name in names:
        try:
            importlib.import_module(name)
        except Exception as error:  # a module can fail in any way
            said = f"{type(error).__name__}: {error}"
            raise LoraInitError(f"imports: module '{name}' cannot be imported: {said}") from error


def available() -> list[MethodInfo]:
    """List every registered method: the built-in ones in a fixed order, then others in the order of registration.

    Example:
        >>> [info.name for info in available()][:2]
        ['kaiming', 'gaussian']
    """
    return in_order(cls.info for cls in dict.fromkeys(_METHODS.values()))


def get_method(method: str | Method, **options: Any) -> Method:
    """Return the method object for a name (with options), or the object itself.

    Example:
        >>> get_method("pissa", exact=True)
        PiSSA(exact=True, oversample=None, iterations=3)

    Raises:
        LoraInitError: an unknown name (near matches are listed), unknown or wrong options.
    """
    if isinstance(method, Method):
        if options:
            raise LoraInitError(f"options {sorted(options)} were given beside a ready {type(method).__name__} object")
        return method
    if isinstance(method, type) and issubclass(method, Method):
        name = method.__name__
        raise LoraInitError(f"a method is a name or a lorainit method object, got the class {name}: add (), {name}()")
    if not isinstance(method, str):
        raise LoraInitError(f"a method is a name or a lorainit method object, got {method!r}")
    if found := re.fullmatch(r"pissa_niter_(\d+)", method.lower()):  # PEFT's name for it
        return get_method("pissa", **({"iterations": int(found[1])} | options))
    # PEFT writes lora_ga
    cls = _METHODS.get(method.lower()) or _METHODS.get(method.lower().replace("_", "-"))
    if cls is None:
        near = difflib.get_close_matches(method.lower(), _METHODS, n=3)
        hint = (
            f"did you mean {' or '.join(map(repr, near))}?"
            if near
            else f"known: {', '.join(info.name for info in available())}"
        )
        raise LoraInitError(f"unknown method '{method}'; {hint}")
    known = [f.name for f in dataclasses.fields(cls)]
    unknown = sorted(set(options) - set(known))
    if unknown:
        raise LoraInitError(f"method '{cls.info.name}' has no option {unknown}; its options: {known}")
    try:
        return cls(**options)
    except (TypeError, ValueError) as error:
        raise LoraInitError(f"method '{cls.info.name}': {error}") from error
