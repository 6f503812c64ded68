"""The start-up hook: patches sentence-transformers and mteb when they are imported, so that they know our models.

Neither library has an entry point for third-party models, so a name such as ``SentenceTransformer("gen2embed")`` works
only if the library is patched. A program that never mentions Gen2Embed can be reached only when the interpreter starts.
``gen2embed_hook.pth`` therefore calls :func:`start`:

1. A finder is put in front of ``sys.meta_path``; nothing else is imported, and nothing is patched.
2. When one of the libraries in ``PATCHES`` is imported, the finder lets the usual finders find it, and arranges a call
   of our code after the library's own code has run.
3. Only then, ``gen2embed_mteb`` is imported, and the ``install()`` of each module listed for that library is called.

``import gen2embed_mteb`` calls :func:`install` as well, for source checkouts and for environments that have switched
the start-up part off. This module is beside the package and not inside it, so that starting an interpreter does not
import the package: an installed copy does not replace a checkout in the working directory.

Only the standard library is used, and only those of its modules that the interpreter has loaded before this one.
"""

import os
import sys
from _thread import get_ident  # `threading` is not loaded this early

# To import `typing` would take several times as long as the rest of this file; the annotations are quoted for the same
# reason.
TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence
    from importlib.machinery import ModuleSpec
    from types import ModuleType
    from typing import Any

OPT_OUT = "GEN2EMBED_NO_HOOK"

# For each library, the modules of ours whose `install()` patches it; each `install()` is idempotent and takes no
# argument.
PATCHES = {
    "sentence_transformers": ("gen2embed_mteb.embedder.model_folder.compat", "gen2embed_mteb.embedder.short_names"),
    **{
        f"transformers.models.auto.{part}_auto": ("gen2embed_mteb.embedder.families.phi3v.registration",)
        for part in ("configuration", "image_processing", "processing")
    },
    "mteb": ("gen2embed_mteb.mteb_plugin.registration",),
    "mteb.benchmarks.benchmarks": ("gen2embed_mteb.mteb_plugin.tasks.benchmarks",),  # imported when first asked for
}


class _Finder:
    """A ``sys.meta_path`` finder that finds nothing itself: it adds our callback to what the other finders find."""

    def __init__(self) -> None:
        self._asking: set[int] = set()  # threads that now ask the other finders, one of which may call this one again

    def find_spec(
        self, fullname: str, path: "Sequence[str] | None" = None, target: "ModuleType | None" = None
    ) -> "ModuleSpec | None":
        """Return the spec of a library in ``PATCHES`` with our callback attached; ``None`` for any other module."""
        thread = get_ident()
        if fullname not in PATCHES or thread in self._asking:
            return None
        self._asking.add(thread)
        try:
            for finder in sys.meta_path:
                find_spec = None if finder is self else getattr(finder, "find_spec", None)
                spec = find_spec and find_spec(fullname, path, target)
                if spec is not None:
                    if hasattr(spec.loader, "exec_module"):  # a plain folder of that name has no such loader
                        spec.loader = _Loader(spec.loader)
                    return spec
            return None
        finally:
            self._asking.discard(thread)


_FINDER = _Finder()


class _Loader:
    """Loads one spec with its stock loader, and then calls our callback.

    The stock loader is not changed, since it may load other modules too (pytest's does), and the module has it as its
    loader again before the library's code runs. If a spec is only looked at (``importlib.util.find_spec``), nothing is
    changed.
    """

    def __init__(self, stock: "Any") -> None:
        self._stock = stock

    def __getattr__(self, name: str) -> "Any":
        return getattr(self._stock, name)

    def create_module(self, spec: "ModuleSpec") -> "ModuleType | None":
        """Create the module as the stock loader does."""
        return self._stock.create_module(spec)

    def exec_module(self, module: "ModuleType") -> None:
        """Run the library's code, then apply our patches to it."""
        module.__loader__ = self._stock
        if module.__spec__ is not None:
            module.__spec__.loader = self._stock
        self._stock.exec_module(module)
        _patch(module.__name__)


def _patch(library: str) -> None:
    """Call the ``install()`` of every module listed for ``library``; a failure becomes a warning, never an error."""
    from importlib import import_module

    for name in PATCHES[library]:
        try:
            import_module(name).install()
        except ModuleNotFoundError as error:
            if error.name == "gen2embed_mteb":  # uninstalled only in part: this file is there, the package is gone
                return
            _warn(library, name, error)
        except Exception as error:  # `library` is not ours: its import must succeed even if our patch fails
            _warn(library, name, error)


def _warn(library: str, name: str, error: Exception) -> None:
    """Warn that ``library`` works but may lack what Gen2Embed adds to it, and say what to do."""
    import warnings

    warnings.warn(
        f"Gen2Embed could not extend {library} ({name}: {type(error).__name__}: {error}). Names such as 'gen2embed' "
        f"may be unknown to it. Mend that or reinstall gen2embed; {OPT_OUT}=1 starts without it.",
        RuntimeWarning,
        stacklevel=2,
    )


def install() -> None:
    """Watch for the libraries of ``PATCHES``, and patch those that are imported already. Idempotent."""
    if _FINDER in sys.meta_path:
        return
    sys.meta_path.insert(0, _FINDER)
    for library in PATCHES:
        if library in sys.modules:
            _patch(library)


def start() -> None:
    """Call :func:`install` at interpreter start, for ``gen2embed_hook.pth``, unless ``GEN2EMBED_NO_HOOK`` is set."""
    if os.environ.get(OPT_OUT, "") in ("", "0"):
        install()
