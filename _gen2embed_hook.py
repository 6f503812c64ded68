"""The start-up hook: waits for a library to be imported, then lets Gen2Embed teach it its models.

Neither sentence-transformers nor mteb offers an entry point for third-party models, so a name such as
``SentenceTransformer("gen2embed")`` can only be made known by patching, and a program that never mentions Gen2Embed can
only be reached when the interpreter starts. ``gen2embed_hook.pth`` therefore calls :func:`start`:

1. a finder is put in front of ``sys.meta_path``; nothing else is imported, and nothing is patched;
2. when one of the libraries in ``PATCHES`` is imported, the finder lets the usual finders find it, and arranges to be
   called back once the library's own code has run;
3. only then is ``gen2embed_mteb`` imported, and the ``install()`` of each module listed for that library called.

``import gen2embed_mteb`` calls :func:`install` as well, for source checkouts and for environments that switched the
start-up part off. This module stands beside the package, not inside it, so that starting an interpreter does not import
the package: a checkout in the working directory is not shadowed by an installed copy.

Only the standard library is used, and of it only what the interpreter has already loaded when it gets here.
"""

import os
import sys
from _thread import get_ident  # `threading` is not loaded this early

# `typing` would cost several times as much as the rest of this file; hence the quoted annotations, too.
TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence
    from importlib.machinery import ModuleSpec
    from types import ModuleType
    from typing import Any

OPT_OUT = "GEN2EMBED_NO_HOOK"

# Library to wait for -> modules of ours whose `install()` patches it; each is idempotent and takes no argument.
PATCHES = {
    "sentence_transformers": ("gen2embed_mteb.embedder.model_folder.compat", "gen2embed_mteb.embedder.short_names"),
    "mteb": ("gen2embed_mteb.mteb_plugin.registration",),
    "mteb.benchmarks.benchmarks": ("gen2embed_mteb.mteb_plugin.tasks.benchmarks",),  # imported when first asked for
}


class _Finder:
    """A ``sys.meta_path`` finder that finds nothing itself: it adds our call-back to what the others find."""

    def __init__(self) -> None:
        self._asking: set[int] = set()  # threads now asking the other finders, one of which may ask us back

    def find_spec(
        self, fullname: str, path: "Sequence[str] | None" = None, target: "ModuleType | None" = None
    ) -> "ModuleSpec | None":
        """Return the spec of a library in ``PATCHES`` with our call-back attached; ``None`` for anything else."""
        thread = get_ident()
        if fullname not in PATCHES or thread in self._asking:
            return None
        self._asking.add(thread)
        try:
            for finder in sys.meta_path:
                find_spec = None if finder is self else getattr(finder, "find_spec", None)
                spec = find_spec and find_spec(fullname, path, target)
                if spec is not None:
                    if hasattr(spec.loader, "exec_module"):  # not so for a plain folder of that name
                        spec.loader = _Loader(spec.loader)
                    return spec
            return None
        finally:
            self._asking.discard(thread)


_FINDER = _Finder()


class _Loader:
    """The loader of one spec, and our call-back behind it.

    The stock loader is left as it is, since it may serve other modules too (pytest's does), and takes its place again
    before the library's code runs. A spec that is only looked at (``importlib.util.find_spec``) leaves nothing behind.
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
            if error.name == "gen2embed_mteb":  # uninstalled by half: this file stayed, the package is gone
                return
            _warn(library, name, error)
        except Exception as error:  # `library` is not ours: its import must succeed whatever we do
            _warn(library, name, error)


def _warn(library: str, name: str, error: Exception) -> None:
    """Say that ``library`` works but does not know (all of) what Gen2Embed adds to it, and what to do."""
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
    """What ``gen2embed_hook.pth`` calls at interpreter start: :func:`install`, unless ``GEN2EMBED_NO_HOOK`` is set."""
    if os.environ.get(OPT_OUT, "") in ("", "0"):
        install()
