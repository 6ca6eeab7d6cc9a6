"""Registries of classes by name. Everything that users can add (bases, methods, tasks, ...) is found through one."""

from __future__ import annotations

import importlib
import importlib.util
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import entry_points
from pathlib import Path
from types import ModuleType
from typing import Any, ClassVar, Generic, TypeVar

from basisadapt.core.errors import InputError, one_line, unknown

T = TypeVar("T")
_registries: list[Registry[Any]] = []

ENTRY_POINT_GROUP = "basisadapt.plugins"


class Registry(Generic[T]):
    """A mapping from names to classes of one `kind` ("basis", "grid", ...); iteration is in sorted order.

    A class is registered when it is defined (see `TransferBasis`). Classes of installed packages are registered through
    the entry-point group `basisadapt.plugins`, which is loaded once: at the first unknown name or the first listing.
    """

    def __init__(self, kind: str) -> None:
        self.kind = kind
        self._classes: dict[str, type[T]] = {}
        _registries.append(self)

    def add(self, name: str, cls: type[T]) -> None:
        """Register `cls` under `name`. Raises InputError if the name is taken or malformed.

        A name may hold letters, digits, `_`, `-` and `/`.
        """
        if not name.replace("_", "").replace("-", "").replace("/", "").isalnum():
            raise InputError(f"{self.kind} name {name!r} may hold only letters, digits, _, - and /")
        if name in self._classes:
            taken = self._classes[name]
            raise InputError(f"{self.kind} {name!r} already exists ({taken.__module__}.{taken.__qualname__})")
        self._classes[name] = cls

    def __getitem__(self, name: str) -> type[T]:
        """The class called `name`. Raises InputError naming the nearest known one."""
        if name not in self:
            raise unknown(self.kind, name, self)
        return self._classes[name]

    def __contains__(self, name: object) -> bool:
        if name not in self._classes:
            load_entry_points()
        return name in self._classes

    def __iter__(self) -> Iterator[str]:
        load_entry_points()
        return iter(sorted(self._classes))


class Registered:
    """A base of classes that have names: a subclass that is given a `name` is added to the `registry` of its base."""

    registry: ClassVar[Registry[Any]]

    def __init_subclass__(cls, *, name: str | None = None, **kwargs: Any) -> None:
        """Register the class under `name`. Raises InputError if it is taken."""
        super().__init_subclass__(**kwargs)
        if name is not None:
            cls.registry.add(name, cls)


FILE = "basisadapt_plugin_"  # what the module of a plug-in's file is called, before the file's own name
_entry_points_loaded = False
_plugins: dict[str, None] = {}  # the sources that load_plugin has imported, in order


def load_entry_points() -> None:
    """Import every module of the entry-point group, once. A module that fails to import causes a warning."""
    global _entry_points_loaded
    if _entry_points_loaded:
        return
    _entry_points_loaded = True
    for entry in entry_points(group=ENTRY_POINT_GROUP):
        try:
            entry.load()
        except Exception as error:  # third-party code may raise anything, and the rest must still load
            warnings.warn(f"plug-in {entry.name!r} ({entry.value}) did not load: {error}", stacklevel=2)


def loaded_plugins() -> list[str]:
    """The sources that `load_plugin` has imported in this process; a worker imports them to know the same names."""
    return list(_plugins)


def load_plugin(source: str) -> ModuleType:
    """Import a plug-in, which registers its classes: a path that ends in ".py", or the dotted name of a module.

    A file is imported once per process. Raises InputError if it does not exist, fails to import, or registers a class
    that lacks a method.
    """
    is_file = source.endswith(".py")
    module = _load_file(source) if is_file else _load_module(source)
    _plugins[str(Path(source).resolve()) if is_file else source] = None
    return module


def plugin_of(cls: type) -> str | None:
    """The plug-in that a registered class comes from, its file without folders or its module; None for our own."""
    module = cls.__module__
    if module.partition(".")[0] == __name__.partition(".")[0]:
        return None
    file = getattr(sys.modules.get(module), "__file__", None)
    is_file = module == "__main__" or module.startswith(FILE)
    return Path(file).name if is_file and file is not None else module


def _load_module(source: str) -> ModuleType:
    try:
        with _complete():
            return importlib.import_module(source)
    except (Exception, SystemExit) as error:
        raise InputError(f"plug-in module {source!r} does not import: {one_line(error)}") from error


def _load_file(source: str) -> ModuleType:
    path = Path(source)
    if not path.is_file():
        raise InputError(f"plug-in file {source!r} does not exist")
    name = f"{FILE}{path.stem}_{abs(hash(path.resolve())):x}"
    if name in sys.modules:
        return sys.modules[name]
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise InputError(f"plug-in file {source!r} cannot be read as Python")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    try:
        with _complete():
            spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:  # a program that is not meant to be imported ends itself
        del sys.modules[name]
        raise InputError(f"plug-in file {source!r} does not import: {one_line(error)}") from error
    return module


@contextmanager
def _complete() -> Iterator[None]:
    """Raise InputError if an import registers a class that lacks a method."""
    before = {(registry.kind, name) for registry in _registries for name in registry._classes}
    yield
    for registry in _registries:
        for name, cls in registry._classes.items():
            lacking = sorted(getattr(cls, "__abstractmethods__", ()))
            if lacking and (registry.kind, name) not in before:
                raise InputError(f"{registry.kind} {name!r} lacks {', '.join(lacking)}")
