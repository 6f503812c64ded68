"""Gen2Embed: a generative multimodal model that serves as an embedding model by a prompt alone.

``Gen2Embed`` is a ``SentenceTransformer``; ``HierarchicalPrompt`` is its two-level prompt. Both are imported on first
use (PEP 562), so importing this package loads neither torch nor transformers. It ensures that sentence-transformers
knows the short names whenever it is imported (see ``_gen2embed_hook``).
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

import _gen2embed_hook
from gen2embed_mteb.version import __version__

if TYPE_CHECKING:
    from .embedder.model import Gen2Embed
    from .embedder.prompts.strategies import HierarchicalPrompt

__all__ = ["Gen2Embed", "HierarchicalPrompt", "__version__"]

_LAZY = {"Gen2Embed": ".embedder.model", "HierarchicalPrompt": ".embedder.prompts.strategies"}


def __getattr__(name: str) -> Any:
    """Import a public name on first use and keep it."""
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(_LAZY[name], __name__), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    """List the lazy names too, so that completion offers them."""
    return sorted({*globals(), *__all__})


_gen2embed_hook.install()
