"""Errors of the hub's client, in one line: what was tried, what the hub said, and what the user can do."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator

from gen2embed_mteb.errors import Gen2EmbedError, is_of_the_system, one_line

_SECRET = re.compile(r"\?\S*|hf_\w{6,}")
"""What no message may show: the query of an address, which may be a signature, and tokens."""
_REMEDIES = {
    401: "log in by `hf auth login` with a token that may do this, and check the name",
    403: "use a token that may do this (hf auth login), or another name",
    404: "check the name, and that your token may see it (hf auth whoami)",
    409: "somebody else changed it meanwhile; run the same command again",
    412: "somebody else changed it meanwhile; run the same command again",
}
_LATER = "run the same command again; what arrived is not sent again"


class HubError(Gen2EmbedError):
    """An error of the hub, or of the way to it; the message names the repository, the fault and the remedy."""


@contextlib.contextmanager
def hub_errors(name: str, what: str) -> Iterator[None]:
    """Convert every error of the hub's client to a `HubError`; errors of ours and of the machine stay as they are.

    Args:
        name: The repository or address.
        what: What is tried, such as "cannot be read".

    Raises:
        HubError: The client raised an error.
    """
    try:
        yield
    except Gen2EmbedError:
        raise
    except Exception as error:  # the client raises a dozen kinds, most without a common base
        if is_of_the_system(error):
            raise
        raise HubError(f"{name}: {what} ({_said(error)}); {_remedy(error)}") from error


def require_online(name: str, what: str) -> None:
    """Refuse to use the network where the environment forbids it.

    Args:
        name: The repository or address.
        what: What was to be done, such as "cannot be sent".

    Raises:
        HubError: `HF_HUB_OFFLINE` is set.
    """
    from huggingface_hub import constants

    if constants.is_offline_mode():
        raise HubError(f"{name}: {what}, HF_HUB_OFFLINE is set; unset it")


def status_of(error: BaseException) -> int | None:
    """Return the status by which the hub refused a request; None if it did not answer.

    Args:
        error: Any exception; the exceptions that caused it are looked at, too.
    """
    seen: BaseException | None = error
    while seen is not None:
        status = getattr(getattr(seen, "response", None), "status_code", None)
        if isinstance(status, int):
            return status
        seen = seen.__cause__
    return None


def _said(error: BaseException) -> str:
    """Return the message of an error and of what caused it, without secrets."""
    cause = error.__cause__ if isinstance(error, RuntimeError) else None
    text = " ".join(filter(None, (one_line(error), one_line(cause) if cause else "")))
    text = _SECRET.sub("…", text)
    return text if len(text) <= 400 else text[:399] + "…"


def _remedy(error: BaseException) -> str:
    if "outgoing traffic has been disabled" in str(error) or type(error).__name__ == "OfflineModeIsEnabled":
        return "unset HF_HUB_OFFLINE, or download it before"
    return _REMEDIES.get(status_of(error) or 0, _LATER)
