"""Sends the fixed inputs to a server and compares its vectors with those of the local model.

A request is a chat request of embeddings: `messages` with `chat_template_kwargs` that name the side. Plain `input`, as
OpenAI clients send it, bypasses the chat template, and with it the prompt: it is sent once, to say what it gives.
"""

from __future__ import annotations

import base64
import io
from typing import TYPE_CHECKING, Any

import numpy as np

from gen2embed_mteb.embedder.model_folder.serving_card import adds_special_tokens
from gen2embed_mteb.names import Side
from gen2embed_mteb.serving.comparison import Compared, Report, compare
from gen2embed_mteb.serving.http_client import EmbeddingServer, RefusedError
from gen2embed_mteb.serving.samples import SIDES, Sample, samples

if TYPE_CHECKING:
    from PIL import Image

    from gen2embed_mteb.embedder.model import Gen2Embed


def check_server(
    server: EmbeddingServer, model: Gen2Embed, *, served_name: str = "", precision: str = "float32"
) -> Report:
    """Compare the vectors of a server with those of a model.

    Args:
        server: The server.
        model: The exported folder, loaded here in float32.
        served_name: The name of the model on the server; empty takes the first one that it lists.
        precision: The type of the server's weights.

    Raises:
        Gen2EmbedError: The server cannot be reached, or does not answer in time.
    """
    name = served_name or server.model_name()
    given = samples(with_images=model.takes_images)
    local = local_vectors(model, given)
    begins = adds_special_tokens(model)
    rows = [
        _ask(server, sample.kind, side, local[side][number], request_of(sample, side, name, add_special_tokens=begins))
        for number, sample in enumerate(given)
        for side in SIDES
    ]
    text = given[0]
    body = {"model": name, "input": [text.text], "encoding_format": "float"}
    plain = [_ask(server, "plain input", side, local[side][0], body) for side in SIDES]
    return Report(rows, precision, plain)


def local_vectors(model: Any, given: list[Sample]) -> dict[Side, np.ndarray]:
    """Return the vectors of a model for each side, (n, d), one input per batch.

    Args:
        model: A `SentenceTransformer`.
        given: The n inputs.
    """
    inputs = [sample.as_input() for sample in given]
    options: dict[str, Any] = {"batch_size": 1, "show_progress_bar": False}
    return {
        "query": np.asarray(model.encode_query(inputs, **options)),
        "document": np.asarray(model.encode_document(inputs, **options)),
    }


def request_of(sample: Sample, side: Side, name: str, *, add_special_tokens: bool) -> dict[str, Any]:
    """Return the body of the request that gives an input's vector.

    Args:
        sample: The input.
        side: Its side.
        name: The model's name on the server.
        add_special_tokens: See `adds_special_tokens`.
    """
    parts: list[dict[str, Any]] = [
        {"type": "image_url", "image_url": {"url": data_url(image)}} for image in sample.images
    ]
    if sample.text or not parts:
        parts.append({"type": "text", "text": sample.text})
    return {
        "model": name,
        "messages": [{"role": "user", "content": parts}],
        "encoding_format": "float",
        "chat_template_kwargs": {"task": side},
        "add_generation_prompt": True,
        "add_special_tokens": add_special_tokens,
    }


def data_url(image: Image.Image) -> str:
    """Return an image as a `data:` address that holds its PNG file."""
    file = io.BytesIO()
    image.save(file, "PNG")
    return f"data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}"


def _ask(server: EmbeddingServer, kind: str, side: Side, local: Any, body: dict[str, Any]) -> Compared:
    try:
        return compare(kind, side, local, server.embed(body))
    except RefusedError as error:
        return Compared(kind, side, fault=str(error))
