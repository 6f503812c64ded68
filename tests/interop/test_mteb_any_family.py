"""mteb on models of any family: one of text alone runs all text tasks and no other, and revisions know the format."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import datasets
import mteb
import pytest
from mteb.mocks import MOCK_TASK_TEST_GRID
from mteb.mocks.mock_run import mock_run

from gen2embed_mteb import Gen2Embed
from gen2embed_mteb.mteb_plugin.models import model_table as models
from gen2embed_mteb.mteb_plugin.models import revisions
from gen2embed_mteb.mteb_plugin.models.model_files import facts_of
from gen2embed_mteb.mteb_plugin.models.model_metas import as_meta, meta_of, wrap


@pytest.mark.slow
@pytest.mark.exhaustive
def test_a_model_of_text_alone_runs_every_text_task(tiny: Any) -> None:
    datasets.disable_progress_bars()
    encoder = wrap(tiny("llama"))
    assert encoder.mteb_model_meta.modalities == ["text"]
    ran = {name for name, outcome in mock_run(encoder).items() if isinstance(outcome, mteb.TaskResult)}
    assert len(ran) == 28
    assert ran == {task.metadata.name for task in MOCK_TASK_TEST_GRID}


def test_modalities_are_read_from_the_files(tiny: Any, tiny_dir: Any) -> None:
    for name, expected in (("llama", ["text"]), ("gemma3", ["text", "image"])):
        assert meta_of(tiny(name)).modalities == expected
        row = models.Model(f"org/{name}", (), str(tiny_dir(name)), **facts_of(tiny_dir(name)))
        assert as_meta(row).modalities == expected


def test_the_revision_follows_the_rules_of_detection_only_where_they_are_used(
    tiny_dir: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = ("llama", "gemma3", "qwen3_vl", "qwen2_vl", "llava_next")
    asked = [(str(tiny_dir(name)), "native") for name in names] + [(str(tiny_dir("qwen3_vl")), "official")]
    before = [revisions.revision_of(*one) for one in asked] + [as_meta(row).revision for row in models.HUB_MODELS[:8]]
    monkeypatch.setattr(revisions, "DETECTION_VERSION", revisions.DETECTION_VERSION + 1)
    after = [revisions.revision_of(*one) for one in asked] + [as_meta(row).revision for row in models.HUB_MODELS[:8]]
    changed = [one != other for one, other in zip(before, after, strict=True)]
    assert changed[:6] == [True, True, True, False, False, False]
    assert changed[6:] == ["Qwen3-VL" in row.name for row in models.HUB_MODELS[:8]]


def test_the_revision_follows_the_model_s_own_template(tiny_dir: Any, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(tiny_dir("llama"), tmp_path / "model"))
    before = revisions.revision_of(str(folder), "native"), meta_of(Gen2Embed(folder, device="cpu")).revision
    path = folder / "chat_template.jinja"
    path.write_text(path.read_text().replace("assistant", "answer"))
    after = revisions.revision_of(str(folder), "native"), meta_of(Gen2Embed(folder, device="cpu")).revision
    assert before[0] != after[0]
    assert before[1] != after[1]


def test_the_revision_follows_a_gguf_file(tmp_path: Path) -> None:
    (tmp_path / "model.gguf").write_bytes(b"GGUF 1")
    before = revisions.revision_of(str(tmp_path), "native")
    (tmp_path / "model.gguf").write_bytes(b"GGUF 2")
    assert revisions.revision_of(str(tmp_path), "native") != before
