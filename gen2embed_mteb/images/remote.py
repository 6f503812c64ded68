"""Reading the file of an image from another machine, by its address; off unless the user names what may be read.

`--remote_images` names protocols (`s3`, `hf`, `https`, whatever fsspec knows) or, better, the beginnings of addresses
(`s3://bucket/`, `https://images.example.org/`). Data comes from others, so everything else is refused: a file of this
machine, an archive or a cache in a chained address (`zip://a.png::s3://…`), and a redirect to another place.

1. `http` and `https` are read by Python's own client, every other protocol by fsspec's file system for it.
2. At most one byte more than the limit is read, whatever size the other side states.
3. A read that takes longer than the limit of time is given up; one that fails by the network is tried again.

Cost: an image is read twice, for its digest and size, and later for its pixels. Vectors are those of a local file of
the same bytes.
"""

from __future__ import annotations

import errno
import re
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any
from urllib.error import HTTPError
from urllib.parse import quote, urljoin, urlsplit
from urllib.request import (
    HTTPDefaultErrorHandler,
    HTTPErrorProcessor,
    HTTPHandler,
    HTTPRedirectHandler,
    HTTPSHandler,
    OpenerDirector,
    ProxyHandler,
    Request,
)

from gen2embed_mteb.errors import Gen2EmbedError, one_line
from gen2embed_mteb.images.errors import ImageError

SECONDS = 60.0
"""The longest time that one read may take."""
TRIES = 3
WAIT = 1.0
"""Seconds before the second try; twice as many before the third."""

_ADDRESS = re.compile(r"(?P<protocol>[a-z][a-z0-9+.-]+)://", re.IGNORECASE)
_HTTP = ("http", "https")
_NEVER = frozenset(
    [
        "file",
        "local",
        "asynclocal",
        "dir",
        "data",
        "reference",
        "zip",
        "tar",
        "libarchive",
        "generic",
        "cached",
        "simplecache",
        "filecache",
        "blockcache",
        "async_wrapper",
        "git",
        "github",
        "jupyter",
        "jlab",
        "sftp",
        "ssh",
        "smb",
    ]
)
"""Protocols that read this machine, wrap another address, or run a program or log in somewhere to read."""
_OF_THIS_MACHINE = (errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.ENOSPC)


def protocol_of(path: str) -> str:
    """Return the protocol of an address, in small letters; an empty text for a path.

    Args:
        path: The path of an image, as the data has it.
    """
    found = _ADDRESS.match(path)
    return found["protocol"].lower() if found else ""


def require_allowed_names(names: Sequence[str]) -> None:
    """Check what the user allows to be read; call it before any work is done.

    Args:
        names: Protocols, or the beginnings of addresses, which end in a slash.

    Raises:
        Gen2EmbedError: A name is a protocol that is never read, one that fsspec does not know, or no beginning.
    """
    for name in names:
        protocol = protocol_of(name) or name.lower()
        if protocol in _NEVER or "::" in name:
            raise Gen2EmbedError(
                f"remote_images has {name!r}, which is never read; name a protocol such as s3, hf, https"
            )
        if "://" in name and not name.endswith("/"):
            raise Gen2EmbedError(f"remote_images has {name!r}; end the beginning of an address in a slash")
        if protocol not in _HTTP:
            _file_system(protocol)


def _file_system(protocol: str) -> Any:
    """Return the class of fsspec that reads a protocol."""
    import fsspec

    try:
        return fsspec.get_filesystem_class(protocol)
    except (ValueError, ImportError) as error:
        raise Gen2EmbedError(
            f"remote_images has {protocol!r}, which cannot be read here ({one_line(error)}); install what reads it, or "
            "download the images"
        ) from error


def shown(address: str) -> str:
    """Return an address without user, password and what follows a question mark, which may be a signature.

    Args:
        address: The address.
    """
    return re.sub(r"//[^/@]*@", "//", address.partition("?")[0].partition("#")[0])


def read_remote(address: str, allowed: Sequence[str], max_bytes: int, seconds: float = SECONDS) -> bytes:
    """Read a whole file of another machine.

    Args:
        address: Its address.
        allowed: What may be read; see `require_allowed_names`.
        max_bytes: The largest accepted size.
        seconds: The longest time of one try.

    Raises:
        ImageError: It is not allowed, not there, too large, or cannot be read.
        OSError: This machine has no memory or descriptors left.
    """
    _require_allowed(address, allowed)
    http = protocol_of(address) in _HTTP
    name, most = shown(address), max_bytes + 1
    fault: BaseException | None = None
    for number in range(TRIES):
        if number:
            time.sleep(WAIT * 2 ** (number - 1))
        try:
            data = _within(
                seconds, lambda: _http_bytes(address, allowed, most, seconds) if http else _bytes(address, most)
            )
        except (ImageError, FileNotFoundError, PermissionError, IsADirectoryError) as error:
            fault = error
            break
        except Exception as error:  # every file system raises its own kinds
            if isinstance(error, MemoryError) or getattr(error, "errno", None) in _OF_THIS_MACHINE:
                raise
            fault = error
            if isinstance(error, HTTPError) and error.code < 500 and error.code not in (408, 429):
                break
            continue
        if len(data) > max_bytes:
            raise ImageError(name, f"more than the limit of {max_bytes} bytes", "shrink it")
        return data
    if isinstance(fault, ImageError):
        raise fault
    if isinstance(fault, FileNotFoundError) or (isinstance(fault, HTTPError) and fault.code in (404, 410)):
        raise ImageError(name, "not found", "correct the address in the data") from fault
    said = shown(one_line(fault)) if fault else ""
    raise ImageError(
        name, f"cannot be read ({type(fault).__name__}: {said})", "try again later, or download it"
    ) from fault


def _require_allowed(address: str, allowed: Sequence[str]) -> None:
    protocol = protocol_of(address)
    named = any(address.startswith(one) if "://" in one else protocol == one.lower() for one in allowed)
    path = urlsplit(address).path
    if "::" in address or protocol in _NEVER or ".." in path.split("/") or "%2e" in path.lower():
        raise ImageError(shown(address), "such an address is never read", "correct it in the data")
    if not named:
        raise ImageError(
            shown(address),
            "nothing is fetched from a URL" + (" of which --remote_images says nothing" if allowed else ""),
            f"download it, and pass the path of the file, or name it with --remote_images {protocol}",
        )


def _within(seconds: float, read: Callable[[], bytes]) -> bytes:
    """Run a read in a thread of its own, and give it up after some time; the thread ends with the read."""
    outcome: list[Any] = [None, None]

    def run() -> None:
        try:
            outcome[0] = read()
        except BaseException as error:
            outcome[1] = error

    thread = threading.Thread(target=run, name="gen2embed-remote", daemon=True)
    thread.start()
    thread.join(seconds)
    if thread.is_alive():
        raise TimeoutError(f"no answer within {seconds:g} seconds")
    if outcome[1] is not None:
        raise outcome[1]
    return bytes(outcome[0])


def _bytes(address: str, most: int) -> bytes:
    import fsspec

    files, path = fsspec.core.url_to_fs(address)
    with files.open(path, "rb") as file:
        return bytes(file.read(most))


def _http_bytes(address: str, allowed: Sequence[str], most: int, seconds: float) -> bytes:
    opener = OpenerDirector()
    kinds = (ProxyHandler, HTTPHandler, HTTPSHandler, HTTPDefaultErrorHandler, HTTPErrorProcessor)
    for handler in (*(kind() for kind in kinds), _Redirects(allowed)):
        opener.add_handler(handler)
    parts = urlsplit(address)
    plain = parts._replace(path=quote(parts.path, safe="/%:@!$&'()*+,;=~"), fragment="").geturl()
    request = Request(plain, headers={"User-Agent": "gen2embed", "Accept": "image/*"})  # noqa: S310
    with opener.open(request, timeout=seconds) as answer:
        data = bytes(answer.read(most))
        stated = answer.headers.get("Content-Length", "")
    if stated.isdigit() and len(data) < min(int(stated), most):
        raise ConnectionError(f"cut short, {len(data)} of {stated} bytes")
    return data


class _Redirects(HTTPRedirectHandler):
    """Follows a redirect only to what the user allows.

    Args:
        allowed: See `require_allowed_names`.
    """

    def __init__(self, allowed: Sequence[str]) -> None:
        self._allowed = allowed

    def redirect_request(self, req: Request, *rest: Any) -> Request | None:
        """Check the place that the answer names, and go there."""
        _require_allowed(urljoin(req.full_url, rest[-1]), self._allowed)
        return super().redirect_request(req, *rest)
