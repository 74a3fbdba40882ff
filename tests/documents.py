"""What the tests of the documents share: the scripts in docs/, the pages, and torchtitan's interface for snippets."""

from __future__ import annotations

import contextlib
import importlib.util
import sys
import types
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import ClassVar

import pytest

ROOT = Path(__file__).resolve().parents[1]


def script(name: str) -> ModuleType:
    """A script of docs/ as a module."""
    spec = importlib.util.spec_from_file_location(f"docs_{name}", ROOT / "docs" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def page_text(*names: str) -> str:
    """Pages of docs/ as one line, so that a sentence is found wherever its lines break."""
    return " ".join(" ".join((ROOT / "docs" / name).read_text().split()) for name in names)


@dataclass
class LinearConfig:
    """torchtitan's config of a linear, as far as a snippet needs it."""

    in_features: int
    out_features: int


class Configs(dict[str, LinearConfig]):
    """torchtitan's config tree, flat."""

    def traverse(self, cls: type) -> Iterator[tuple[str, LinearConfig, None, str]]:
        assert cls is LinearConfig
        yield from ((fqn, config, None, fqn) for fqn, config in self.items())


class Converter:
    """torchtitan's interface: a nested Config that builds its class, and a filter on linear configs."""

    @dataclass(kw_only=True, slots=True)
    class Config:
        _owner: ClassVar[type]
        recipe_name: str = "rowwise"
        filter_fqns: list[str] = field(default_factory=list)

        def build(self) -> Converter:
            converter: Converter = self._owner(config=self)
            return converter

    def __init_subclass__(cls) -> None:
        if "Config" in cls.__dict__:
            cls.Config._owner = cls

    def __init__(self, config: Config) -> None:
        self.filter_fn: Callable[..., bool] = lambda config, fqn: True

    def convert(self, configs: Configs) -> list[str]:
        return [fqn for fqn, config in configs.items() if self.filter_fn(config, fqn)]


Converter.Config._owner = Converter


@contextlib.contextmanager
def torchtitan_interface() -> Iterator[None]:
    """Modules under torchtitan's names that have what the snippets import. tests/test_examples.py has the real ones."""
    float8, linear = "torchtitan.components.quantization.float8", "torchtitan.models.common.linear"
    names = {name.rsplit(".", above)[0] for name in (float8, linear) for above in range(name.count(".") + 1)}
    modules = {name: types.ModuleType(name) for name in names}
    modules[float8].Float8LinearConverter = Converter
    modules[linear].Linear = SimpleNamespace(Config=LinearConfig)
    with pytest.MonkeyPatch.context() as patch:  # mock.patch.dict would forget what else is imported meanwhile
        for name, module in modules.items():
            patch.setitem(sys.modules, name, module)
        yield
