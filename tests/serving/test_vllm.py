"""A real vLLM, where `GEN2EMBED_VLLM` names the interpreter of an environment that has it."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path
from typing import Any

import pytest
from serving import checked
from tiny_models import FAMILIES
from vllm_rule import content_format

pytestmark = [
    pytest.mark.exhaustive,
    pytest.mark.skipif(not os.environ.get("GEN2EMBED_VLLM"), reason="GEN2EMBED_VLLM names no interpreter with vLLM"),
]

DETECT = """
import json, sys
from vllm.renderers.hf import _detect_content_format
print(json.dumps([_detect_content_format(text, default="string") for text in json.loads(sys.stdin.read())]))
"""


def test_vllm_detects_parts_in_every_exported_template(exported: Any) -> None:
    templates = [(exported(family) / "chat_template.jinja").read_text(encoding="utf-8") for family in FAMILIES]
    templates.append("{% for message in messages %}{{ message['content'] }}{% endfor %}")
    done = subprocess.run(
        [os.environ["GEN2EMBED_VLLM"], "-c", DETECT],
        input=json.dumps(templates),
        env={name: value for name, value in os.environ.items() if not name.startswith("PYTHON")},
        capture_output=True,
        text=True,
        check=True,
    )
    found = json.loads(done.stdout.splitlines()[-1])
    assert found == ["openai"] * len(FAMILIES) + ["string"]
    assert found == [content_format(template) for template in templates]


@pytest.mark.parametrize("family", ["gen2embed-mini", "qwen2_5_vl", "llava_next"])
def test_vllm_gives_the_same_vectors(family: str, exported: Any, tmp_path: Path) -> None:
    if family == "gen2embed-mini":
        from gen2embed_mteb.embedder.export import export

        folder = export(family, tmp_path / "mini", device="cpu")
    else:
        folder = exported(family)
    report = checked(os.environ["GEN2EMBED_VLLM"], folder)
    assert report.faults == []
    assert all(row.cosine is not None and row.cosine < 0.99 for row in report.plain)
