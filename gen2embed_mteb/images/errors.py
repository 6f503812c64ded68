"""`ImageError`: an image that cannot be used, and short names for images in messages."""

from __future__ import annotations

import re

from gen2embed_mteb.errors import Gen2EmbedError, one_line

MAX_SHOWN = 255
"""The longest name that is shown completely: anything longer is the content of an image, not the name of a file."""

DATA_URI = re.compile(r"data:[^,]{0,200},", re.IGNORECASE)


class ImageError(Gen2EmbedError):
    """An image that cannot be used; the message names the file, the fault and the remedy.

    Attributes:
        file: The image as the caller named it; cut if the name holds the image's content, see `short_name`.
        reason: The fault alone, in one line.
        remedy: What the user can do about it.
    """

    def __init__(self, file: str, reason: str, remedy: str) -> None:
        """Build the message `image FILE: REASON; REMEDY`."""
        file, reason = short_name(file), one_line(ValueError(reason))
        super().__init__(f"image {file!r}: {reason}; {remedy}")
        self.file = file
        self.reason = reason
        self.remedy = remedy

    def __reduce__(self) -> tuple[type[ImageError], tuple[str, str, str]]:
        """Keep the error picklable, as errors cross process borders in data loaders."""
        return type(self), (self.file, self.reason, self.remedy)


def short_name(name: str) -> str:
    r"""Return the name of an image for messages and reports: short, without its content, and always valid Unicode.

    Args:
        name: A path, or any text that was passed as a path.

    Returns:
        The name; for a data URI only its head; for more than `MAX_SHOWN` characters only the first 60. Lone surrogates,
        which cannot be written into a file, become `\udXXX`.
    """
    name = name.encode("utf-8", "backslashreplace").decode("utf-8")
    head = DATA_URI.match(name)
    if head:
        return f"{head[0]}… ({len(name)} characters)"
    return name if len(name) <= MAX_SHOWN else f"{name[:60]}… ({len(name)} characters)"


def reason_of(error: BaseException) -> str:
    """Return the kind and message of a decoder's error, short and the same in every run.

    Args:
        error: The error that a decoder raised. Memory addresses are removed from its message.
    """
    name = type(error).__name__
    return f"{name}: {one_line(error)[:MAX_SHOWN]}" if str(error).strip() else name
