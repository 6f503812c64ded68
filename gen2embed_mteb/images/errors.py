"""`ImageError`: an image that cannot be used, named in a few words whatever the caller passed for it."""

from __future__ import annotations

import re

from gen2embed_mteb.errors import Gen2EmbedError, one_line

MAX_SHOWN = 255
"""The longest name that is shown whole: more than that is no name of a file, but an image's content."""

DATA_URI = re.compile(r"data:[^,]{0,200},", re.IGNORECASE)


class ImageError(Gen2EmbedError):
    """An image that cannot be used; the message names the file, the fault and the remedy.

    Attributes:
        file: The image as the caller named it, cut short where that holds its content; see `short_name`.
        reason: The fault alone, one line.
        remedy: What to do about it.
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
    r"""Return what to call an image in messages and reports: never a payload, always text that can be written.

    Args:
        name: A path, or what was passed for one.

    Returns:
        The name; of a data URI its head, of more than `MAX_SHOWN` characters the first 60. Lone surrogates, which no
        file can hold, become `\udXXX`.
    """
    name = name.encode("utf-8", "backslashreplace").decode("utf-8")
    head = DATA_URI.match(name)
    if head:
        return f"{head[0]}… ({len(name)} characters)"
    return name if len(name) <= MAX_SHOWN else f"{name[:60]}… ({len(name)} characters)"


def reason_of(error: BaseException) -> str:
    """Return the kind and message of a decoder's error: the same in every run, and short.

    Args:
        error: What a decoder raised. Memory addresses are left out of its message.
    """
    name = type(error).__name__
    return f"{name}: {one_line(error)[:MAX_SHOWN]}" if str(error).strip() else name
