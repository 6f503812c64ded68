"""`--data docstrings`: pairs of texts that everybody has, from docstrings of Python and of this package's dependencies.

A subset is a kind of pair: `details`, from a function's summary to the details that follow it, and `summaries`, from a
function's qualified name to its summary. The same versions on the same platform give the same pairs.

Only the modules of two lists are imported: parts of the standard library, and modules that loading a model imports
anyway. The libraries whose docstrings `benchmarks/real_text.py` measures on (numpy, scipy, scikit-learn, …) are left
out, so that a map which is fitted on these pairs has seen no text of a task.
"""

from __future__ import annotations

import importlib
import inspect
import re
import sys
import warnings
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from gen2embed_mteb.errors import Gen2EmbedError
from gen2embed_mteb.mmeb.tables import SubsetTable

NAME = "docstrings"
_STANDARD_LIBRARY = (
    "argparse ast asyncio base64 calendar cmath codecs collections collections.abc configparser contextlib csv "
    "dataclasses datetime difflib dis email.message email.utils enum fileinput fnmatch functools gc glob gzip hashlib "
    "heapq http.client http.cookiejar http.server imaplib importlib.metadata importlib.resources importlib.util "
    "inspect io ipaddress itertools json linecache locale logging logging.config logging.handlers mailbox math "
    "mimetypes multiprocessing numbers operator os os.path pathlib pickle pkgutil platform plistlib pprint pstats "
    "queue quopri random re shelve shutil signal smtplib socket socketserver statistics subprocess sysconfig tarfile "
    "tempfile textwrap time timeit traceback tracemalloc types typing unicodedata unittest unittest.mock urllib.parse "
    "urllib.request uuid weakref xml.dom.minidom xml.etree.ElementTree xml.sax.saxutils xmlrpc.client zipfile "
    "zlib"
)
STANDARD_LIBRARY = tuple(_STANDARD_LIBRARY.split())
"""Without `builtins`, `sys`, `threading` and `warnings`, in which IPython, pytest and the like replace functions."""
_DEPENDENCIES = (
    "PIL.Image PIL.ImageOps datasets huggingface_hub.hf_api jinja2 jinja2.filters pyarrow pyarrow.compute "
    "pyarrow.parquet sentence_transformers.util tokenizers torch torch.autograd torch.autograd.functional torch.cuda "
    "torch.distributed torch.distributions torch.fft torch.func torch.fx torch.hub torch.jit torch.linalg torch.nn "
    "torch.nn.functional torch.nn.init torch.nn.utils torch.nn.utils.rnn torch.optim torch.optim.lr_scheduler "
    "torch.overrides torch.profiler torch.signal.windows torch.sparse torch.special torch.utils.checkpoint "
    "torch.utils.data transformers.configuration_utils transformers.image_transforms transformers.image_utils "
    "transformers.modeling_utils transformers.processing_utils transformers.tokenization_utils_base "
    "transformers.trainer_utils transformers.utils"
)
DEPENDENCIES = tuple(_DEPENDENCIES.split())
MOST_WORDS = 30
_FEWEST_WORDS = 3
_COLUMNS = ("query", "positive")
_DETAIL_WORDS = 16


@dataclass(frozen=True)
class Docstring:
    """What a docstring says: a function's qualified name, its summary, and the beginning of its details or nothing."""

    name: str
    summary: str
    detail: str


def tables() -> dict[str, SubsetTable]:
    """Return the two subsets, each a table with the columns `query` and `positive`; the rows are in mixed order.

    Raises:
        Gen2EmbedError: Python runs without docstrings, or a module of the lists cannot be imported.
    """
    import datasets

    if sys.flags.optimize > 1:
        raise Gen2EmbedError(f"--data {NAME}: python -OO drops all docstrings; run without -OO (PYTHONOPTIMIZE=2)")
    found = functions([*STANDARD_LIBRARY, *DEPENDENCIES])
    mixed = [found[number] for number in np.random.default_rng(0).permutation(len(found))]
    pairs = {
        "details": [(one.summary, one.detail) for one in mixed if one.detail],
        "summaries": [(one.name, one.summary) for one in mixed],
    }
    found_tables = {}
    for name, rows in pairs.items():
        columns = dict(zip(_COLUMNS, map(list, zip(*rows, strict=True)), strict=True))
        loaded = datasets.Dataset.from_dict(columns)
        found_tables[name] = SubsetTable(f"{NAME}/{name}", _COLUMNS, len(rows), loaded=loaded)
    return found_tables


def functions(modules: Sequence[str]) -> list[Docstring]:
    """Return the public functions and classes of modules, by module and name; no two with one summary or detail.

    Args:
        modules: The modules, which are imported.

    Raises:
        Gen2EmbedError: A module cannot be imported.
    """
    # All are imported first: what a module says about warnings while it is imported stays as it says.
    imported = {name: _import(name) for name in modules}
    found: list[Docstring] = []
    seen: set[str] = set()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # looking at a deprecated function is not using it
        for module, content in imported.items():
            for name in sorted(set(dir(content))):
                part = getattr(content, name)
                public = not name.startswith("_") and callable(part) and not inspect.ismodule(part)
                text = inspect.getdoc(part) if public else None
                summary, detail = paragraphs(text or "")
                if _FEWEST_WORDS <= len(summary.split()) <= MOST_WORDS and not {summary, detail} - {""} & seen:
                    found.append(Docstring(f"{module}.{name}", summary, detail))
                    seen |= {summary, detail}
    return found


def _import(name: str) -> object:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise Gen2EmbedError(
            f"the docstrings of {name} are needed, but it cannot be imported ({error}); reinstall it, or use a Python "
            "with its whole standard library"
        ) from error


def paragraphs(text: str) -> tuple[str, str]:
    """Return the first paragraph of a docstring, and the beginning of the next one if it is prose."""
    found = [" ".join(part.split()) for part in re.split(r"\n\s*\n", text)]
    found = [part for part in found if part and not part.startswith((">>>", "..", ":"))]
    signature = found and re.match(r"[\w.]+\(.*\)( -> .*)?$", found[0])
    summary, detail = [*found[1 if signature else 0 :], "", ""][:2]
    prose = re.match(r"[A-Z][a-z]* [a-z]", detail) and "----" not in detail and len(detail.split()) >= 8
    return summary, " ".join(detail.split()[:_DETAIL_WORDS]) if prose else ""
