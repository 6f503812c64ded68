"""A small server with vLLM's HTTP interface for embeddings, which answers with a model of ours, and can do wrong."""

from __future__ import annotations

import base64
import io
import json
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import numpy as np
import torch
from PIL import Image


@dataclass
class State:
    """What the server does.

    Attributes:
        model: The model that answers.
        fault: What it does wrong; empty for nothing.
        requests: The bodies of all requests to `/v1/embeddings`.
        headers: The headers of the last request.
        paths: The paths of all requests.
    """

    model: Any
    fault: str = ""
    requests: list[dict[str, Any]] = field(default_factory=list)
    headers: dict[str, str] = field(default_factory=dict)
    paths: list[str] = field(default_factory=list)


@contextmanager
def serving(model: Any) -> Iterator[tuple[str, State]]:
    """Yield the server's address, and its state."""
    state = State(model)
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"state": state}))
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", state
    finally:
        server.shutdown()
        server.server_close()


class _Handler(BaseHTTPRequestHandler):
    state: State

    def log_message(self, *_: Any) -> None:
        """Write nothing."""

    def do_GET(self) -> None:
        self.state.headers, _ = dict(self.headers), self.state.paths.append(self.path)
        models = [] if self.state.fault == "no models" else [{"id": "tiny"}]
        self._answer(200, json.dumps({"data": models}).encode())

    def do_POST(self) -> None:
        self.state.headers, _ = dict(self.headers), self.state.paths.append(self.path)
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.state.requests.append(body)
        fault = self.state.fault
        if fault == "slow":
            time.sleep(0.6)
        if fault == "redirect":
            self._answer(302, b"", {"Location": "http://169.254.169.254/latest"})
        elif fault == "error":
            self._answer(500, json.dumps({"error": {"message": "out of\nmemory", "code": 500}}).encode())
        elif fault == "no json":
            self._answer(200, b"<html>")
        elif fault == "no data":
            self._answer(200, b'{"object": "list"}')
        else:
            vector = self._vector(body, fault)
            self._answer(200, json.dumps({"data": [{"index": 0, "embedding": vector}]}).encode())

    def _vector(self, body: dict[str, Any], fault: str) -> list[float]:
        model = self.state.model
        with torch.no_grad():
            if "input" in body:  # without the template
                return _bare(model, body["input"][0])
            (message,) = body["messages"]
            texts = [part["text"] for part in message["content"] if part["type"] == "text"]
            images = [_opened(part) for part in message["content"] if part["type"] == "image_url"]
            if fault == "bypassed template":
                return _bare(model, "".join(texts) or " ")
            given = {"text": "".join(texts), "image": [] if fault == "dropped images" else images}
            side = "document" if fault == "no task" else body["chat_template_kwargs"]["task"]
            features = model.preprocess([given], task=side)
            if fault == "mean pooling":
                states = model[0](features)["token_embeddings"].mean(1)
                return torch.nn.functional.normalize(states)[0].tolist()
            vector = model(features)["sentence_embedding"][0]
        if fault == "half":
            vector = torch.from_numpy(np.random.default_rng(0).normal(0, 5e-3, len(vector))) + vector
            vector = torch.nn.functional.normalize(vector, dim=0)
        changed = {"nan": vector * float("nan"), "dimension": vector[:-1], "norm": vector * 3, "zero": vector * 0}
        return changed.get(fault, vector).tolist()

    def _answer(self, status: int, data: bytes, more: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(data)), **(more or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        with suppress(OSError):  # the client may have gone
            self.wfile.write(data)


def _bare(model: Any, text: str) -> list[float]:
    features = model.tokenizer([text], return_tensors="pt")
    features["mm_token_type_ids"] = torch.zeros_like(features["input_ids"])
    features["modality"] = "text"
    return model(dict(features))["sentence_embedding"][0].tolist()


def _opened(part: dict[str, Any]) -> Image.Image:
    head, _, data = part["image_url"]["url"].partition(",")
    assert head == "data:image/png;base64"
    return Image.open(io.BytesIO(base64.b64decode(data)))
