"""Names that every part agrees on: the two sides of a comparison, and the short names of models."""

from pathlib import Path
from typing import Literal

Side = Literal["query", "document"]
"""Which side of a comparison an input is on; "document" is a candidate."""

Pooling = Literal["last", "phrase"]
POOLINGS: tuple[Pooling, ...] = ("last", "phrase")
"""Which tokens' states become the embedding: that of the last one, or the mean over a phrase (`phrase_pooling`)."""

DEFAULT = "gen2embed"
"""The short name of the paper's default, `DEFAULT_MODEL`."""
MINI = "gen2embed-mini"
"""The short name of the embedded model."""
DEFAULT_MODEL = "Qwen/Qwen2-VL-2B-Instruct"
MODEL_VARIABLE = "GEN2EMBED_MODEL"
"""The variable of the environment that points `DEFAULT` at another model."""
MINI_FOLDER = Path(__file__).parent / "mini" / "model"
"""The embedded model, in the layout of a hub repository."""
