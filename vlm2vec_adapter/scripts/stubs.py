"""Stubs for modules that VLM2Vec imports but that are never used with this backbone.

VLM2Vec imports at module level everything that any of its backbones and datasets may need: its own copies of modelling
code, written for other versions of transformers, and packages for video, fused attention and logging. Two rules ensure
that a stub is harmless:

- a stub can only be imported: calling it, or anything in it, raises an error that names what is missing;
- packages are stubbed only if they are absent, only while VLM2Vec's modules are imported, and only after other
  libraries have checked which packages are installed; then the stubs are removed from `sys.modules`.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

logger = logging.getLogger(__name__)

PACKAGES = {
    "av": "video",
    "cv2": "video",
    "decord": "video",
    "deepspeed": "training",
    "einops": "other backbones",
    "flash_attn": "other backbones",
    "hnswlib": "clustering of text",
    "imageio": "video",
    "jax": "other backbones",
    "lightning": "other backbones",
    "openai": "text of other models",
    "qwen_vl_utils": "video and other backbones",
    "ray": "training",
    "skimage": "video",
    "timm": "other backbones",
    "torchvision": "video and other backbones",
    "wandb": "logging of training",
}
"""Packages that VLM2Vec imports, and their use; Gen2Embed needs none of them to encode images and texts."""


@contextmanager
def stubbed(vendored: Sequence[str]) -> Iterator[None]:
    """Let VLM2Vec's modules be imported inside the `with`.

    Args:
        vendored: VLM2Vec's own packages with modelling code of other backbones; they are always stubbed, even if they
            can be imported, and the stubs stay.
    """
    _settle_availability()
    backbones, packages = _Finder(set(vendored)), _Finder(set(PACKAGES))
    sys.meta_path.insert(0, backbones)
    sys.meta_path.append(packages)  # last, so that it is used only for absent packages
    try:
        yield
    finally:
        sys.meta_path.remove(packages)
        for name in packages.made:
            sys.modules.pop(name, None)
        if packages.made:
            missing = sorted({name.partition(".")[0] for name in packages.made})
            logger.info("not installed, not needed here, stubbed: %s", ", ".join(missing))
        if backbones.made:
            # The finder stays: some of these are imported later, inside functions that this path never calls.
            logger.info("VLM2Vec's own modelling code, not run here, stubbed: %s", ", ".join(sorted(vendored)))


def _settle_availability() -> None:
    """Let other libraries check now which packages are installed, and remember it, before a stub can be found."""
    import accelerate  # noqa: F401
    import datasets  # noqa: F401
    import peft  # noqa: F401
    import sentence_transformers  # noqa: F401
    from transformers.utils import import_utils

    for name in dir(import_utils):
        if name.startswith("is_") and name.endswith("_available"):
            try:
                getattr(import_utils, name)()
            except (TypeError, ImportError):  # needs an argument, so it checks something else
                continue


class _Finder(MetaPathFinder):
    """A finder of stubs for certain packages and their submodules, which remembers the requested ones."""

    def __init__(self, names: set[str]) -> None:
        self._names = names
        self.made: list[str] = []

    def find_spec(self, fullname: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        """Return the spec of a stub, or `None`."""
        parents = {fullname[:end] for end, letter in enumerate(f"{fullname}.") if letter == "."}
        if not parents & self._names:
            return None
        self.made.append(fullname)
        return ModuleSpec(fullname, _Loader(), is_package=True)


class _Loader(Loader):
    def create_module(self, spec: ModuleSpec) -> ModuleType:
        return _Stub(spec.name)

    def exec_module(self, module: ModuleType) -> None:
        """Do nothing, since a stub has no code."""


class _Stub(ModuleType):
    """A module in which every name exists."""

    __all__: tuple[str, ...] = ()

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(f"{self.__name__!r} is a stub without {name!r}")
        value = _Missing(name, (), {"__module__": self.__name__})
        setattr(self, name, value)
        return value


class _Missing(type):
    """The type of every name in a stub: the name is a class, so that it can be a base class; calling it raises."""

    def __getattr__(cls, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return _Missing(name, (), {"__module__": f"{cls.__module__}.{cls.__name__}"})

    def __call__(cls, *args: Any, **kwargs: Any) -> Any:
        package = cls.__module__.partition(".")[0]
        remedy = (
            f"install {package} to run the part of VLM2Vec that needs it ({PACKAGES[package]})"
            if package in PACKAGES
            else "run VLM2Vec without the adapter for its other backbones"
        )
        raise ModuleNotFoundError(
            f"{cls.__module__}.{cls.__name__} is a stub: --model_backbone gen2embed never runs it; {remedy}",
            name=package,
        )
