"""`ChatFormat`: a record of everything that differs between the chat templates that models bring.

It is written as JSON into the template that carries the prompt (see `header`), and read back from there.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any, Literal, get_args

from gen2embed_mteb.errors import Gen2EmbedError

SystemForm = Literal["parts", "string", "folded"]
ContentForm = Literal["parts", "string"]
JOINERS = ("\n\n", "\n")
"""The texts that may stand between a system text and the user's text that follows it in the same turn."""


@dataclass(frozen=True, kw_only=True)
class ChatFormat:
    """How a conversation is handed to a model's own chat template, and what is written around it.

    Attributes:
        system: How the system text is given: as a list of `parts`, as a `string`, or `folded` into the user turn.
        joiner: The text between the system text and the user's, if the system text is folded; else empty.
        user: How the user's turn is given: as a list of `parts`, or as a `string`.
        image: The text that stands for an image in a string; empty if the template writes it.
        images_first: Whether the template moves images before the text, so that MMEB's marks in the text are lost.
        no_thinking: Whether `enable_thinking` must be false, so that the answer is not the start of a reasoning.
        pin_date: Whether the template writes today's date, which is replaced by a fixed one.
        write_bos: Whether the token that begins a text must be written before the template's own output.
        sanitize: Whether transformers reads the control tokens in the conversation as plain text.
        broken_up: Tokens into which a space is put where a conversation contains them: placeholders of images, for
            example. Each has two characters or more.
    """

    system: SystemForm = "parts"
    joiner: str = ""
    user: ContentForm = "parts"
    image: str = ""
    images_first: bool = False
    no_thinking: bool = False
    pin_date: bool = False
    write_bos: bool = False
    sanitize: bool = True
    broken_up: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        """Check every value.

        Raises:
            Gen2EmbedError: A value is of another type, unknown, or does not go with another one.
        """
        for field in fields(self):
            value = getattr(self, field.name)
            if not isinstance(value, type(field.default)):
                raise Gen2EmbedError(f"chat format: {field.name} is {value!r}, not a {type(field.default).__name__}")
        for name, known in (("system", get_args(SystemForm)), ("user", get_args(ContentForm))):
            if getattr(self, name) not in known:
                raise Gen2EmbedError(f"chat format: {name} is {getattr(self, name)!r}; known: {', '.join(known)}")
        joiners = JOINERS if self.system == "folded" else ("",)
        if self.joiner not in joiners:
            raise Gen2EmbedError(
                f"chat format: joiner is {self.joiner!r}; with system={self.system!r} it is one of {joiners}"
            )
        if not all(isinstance(token, str) and len(token) > 1 for token in self.broken_up):
            raise Gen2EmbedError("chat format: broken_up holds something that is not a text of two characters or more")

    @property
    def processing_kwargs(self) -> dict[str, dict[str, bool]]:
        """The options with which sentence-transformers calls the processor."""
        return {"chat_template": {"add_generation_prompt": True, "sanitize_control_tokens": self.sanitize}}

    def to_json(self) -> str:
        """Return the format on one line; `from_json` reads it. JSON of this kind is a literal in Jinja as well."""
        return json.dumps({**asdict(self), "broken_up": list(self.broken_up)}, ensure_ascii=False)

    @classmethod
    def from_json(cls, text: str) -> ChatFormat:
        """Read a format that `to_json` wrote.

        Args:
            text: A JSON object with every field, and no other key.

        Raises:
            Gen2EmbedError: It is not JSON, a key is unknown or missing, or a value is not one of its field.
        """
        try:
            found: Any = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise Gen2EmbedError(f"chat format {text[:80]!r}: not JSON ({error}); export the model again") from error
        names = {field.name for field in fields(cls)}
        if not isinstance(found, Mapping) or set(found) != names:
            keys = set(found) if isinstance(found, Mapping) else set()
            faults = [f"{what} {sorted(some)}" for what, some in (("unknown", keys - names), ("missing", names - keys))]
            raise Gen2EmbedError(
                f"chat format {text[:80]!r}: keys {' and '.join(faults)}; it is of another version of gen2embed: "
                "update gen2embed, or export the model again"
            )
        broken_up = found["broken_up"]
        return cls(**{**found, "broken_up": tuple(broken_up) if isinstance(broken_up, list) else broken_up})
