"""`gen2embed serving-check` against a server that answers as vLLM does, and against one that does wrong."""

from __future__ import annotations

import json
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from embedding_server import State, serving

from gen2embed_mteb import cli
from gen2embed_mteb.embedder.model_folder.serving_card import adds_special_tokens
from gen2embed_mteb.errors import Gen2EmbedError
from gen2embed_mteb.serving.check import check_server
from gen2embed_mteb.serving.command import text_of
from gen2embed_mteb.serving.comparison import Report
from gen2embed_mteb.serving.http_client import EmbeddingServer
from gen2embed_mteb.serving.samples import samples

pytestmark = pytest.mark.slow

KINDS = ["text", "unicode text", "long text", "empty text"]
WITH_IMAGES = ["image", "image and text", "image inside text", "two images"]


@pytest.fixture(scope="module")
def running(tiny: Any) -> Iterator[tuple[str, State]]:
    with serving(tiny("qwen2_vl")) as server:
        yield server


def checked(running: tuple[str, State], fault: str = "", precision: str = "float32") -> Report:
    url, state = running
    state.fault = fault
    state.requests.clear()
    return check_server(EmbeddingServer(url, timeout=20), state.model, precision=precision)


def test_a_server_with_the_same_vectors_passes(running: tuple[str, State]) -> None:
    report = checked(running)
    assert report.faults == []
    assert [row[0] for row in report.table()[1:]] == KINDS + WITH_IMAGES
    assert all(row.cosine is not None and row.cosine > 0.999999 for row in report.rows)
    bodies = running[1].requests
    assert len(bodies) == 2 * len(samples(with_images=True)) + 2
    assert bodies[0] == {
        "model": "tiny",
        "messages": [{"role": "user", "content": [{"type": "text", "text": "a red circle"}]}],
        "encoding_format": "float",
        "chat_template_kwargs": {"task": "query"},
        "add_generation_prompt": True,
        "add_special_tokens": False,
    }
    # Plain input goes round the template: the warning says so, and the check passes all the same.
    assert all(row.cosine is not None and row.cosine < 0.99 for row in report.plain)
    assert "Warning: plain" in text_of(report)


# What a server does wrong: the kinds that must fail, and what the first line about it says.
FAULTS = {
    "dropped images": (WITH_IMAGES, "cosine"),
    "bypassed template": (KINDS + WITH_IMAGES, "cosine"),
    "mean pooling": (KINDS + WITH_IMAGES, "cosine"),
    "half": (KINDS + WITH_IMAGES, "cosine"),
    "nan": (KINDS + WITH_IMAGES, "no finite number"),
    "dimension": (KINDS + WITH_IMAGES, "31 dimensions instead of 32"),
    "norm": (KINDS + WITH_IMAGES, "the norm is off by 2"),
    "zero": (KINDS + WITH_IMAGES, "the vector is zero"),
    "error": (KINDS + WITH_IMAGES, "/v1/embeddings answers 500: out of memory"),
    "no json": (KINDS + WITH_IMAGES, "answers no JSON: <html>"),
    "no data": (KINDS + WITH_IMAGES, "holds no embedding"),
    "redirect": (KINDS + WITH_IMAGES, "a redirect to http://169.254.169.254/latest, which is not followed"),
}


OFTEN = ("dropped images", "bypassed template", "nan", "norm", "redirect")


@pytest.mark.parametrize(
    "fault", [one if one in OFTEN else pytest.param(one, marks=pytest.mark.exhaustive) for one in FAULTS]
)
def test_what_a_server_does_wrong_is_found(running: tuple[str, State], fault: str) -> None:
    kinds, said = FAULTS[fault]
    report = checked(running, fault)
    assert {line.partition(",")[0] for line in report.faults} == set(kinds)
    assert said in report.faults[0]
    text = text_of(report)
    assert ("--chat-template-content-format openai" in text) == (fault == "dropped images")


@pytest.mark.exhaustive
def test_a_side_that_is_ignored_is_found(running: tuple[str, State]) -> None:
    report = checked(running, "no task")
    assert report.faults
    assert all(", query: cosine" in line for line in report.faults)


@pytest.mark.exhaustive
def test_a_server_in_bfloat16_has_a_lower_bar(running: tuple[str, State]) -> None:
    assert checked(running, "half").faults
    assert checked(running, "half", "bfloat16").faults == []


def test_special_tokens_are_asked_for_where_the_template_leaves_them_out(tiny: Any) -> None:
    assert not adds_special_tokens(tiny("qwen2_vl"))
    assert adds_special_tokens(tiny("llava_next"))


def test_no_answer_in_time_ends_the_check(running: tuple[str, State]) -> None:
    url, state = running
    state.fault = "slow"
    with pytest.raises(Gen2EmbedError, match=r"no answer to POST /v1/embeddings within 0.2 seconds; .*--timeout"):
        check_server(EmbeddingServer(url, timeout=0.2), state.model)


def test_the_command_line(running: tuple[str, State], exported: Any, capsys: Any, monkeypatch: Any) -> None:
    url, state = running
    folder = str(exported("qwen2_vl"))
    state.fault = ""
    monkeypatch.setenv("SERVER_KEY", "secret")
    assert cli.main(["serving-check", f"{url}/v1/", folder, "--api_key_variable", "SERVER_KEY"]) == 0
    printed = capsys.readouterr().out
    assert "two images         1.000000  1.000000\n" in printed
    assert "All vectors of the server are those of the local model." in printed
    assert state.headers["Authorization"] == "Bearer secret"
    assert set(state.paths) == {"/v1/models", "/v1/embeddings"}
    state.fault = "dropped images"
    assert cli.main(["serving-check", url, folder]) == 1
    assert "- image, query: cosine 0." in capsys.readouterr().out


def test_bad_addresses_and_servers_are_told_before_a_model_is_loaded(
    running: tuple[str, State], capsys: Any, tmp_path: Path
) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        nobody = f"http://127.0.0.1:{free.getsockname()[1]}"
    running[1].fault = "no models"
    for url, said in {
        nobody: f"{nobody} cannot be reached (ConnectionRefusedError",
        "localhost:8000": "'localhost:8000' is no address of a server; pass one such as http://localhost:8000",
        "ftp://localhost": "is no address of a server",
        "http://localhost:port": "is no address",
        "http://me:secret@localhost": "has a user, a password",
        running[0]: "/v1/models lists no model",
    }.items():
        assert cli.main(["serving-check", url, str(tmp_path)]) == 2
        told = capsys.readouterr().err
        assert said in told
        assert "secret" not in told
    assert cli.main(["serving-check", nobody, str(tmp_path), "--api_key_variable", "NOT_SET"]) == 2
    assert "NOT_SET of --api_key_variable is not set" in capsys.readouterr().err


def test_a_model_of_text_alone_is_asked_texts_alone() -> None:
    assert [sample.kind for sample in samples(with_images=False)] == ["text", *KINDS]
    assert all(min(image.size) >= 28 for sample in samples(with_images=True) for image in sample.images)


def test_a_report_is_json(running: tuple[str, State]) -> None:
    found = json.loads(json.dumps(checked(running).as_json(), allow_nan=False))
    assert found["worst_cosine"]["image"]["query"] > 0.999999
    assert found["faults"] == []
    assert [row["side"] for row in found["plain_input"]] == ["query", "document"]
