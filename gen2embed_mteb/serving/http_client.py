"""Requests to a server of embeddings: JSON over HTTP, one host, no redirect, bounded answers.

The server's address is the user's. Nothing that the server answers leads to another address: `http.client` follows no
redirect and reads no settings of proxies.
"""

from __future__ import annotations

import http.client
import json
import math
from typing import Any
from urllib.parse import SplitResult, urlsplit

import numpy as np
import numpy.typing as npt

from gen2embed_mteb.errors import Gen2EmbedError, one_line

_MOST_BYTES = 64 << 20
_MOST_TOLD = 300


class RefusedError(Gen2EmbedError):
    """The server answered, but with no usable vector; other requests may still succeed."""


class EmbeddingServer:
    """A server that answers `POST /v1/embeddings`, as vLLM does.

    Args:
        url: Its address, with or without `/v1` at the end.
        timeout: The longest wait for an answer, in seconds.
        key: What the server asks for as `Authorization: Bearer …`; empty for nothing.

    Raises:
        Gen2EmbedError: The address is none of a server.
    """

    def __init__(self, url: str, *, timeout: float = 60.0, key: str = "") -> None:
        self.url = url
        self._parts = _checked(url)
        self._prefix = self._parts.path.rstrip("/").removesuffix("/v1")
        self._timeout = timeout
        self._headers = {"Content-Type": "application/json", "Accept": "application/json"}
        if key:
            self._headers["Authorization"] = f"Bearer {key}"

    def model_name(self) -> str:
        """Return the name of the first model that the server has.

        Raises:
            Gen2EmbedError: There is no server at the address, or its answer is no list of models.
        """
        answer = self._json("GET", "/v1/models")
        try:
            return str(answer["data"][0]["id"])
        except (KeyError, IndexError, TypeError) as error:
            raise RefusedError(f"{self.url}/v1/models lists no model: {str(answer)[:_MOST_TOLD]}") from error

    def embed(self, body: dict[str, Any]) -> npt.NDArray[np.float64]:
        """Return the vector of one request.

        Args:
            body: The request: `model` with `messages` or `input`.

        Returns:
            The vector, (d,) float64, with whatever norm the server gave it.

        Raises:
            RefusedError: The server refused the request, or its answer holds no vector of finite numbers.
            Gen2EmbedError: There is no server at the address, or it does not answer in time.
        """
        answer = self._json("POST", "/v1/embeddings", body)
        try:
            vectors = [row["embedding"] for row in answer["data"]]
        except (KeyError, TypeError) as error:
            raise RefusedError(f"the answer holds no embedding: {str(answer)[:_MOST_TOLD]}") from error
        if len(vectors) != 1 or not isinstance(vectors[0], list) or not vectors[0]:
            raise RefusedError(f"the answer holds {len(vectors)} vectors, not one list of numbers")
        if not all(isinstance(value, int | float) and math.isfinite(value) for value in vectors[0]):
            raise RefusedError("the vector holds something that is no finite number (NaN, an infinity, or no number)")
        return np.asarray(vectors[0], np.float64)

    def _json(self, method: str, path: str, body: dict[str, Any] | None = None) -> Any:
        status, data, location = self._answer(method, self._prefix + path, body)
        if 300 <= status < 400:
            raise RefusedError(
                f"{path} answers {status}, a redirect to {location or 'nowhere'}, which is not followed; pass the "
                "address of the server itself"
            )
        if status != 200:
            raise RefusedError(f"{path} answers {status}: {_reason(data)}")
        try:
            return json.loads(data)
        except (ValueError, RecursionError) as error:
            raise RefusedError(f"{path} answers no JSON: {_reason(data)}") from error

    def _answer(self, method: str, path: str, body: dict[str, Any] | None) -> tuple[int, bytes, str]:
        host = self._parts.hostname or ""
        kind = http.client.HTTPSConnection if self._parts.scheme == "https" else http.client.HTTPConnection
        connection = kind(host, self._parts.port, timeout=self._timeout)
        try:
            connection.request(method, path, None if body is None else json.dumps(body).encode(), self._headers)
            response = connection.getresponse()
            data = response.read(_MOST_BYTES + 1)
            location = response.getheader("Location") or ""
        except TimeoutError as error:
            raise Gen2EmbedError(
                f"{self.url} gave no answer to {method} {path} within {self._timeout:g} seconds; look at the server's "
                "output, or pass a larger --timeout"
            ) from error
        except (OSError, http.client.HTTPException) as error:
            raise Gen2EmbedError(
                f"{self.url} cannot be reached ({type(error).__name__}: {one_line(error)}); is the server running? "
                "Start it with: vllm serve DIR --runner pooling --convert embed"
            ) from error
        finally:
            connection.close()
        if len(data) > _MOST_BYTES:
            raise RefusedError(f"{path} answers more than {_MOST_BYTES >> 20} MiB, which no vector has")
        return response.status, data, location


def _checked(url: str) -> SplitResult:
    try:
        parts = urlsplit(url)
        port = parts.port
    except ValueError as error:
        raise Gen2EmbedError(f"{url!r} is no address ({error}); pass one such as http://localhost:8000") from error
    if parts.scheme not in ("http", "https") or not parts.hostname or port == 0:
        raise Gen2EmbedError(f"{url!r} is no address of a server; pass one such as http://localhost:8000")
    if parts.username or parts.password or parts.query or parts.fragment:
        raise Gen2EmbedError(
            f"the address at {parts.hostname!r} has a user, a password, a query or a fragment; pass one such as "
            "http://localhost:8000, and a key by --api_key_variable"
        )
    return parts


def _reason(data: bytes) -> str:
    """Return what the server says went wrong, shortened."""
    text = data[:65536].decode("utf-8", "replace")
    try:
        found = json.loads(text)
        error = found.get("error", found)
        text = str(error.get("message", error) if isinstance(error, dict) else error)
    except (ValueError, RecursionError, AttributeError):
        pass
    return one_line(ValueError(text[:_MOST_TOLD] or "nothing"))
