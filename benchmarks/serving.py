"""Starts vLLM on exported folders, and writes how its vectors compare with the local model's, per kind of input.

python benchmarks/serving.py --vllm PYTHON --output benchmarks/results/serving.json

PYTHON is the interpreter of an environment with vLLM. The models are the embedded one and tiny ones with random
weights, of their real classes and processors; `--families` names the tiny ones. Each server is stopped again. Settings
of the server's own, such as VLLM_CPU_KVCACHE_SPACE, are taken from the environment.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from gen2embed_mteb import Gen2Embed
from gen2embed_mteb.embedder.export import export
from gen2embed_mteb.errors import Gen2EmbedError
from gen2embed_mteb.evaluation.run import installed_versions
from gen2embed_mteb.serving.check import check_server
from gen2embed_mteb.serving.command import text_of
from gen2embed_mteb.serving.comparison import Report
from gen2embed_mteb.serving.http_client import EmbeddingServer
from gen2embed_mteb.storage.developer_files import write_json

FAMILIES = ("qwen2_vl", "qwen2_5_vl", "llava_next", "qwen3_vl")
_LONGEST_START = 300.0


def main() -> None:
    """Check every model, print the tables, and write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--vllm", required=True, help="interpreter of an environment with vLLM")
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--families", nargs="*", default=list(FAMILIES))
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    models: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as place:
        for name in ("gen2embed-mini", *arguments.families):
            folder = export(_source(name, Path(place)), Path(place) / f"{name}-exported", device="cpu")
            models[name] = {}
            for way, flags in (("detected", ()), ("string", ("--chat-template-content-format", "string"))):
                try:
                    report = checked(arguments.vllm, folder, flags)
                except Gen2EmbedError as error:
                    models[name][way] = {"error": str(error).replace(place, "")}
                else:
                    models[name][way] = report.as_json()
                    print(f"{name}, content format {way}\n{text_of(report)}\n", flush=True)
                if name != "gen2embed-mini":
                    break
    versions = {**installed_versions(), "vllm": _version(arguments.vllm)}
    write_json(arguments.output, {"models": models, "versions": versions, "command": "python benchmarks/serving.py"})


def checked(python: str, folder: Path, flags: Sequence[str] = ()) -> Report:
    """Return the comparison of vLLM with the local model.

    Args:
        python: The interpreter of vLLM's environment.
        folder: The exported folder.
        flags: Further flags of `vllm serve`.

    Raises:
        Gen2EmbedError: The server did not start, or cannot be used.
    """
    model = Gen2Embed(folder, device="cpu", model_kwargs={"dtype": "float32"})
    with vllm_server(python, folder, flags) as url:
        return check_server(EmbeddingServer(url, timeout=120), model)


@contextlib.contextmanager
def vllm_server(python: str, folder: Path, flags: Sequence[str] = ()) -> Iterator[str]:
    """Start vLLM on a folder, wait until it answers, yield its address, and stop it.

    Args:
        python: The interpreter of vLLM's environment.
        folder: The exported folder.
        flags: Further flags of `vllm serve`.

    Raises:
        Gen2EmbedError: The server ended, or did not answer within five minutes; the end of its output is told.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [python, "-m", "vllm.entrypoints.cli.main", "serve", str(folder), "--runner", "pooling"]
    command += ["--convert", "embed", "--dtype", "float32", "--host", "127.0.0.1", "--port", str(port)]
    command += ["--enforce-eager", "--limit-mm-per-prompt", '{"image": 2, "video": 0}', *flags]
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "GEN2EMBED"))}
    environment |= {"HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1"}
    with tempfile.TemporaryFile() as log:
        server = subprocess.Popen(  # noqa: S603 - the developer's own interpreter
            command, stdout=log, stderr=log, env=environment, start_new_session=True
        )
        try:
            _wait(server, f"http://127.0.0.1:{port}", log)
            yield f"http://127.0.0.1:{port}"
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(server.pid, signal.SIGTERM)
            with contextlib.suppress(subprocess.TimeoutExpired):
                server.wait(30)
            with contextlib.suppress(ProcessLookupError):
                os.killpg(server.pid, signal.SIGKILL)
            server.wait()


def _wait(server: subprocess.Popen[bytes], url: str, log: Any) -> None:
    until = time.monotonic() + _LONGEST_START
    while time.monotonic() < until and server.poll() is None:
        try:
            EmbeddingServer(url, timeout=5).model_name()
        except Gen2EmbedError:
            time.sleep(0.5)
        else:
            return
    log.seek(0)
    said = log.read()[-3000:].decode("utf-8", "replace")
    raise Gen2EmbedError(f"vLLM did not start ({server.poll()}): {said}")


def _source(name: str, place: Path) -> str:
    if name == "gen2embed-mini":
        return name
    sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests" / "helpers"))
    from tiny_models import write_tiny

    return str(write_tiny(name, place / name))


def _version(python: str) -> str:
    words = [python, "-c", "import vllm; print(vllm.__version__)"]
    done = subprocess.run(words, capture_output=True, text=True, check=True)  # noqa: S603 - as above
    return done.stdout.split()[-1]


if __name__ == "__main__":
    main()
