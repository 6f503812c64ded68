"""The name of a readout, what a model's folder says of it, and which one a caller gets; see `readout`."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

from gen2embed_mteb.errors import Gen2EmbedError

LAST, PRE_MLP = "last", "pre-mlp"
CONFIG_KEY = "gen2embed"
"""The key of `config.json` under which a written folder names its readout."""

_DROP = re.compile(r"drop-([1-9]\d{0,3})")


@dataclass(frozen=True)
class Readout:
    """Which hidden state becomes the embedding.

    Attributes:
        state: `last`, `pre-mlp`, or `drop-K` with K of 1 or more.
        norm: Whether the decoder's final norm is applied to it.

    Raises:
        Gen2EmbedError: The state is none of these.
    """

    state: str = LAST
    norm: bool = True

    def __post_init__(self) -> None:
        """Check both values, and write the state in its common form."""
        known = f"known: {LAST}, {PRE_MLP}, drop-1, drop-2, …"
        if not isinstance(self.state, str):
            raise Gen2EmbedError(f"readout is {self.state!r}; {known}")
        state = self.state.lower().replace("_", "-")
        if state not in (LAST, PRE_MLP) and not _DROP.fullmatch(state):
            raise Gen2EmbedError(f"unknown readout {self.state!r}; {known}")
        if not isinstance(self.norm, bool):
            raise Gen2EmbedError(f"readout_norm is {self.norm!r}; pass True or False")
        object.__setattr__(self, "state", state)

    @classmethod
    def named(cls, name: str) -> Readout:
        """Return the readout with a `name`.

        Raises:
            Gen2EmbedError: There is none.
        """
        state = name.removesuffix("-raw")
        return cls(state, state == name)

    @property
    def num_dropped(self) -> int:
        """How many of the last layers do not run."""
        match = _DROP.fullmatch(self.state)
        return int(match[1]) if match else 0

    @property
    def is_default(self) -> bool:
        """Whether it is the paper's: the last state, with the final norm."""
        return self == Readout()

    @property
    def name(self) -> str:
        """A name for folders and messages: the state, and `-raw` without the final norm."""
        return self.state if self.norm else f"{self.state}-raw"

    def settings(self) -> dict[str, Any]:
        """Return it as `config.json` has it."""
        return {"readout": self.state, "readout_norm": self.norm}


def stored_readout(config: Any, source: str) -> Readout:
    """Return the readout that a model's configuration names; the default one if it names none.

    Args:
        config: The configuration of the whole model.
        source: The model's name, for messages.

    Raises:
        Gen2EmbedError: `config.json` names none that is known.
    """
    stated = getattr(config, CONFIG_KEY, None)
    if stated is None:
        return Readout()
    try:
        return Readout(stated.get("readout", LAST), stated.get("readout_norm", True))
    except (AttributeError, Gen2EmbedError) as error:
        raise Gen2EmbedError(
            f"{source}/config.json: {CONFIG_KEY} is {str(stated)[:80]}, which names no readout ({error}); write the "
            "folder again: gen2embed export BASE_MODEL OUT --readout …"
        ) from error


def chosen_readout(state: str | None, norm: bool | None, stored: Readout, source: str) -> Readout:
    """Return the readout that a caller asks for, of a model that may have one already.

    Args:
        state: As in `Readout`; `None` keeps the stored one.
        norm: As in `Readout`; `None` keeps the stored one.
        stored: What the model's folder has.
        source: The model's name, for messages.

    Raises:
        Gen2EmbedError: The values are unknown, or the weights that it needs were left out when the folder was written.
    """
    wanted = Readout(stored.state if state is None else state, stored.norm if norm is None else norm)
    lost = stored.state not in (LAST, wanted.state) or (wanted.norm and not stored.norm)
    if lost:
        raise Gen2EmbedError(
            f"{source} was exported with readout={stored.state!r}, readout_norm={stored.norm}, and the weights that "
            f"readout={wanted.state!r}, readout_norm={wanted.norm} needs are not in it; use the model that it was "
            "exported from, or leave readout out"
        )
    return wanted
