"""Stand-ins for what VLM2Vec imports and this path never runs.

VLM2Vec imports at module level whatever any of its backbones and datasets may need: its own copies of modelling code,
written for other versions of transformers, and packages for video, fused attention and logging. Two rules keep a stub
from doing harm:

- it is there to be imported, not to be used: calling one, or anything in it, raises and names what is missing;
- packages are stubbed only if they are absent, only while VLM2Vec's modules are being imported, and only after the
  libraries around them have made up their minds about what is installed; then the stubs leave `sys.modules` again.
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
"""Packages that VLM2Vec imports, and what for: none of it happens when images and texts are encoded by Gen2Embed."""


@contextmanager
def stubbed(vendored: Sequence[str]) -> Iterator[None]:
    """Let VLM2Vec's modules be imported inside the `with`.

    Args:
        vendored: Packages of VLM2Vec's own, modelling code of other backbones; stubbed whether importable or not, and
            for good.
    """
    _settle_availability()
    backbones, packages = _Finder(set(vendored)), _Finder(set(PACKAGES))
    sys.meta_path.insert(0, backbones)
    sys.meta_path.append(packages)  # last: asked only where a package is absent
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
    """Make the libraries around look now for what is installed, and remember it, before any stub could be found."""
    import accelerate  # noqa: F401
    import datasets  # noqa: F401
    import peft  # noqa: F401
    import sentence_transformers  # noqa: F401
    from transformers.utils import import_utils

    for name in dir(import_utils):
        if name.startswith("is_") and name.endswith("_available"):
            try:
                getattr(import_utils, name)()
            except (TypeError, ImportError):  # asks for an argument, hence about something else
                continue


class _Finder(MetaPathFinder):
    """Finds a stub for certain packages and all that is in them, and remembers which were asked for."""

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
        """Nothing to run."""


class _Stub(ModuleType):
    """A module in which every name is found."""

    __all__: tuple[str, ...] = ()

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(f"{self.__name__!r} is a stub without {name!r}")
        value = _Missing(name, (), {"__module__": self.__name__})
        setattr(self, name, value)
        return value


class _Missing(type):
    """What is found in a stub: a class, so that it can be inherited from; calling it raises."""

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
