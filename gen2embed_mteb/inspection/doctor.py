"""`gen2embed doctor`: what is installed, what is missing and which extra mends it; or checks of one model."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import platform
import sys
from typing import Any

from gen2embed_mteb.embedder.short_names import resolve
from gen2embed_mteb.evaluation.tables import as_text
from gen2embed_mteb.names import DEFAULT

_NEEDED = (
    "torch",
    "transformers",
    "sentence-transformers",
    "peft",
    "datasets",
    "accelerate",
    "mteb",
    "pillow",
)
_OPTIONAL = {
    "torchvision": "pip install 'gen2embed[image]' (optional: images go through Pillow without it)",
    "umap": "pip install 'gen2embed[analysis]' (optional: maps as in the paper's Fig. 4; PCA without it)",
    "ray": "pip install 'gen2embed[ray]' (optional: vectors made on a Ray cluster, --engine ray)",
    "faiss": "pip install 'gen2embed[cpu]' or 'gen2embed[gpu]' (optional: exact search in torch without it)",
}


def diagnose() -> tuple[bool, str]:
    """Check the installation.

    Returns:
        Whether all required packages are installed, and a readable table.
    """
    rows: list[list[str]] = [["python", platform.python_version(), ""]]
    healthy = sys.version_info >= (3, 11)
    for name in ("gen2embed", *_NEEDED):
        version = _version(name)
        healthy = healthy and version is not None
        rows.append([name, version or "missing", "" if version else "pip install gen2embed"])
    for module, remedy in _OPTIONAL.items():
        found = importlib.util.find_spec(module) is not None
        rows.append([module, "installed" if found else "not installed", "" if found else remedy])
    hook = "off" if os.environ.get("GEN2EMBED_NO_HOOK", "") not in ("", "0") else "on"
    rows.append(["short names", hook, "unset GEN2EMBED_NO_HOOK" if hook == "off" else ""])
    rows.append(["gen2embed stands for", resolve(DEFAULT) or "the folder of that name", ""])
    rows.append(["accelerator", _accelerator(), ""])
    return healthy, as_text([["what", "state", "remedy"], *rows])


def diagnose_model(name: str, **options: Any) -> tuple[bool, str]:
    """Check a model on its weights; see `inspection.model_checks`.

    Args:
        name: Hub id, directory or short name.
        options: Options of `Gen2Embed`; the weights are loaded in float32.

    Returns:
        Whether all checks passed, and a readable table.

    Raises:
        Gen2EmbedError: The model cannot be loaded.
    """
    import torch

    from gen2embed_mteb.embedder.model import Gen2Embed
    from gen2embed_mteb.inspection.model_checks import as_table, check_model

    checks = check_model(Gen2Embed(name, model_kwargs={"dtype": torch.float32}, **options))
    failed = sum(not check.passed for check in checks)
    last = f"{failed} of {len(checks)} checks failed" if failed else f"all {len(checks)} checks passed"
    return not failed, f"{as_text(as_table(checks))}\n{name}: {last}"


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _accelerator() -> str:
    if _version("torch") is None:
        return "unknown"
    import torch

    return torch.cuda.get_device_name(0) if torch.cuda.is_available() else "none (CPU)"
