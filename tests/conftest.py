"""Fixtures shared by the tests: tiny random models of every family, written once, and kept once loaded.

Also makes the modules of `helpers/` and `benchmarks/` importable (pytest's importlib mode leaves `sys.path` alone).
"""

import gc
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

sys.path[:0] = [str(Path(__file__).parent / "helpers"), str(Path(__file__).parents[1] / "benchmarks")]


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark the cases of families that are not in the sample as exhaustive, and put files with slow tests first.

    Slow files at the end would let one process run the last of them while the other waits.
    """
    from samples import SELDOM

    for item in items:
        given = getattr(item, "callspec", None)
        if given is not None and any(isinstance(one, str) and one in SELDOM for one in given.params.values()):
            item.add_marker(pytest.mark.exhaustive)
    slow: dict[Path, int] = {}
    for item in items:
        slow[item.path] = slow.get(item.path, 0) + (item.get_closest_marker("slow") is not None)
    items.sort(key=lambda item: -slow[item.path])  # stable


def pytest_collection_finish() -> None:
    """Spare the garbage collector what imports have left: a tenth of the tests' time went into looking at it again."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def _same_random_numbers() -> None:
    """Let no test draw weights that depend on which tests ran before it."""
    if "torch" in sys.modules:
        sys.modules["torch"].manual_seed(0)


@pytest.fixture(scope="session")
def tiny_dir(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """`tiny_dir(family)`: the directory of a tiny random model of a family, in the hub's layout."""
    import torch
    from tiny_any import write_any
    from tiny_models import FAMILIES, write_tiny
    from tiny_torchvision import LOADABLE

    torch.set_num_threads(1)
    written: dict[str, Path] = {}

    def directory(family: str) -> Path:
        if family not in written:
            place = tmp_path_factory.mktemp(family)
            known = family in (*FAMILIES, "phi3_v")
            written[family] = write_tiny(family, place) if known else write_any(family, place, LOADABLE[family])
        return written[family]

    return directory


@pytest.fixture(scope="session")
def tiny(tiny_dir: Callable[[str], Path]) -> Callable[..., Any]:
    """`tiny(family, prompt_mode=…, layout=…)`: such a model, loaded once; a test that changes it loads its own."""
    from gen2embed_mteb import Gen2Embed

    loaded: dict[Any, Gen2Embed] = {}

    def model(family: str, **options: Any) -> Gen2Embed:
        key = (family, *sorted(options.items()))
        if key not in loaded:
            loaded[key] = Gen2Embed(tiny_dir(family), device="cpu", **options)
        return loaded[key]

    return model


@pytest.fixture(scope="session")
def exported(tiny: Callable[..., Any], tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """`exported(family, prompt_mode=…)`: the directory to which that model was saved."""
    saved: dict[Any, Path] = {}

    def directory(family: str, **options: Any) -> Path:
        key = (family, *sorted(options.items()))
        if key not in saved:
            saved[key] = tmp_path_factory.mktemp("exported") / "model"
            tiny(family, **options).save_pretrained(str(saved[key]))
        return saved[key]

    return directory


@pytest.fixture(scope="session")
def preloaded(shared_folder: Path) -> Iterator[Any]:
    """Runs programs in processes that need not load the libraries and ours."""
    from preloaded import Preloaded

    with Preloaded(shared_folder) as python:
        yield python


@pytest.fixture(scope="session")
def preloaded_stock(shared_folder: Path) -> Iterator[Any]:
    """Runs programs in processes that need not load plain sentence-transformers, and know nothing of Gen2Embed."""
    from preloaded import Preloaded

    with Preloaded(shared_folder, "stock") as python:
        yield python


@pytest.fixture(scope="session")
def shared_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that all processes of this run of the tests have in common."""
    base = tmp_path_factory.getbasetemp()
    return base.parent if "PYTEST_XDIST_WORKER" in os.environ else base


@pytest.fixture(scope="session")
def pictures() -> list[Any]:
    """Four small pictures of noise: wide, tall, square, and one with a side below a patch."""
    import numpy as np
    from PIL import Image

    random = np.random.default_rng(0)
    sizes = [(90, 60), (40, 100), (64, 64), (150, 12)]
    return [Image.fromarray(random.integers(0, 255, (h, w, 3), dtype=np.uint8)) for w, h in sizes]


@pytest.fixture(scope="session")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel of this checkout."""
    from environments import build_wheel

    return build_wheel(tmp_path_factory.mktemp("wheel"))
