"""What mteb knows of Gen2Embed after it was imported, and what happens where it cannot be taught."""

import dataclasses
import hashlib
import importlib
import json
import os
import shutil
from pathlib import Path
from typing import Any

import mteb
import pytest
from mteb.models.model_implementations import MODEL_REGISTRY
from preloaded import Preloaded
from safetensors.torch import load_file, save_file

from gen2embed_mteb.embedder.families import family_of
from gen2embed_mteb.embedder.prompts.strategies import STRATEGIES, HierarchicalPrompt
from gen2embed_mteb.mini import model_dir
from gen2embed_mteb.mini.benchmark import MMEB_MINI
from gen2embed_mteb.mmeb.datasets import MMEB
from gen2embed_mteb.mteb_plugin import registration
from gen2embed_mteb.mteb_plugin.models import model_table as models
from gen2embed_mteb.mteb_plugin.models import revisions
from gen2embed_mteb.mteb_plugin.models.model_metas import as_meta

HUB_MODELS = {model.name: model for model in models.HUB_MODELS}


@pytest.fixture
def registered_again(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Registers again, with GEN2EMBED_MODEL as the test sets it, and puts mteb's registry back afterwards."""
    kept = dict(MODEL_REGISTRY)

    def register(chosen: str | None) -> Any:
        if chosen is None:
            monkeypatch.delenv("GEN2EMBED_MODEL", raising=False)
        else:
            monkeypatch.setenv("GEN2EMBED_MODEL", chosen)
        registration.install()
        return mteb.get_model_meta("gen2embed")

    yield register
    MODEL_REGISTRY.clear()
    MODEL_REGISTRY.update(kept)


def test_the_default_is_the_papers(registered_again: Any) -> None:
    meta = registered_again(None)
    assert meta.name == "Gen2Embed/Qwen2-VL-2B-Instruct"
    assert meta is mteb.get_model_meta("gen2embed-qwen2-vl-2b") is mteb.get_model_meta(meta.name)
    assert (meta.embed_dim, meta.max_tokens, meta.n_parameters) == (1536, 32768, 2208985600)
    assert meta.n_active_parameters == 2208985600 - 151936 * 1536
    assert meta.memory_usage_mb == 4213  # two bytes a parameter
    assert meta.modalities == ["text", "image"]
    assert meta.use_instructions is True
    assert meta.training_datasets is None  # its makers do not say
    assert meta.revision.startswith("895c3a49bc3fa70a340399125c650a463535e71c-")


@pytest.mark.parametrize("name", HUB_MODELS)
def test_models_have_complete_records(name: str) -> None:
    meta = mteb.get_model_meta(name)
    (alias,) = HUB_MODELS[name].aliases
    assert mteb.get_model_meta(alias) is meta
    for field in (
        "release_date",
        "n_parameters",
        "n_embedding_parameters",
        "memory_usage_mb",
        "max_tokens",
        "embed_dim",
    ):
        assert getattr(meta, field), field
    assert meta.reference == f"https://huggingface.co/{HUB_MODELS[name].source}"
    assert meta.adapted_from and "/" in meta.adapted_from
    assert HUB_MODELS[name].has_article == ("2508.00955" in (meta.citation or ""))
    meta._check_requirements()  # needs no extra of mteb's, not even torchvision


def test_families_and_released_checkpoints_are_all_there() -> None:
    expected = {
        *(f"Gen2Embed/Qwen2-VL-{size}-Instruct" for size in ("2B", "7B")),
        *(f"Gen2Embed/Qwen2.5-VL-{size}-Instruct" for size in ("3B", "7B")),
        *(f"Gen2Embed/Qwen3-VL-{size}-Instruct" for size in ("2B", "4B", "8B")),
        "Gen2Embed/llava-v1.6-mistral-7b-hf",
        *(f"Y-J-Ju/SaHa-Qwen2-VL-{size}-Instruct" for size in ("2B", "7B")),
        *(f"DeepGlint-AI/UniME-{name}" for name in ("Phi3.5-V-4.2B", "LLaVA-1.6-7B", "LLaVA-OneVision-7B")),
    }
    assert set(HUB_MODELS) == expected
    layouts = {name: HUB_MODELS[name].layout for name in expected if HUB_MODELS[name].layout == "official"}
    assert set(layouts) == {name for name in expected if name.startswith("Y-J-Ju/")}
    assert family_of("qwen3_vl") and family_of("llava_next")


def test_training_data_of_the_released_checkpoints_overlaps_with_tasks_that_exist() -> None:
    known = importlib.import_module("mteb.get_tasks")._TASKS_REGISTRY
    trained_on = mteb.get_model_meta("Y-J-Ju/SaHa-Qwen2-VL-2B-Instruct").training_datasets
    assert trained_on <= set(known)
    ours = {name for name in trained_on if name.startswith("MMEB-")}
    assert ours == {f"MMEB-{dataset.name}" for dataset in MMEB.datasets if dataset.in_domain}
    released = mteb.get_model_meta("Y-J-Ju/SaHa-Qwen2-VL-2B-Instruct")
    assert released.is_zero_shot_on(["MMEB-ImageNet-1K"]) is False
    assert released.is_zero_shot_on(["MMEB-ImageNet-A"]) is True


def test_the_embedded_model_is_described_as_it_is() -> None:
    tensors = load_file(model_dir() / "model.safetensors")
    body = {name: tensor for name, tensor in tensors.items() if not name.startswith("lm_head")}
    meta = mteb.get_model_meta("gen2embed-mini")
    assert meta.name == "Gen2Embed/gen2embed-mini"
    assert meta.n_parameters == sum(tensor.numel() for tensor in body.values())
    assert meta.embed_dim == 192
    assert meta.training_datasets == set()
    loaded = mteb.get_model("gen2embed-mini", device="cpu")
    assert loaded.mteb_model_meta.revision == meta.revision
    assert loaded.model.get_embedding_dimension() == meta.embed_dim
    assert sum(parameter.numel() for parameter in loaded.model.parameters()) == meta.n_parameters
    assert loaded.mteb_model_meta.to_dict()["revision"] == meta.revision


def test_variable_names_another_model(registered_again: Any, tiny_dir: Any, tmp_path: Path) -> None:
    assert registered_again("Qwen/Qwen3-VL-4B-Instruct").name == "Gen2Embed/Qwen3-VL-4B-Instruct"
    assert registered_again("gen2embed-mini") is mteb.get_model_meta("gen2embed-mini")
    unknown = registered_again("someone/a-model")
    assert (unknown.name, unknown.embed_dim, unknown.reference) == (
        "Gen2Embed/a-model",
        None,
        "https://huggingface.co/someone/a-model",
    )
    shutil.copytree(tiny_dir("qwen2_5_vl"), tmp_path / "my-model")
    meta = registered_again(str(tmp_path / "my-model"))
    assert (meta.name, meta.embed_dim, meta.max_tokens) == ("Gen2Embed/my-model", 32, 4096)
    encoder = mteb.get_model("gen2embed", device="cpu")
    assert encoder.model[0].model.config.model_type == "qwen2_5_vl"
    assert sum(parameter.numel() for parameter in encoder.model.parameters()) == meta.n_parameters


def test_a_directory_called_as_a_listed_model_is_not_taken_for_it(
    registered_again: Any, tiny_dir: Any, tmp_path: Path
) -> None:
    copy = shutil.copytree(tiny_dir("qwen2_vl"), tmp_path / "Qwen2-VL-2B-Instruct")
    meta, listed = registered_again(str(copy)), mteb.get_model_meta("Gen2Embed/Qwen2-VL-2B-Instruct")
    assert (meta.name, meta.embed_dim, meta.loader_kwargs["source"]) == (listed.name, 32, str(copy))
    assert (listed.embed_dim, listed.loader_kwargs["source"]) == (1536, "Qwen/Qwen2-VL-2B-Instruct")
    assert meta.revision != listed.revision


def test_variable_that_names_no_model_leaves_the_name_unknown_rather_than_another_model(
    registered_again: Any, tmp_path: Path
) -> None:
    with pytest.raises(FileNotFoundError, match="GEN2EMBED_MODEL=/nowhere"):
        registered_again("/nowhere")
    assert "gen2embed" not in MODEL_REGISTRY
    with pytest.raises(ValueError, match="not a model that Gen2Embed can load"):
        registered_again(str(tmp_path))
    assert mteb.get_model_meta("gen2embed-mini").embed_dim == 192


def test_revision_follows_weights_prompt_and_layout(
    tiny_dir: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    copy = Path(shutil.copytree(tiny_dir("qwen2_vl"), tmp_path / "copy"))
    first = revisions.revision_of(str(copy), "native")
    assert first == revisions.revision_of(str(tiny_dir("qwen2_vl")), "native")  # by content, not by place
    (copy / "README.md").write_text("words", encoding="utf-8")
    assert revisions.revision_of(str(copy), "native") == first
    weights, inputs = first.split("-")
    assert revisions.revision_of(str(copy), "official").startswith(f"{weights}-")
    assert revisions.revision_of(str(copy), "official") != first
    tensors = load_file(copy / "model.safetensors")
    name = next(iter(tensors))
    tensors[name].view(-1)[0] += 1e-3
    save_file(tensors, copy / "model.safetensors", {"format": "pt"})
    changed = revisions.revision_of(str(copy), "native")
    assert changed != first and changed.endswith(f"-{inputs}")
    other = dataclasses.replace(STRATEGIES["hierarchical"], query_text="\nIn one word.")
    monkeypatch.setattr(revisions, "strategy", lambda _: other)
    assert revisions.revision_of(str(copy), "native") not in (first, changed)


def test_revision_of_an_adapter_follows_its_base_as_well(
    tiny_dir: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base, adapter = Path(shutil.copytree(tiny_dir("qwen2_vl"), tmp_path / "base")), tmp_path / "adapter"
    adapter.mkdir()
    config = adapter / "adapter_config.json"
    config.write_text(json.dumps({"base_model_name_or_path": str(base)}), encoding="utf-8")
    first = revisions.revision_of(str(adapter), "native")
    (base / "config.json").write_text("{}", encoding="utf-8")
    assert revisions.revision_of(str(adapter), "native") != first
    config.write_text(json.dumps({"base_model_name_or_path": "someone/a-model"}), encoding="utf-8")
    found = []
    for commit in ("a" * 40, "b" * 40):
        monkeypatch.setattr(revisions, "hub_commit", lambda _, commit=commit: commit)
        found.append(revisions.revision_of(str(adapter), "native"))
    assert found[0] != found[1]


def test_every_record_of_the_table_has_its_own_revision(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(revisions, "hub_commit", lambda hub_id: hashlib.sha1(hub_id.encode()).hexdigest())
    found = {name: as_meta(model).revision for name, model in HUB_MODELS.items()}
    assert len(set(found.values())) == len(found)
    assert set(models.COMMITS) == {model.source for model in HUB_MODELS.values() if model.name.startswith("Gen2Embed/")}


def test_models_of_unime_have_its_prompt(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(revisions, "hub_commit", lambda _: "a" * 40)
    meta = mteb.get_model_meta("unime-phi3.5-v")
    assert meta.loader_kwargs == {
        "source": "DeepGlint-AI/UniME-Phi3.5-V-4.2B",
        "layout": "native",
        "prompt_mode": "unime",
    }
    assert revisions.revision_of("x/y", "native", prompt_mode="unime") != revisions.revision_of("x/y", "native")


def test_options_of_get_model_are_kept_apart_from_the_default() -> None:
    plain = mteb.get_model("gen2embed-mini", device="cpu", prompt_mode="none")
    assert plain.model.prompt_mode == "none"
    assert plain.mteb_model_meta.experiment_name == "prompt_mode_none"
    prompt = HierarchicalPrompt(query_text="\nIn one word:")
    own = mteb.get_model("gen2embed-mini", device="cpu", prompt_mode=dataclasses.asdict(prompt))
    assert own.model.prompt == prompt
    other = mteb.get_model("gen2embed-mini", device="cpu", prompt_mode={"query_text": "\nAnother word:"})
    assert own.mteb_model_meta.experiment_name != other.mteb_model_meta.experiment_name
    with pytest.raises(TypeError, match="asdict"):
        mteb.get_model("gen2embed-mini", device="cpu", prompt_mode=prompt)


@pytest.mark.parametrize(("name", "form"), [("MMEB", MMEB), ("MMEB-mini", MMEB_MINI)])
def test_benchmarks_and_their_tasks(name: str, form: Any) -> None:
    bench = mteb.get_benchmark(name)
    assert [task.metadata.name for task in bench.tasks] == [f"{name}-{dataset.name}" for dataset in form.datasets]
    groupings = {aggregation.name: aggregation.groups for aggregation in bench.aggregations[1:]}
    assert [group.label for group in groupings["Meta-task"]] == ["Classification", "VQA", "Retrieval", "Grounding"]
    assert [group.label for group in groupings["Domain"]] == ["IND", "OOD"]
    if name == "MMEB":
        assert [len(group.tasks) for group in groupings["Meta-task"]] == [10, 10, 12, 4]
        assert [len(group.tasks) for group in groupings["Domain"]] == [20, 16]
    for task in bench.tasks:
        assert task.metadata.is_filled(), task
        assert task.metadata.main_score == "mmeb_precision_at_1"
        assert task.info.name in task.metadata.description
    queries = {task.info.form: task.metadata.category for task in bench.tasks}
    assert queries["label"] == "it2t" and queries["text-to-image"] == "t2it" and queries["image-to-image"] == "it2it"


def test_caption_tasks_are_complete() -> None:
    for name in ("SugarCrepe++", "SugarCrepe++-mini"):
        task = mteb.get_task(name)
        assert task.metadata.is_filled()
        assert len(task.hf_subsets) == 5


def test_registering_twice_changes_nothing(registered_again: Any) -> None:
    tasks = importlib.import_module("mteb.get_tasks")
    before = (list(MODEL_REGISTRY), len(tasks._TASKS_REGISTRY), len(tasks.TASK_LIST))
    registered_again(os.environ.get("GEN2EMBED_MODEL"))
    assert (sorted(before[0]), *before[1:]) == (
        sorted(MODEL_REGISTRY),
        len(tasks._TASKS_REGISTRY),
        len(tasks.TASK_LIST),
    )


def test_mteb_that_keeps_tasks_elsewhere_still_gets_the_models(
    registered_again: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delattr(importlib.import_module("mteb.get_tasks"), "_TASKS_REGISTRY")
    for name in [name for name in MODEL_REGISTRY if "gen2embed" in name.lower()]:
        del MODEL_REGISTRY[name]
    with pytest.raises(RuntimeError, match=r"tasks: AttributeError.*pip install 'mteb>=2\.26,<3'"):
        registered_again("gen2embed-mini")
    assert MODEL_REGISTRY["gen2embed"].name == "Gen2Embed/gen2embed-mini"


def test_mteb_of_another_make_is_imported_with_one_warning(tmp_path: Path, preloaded_stock: Preloaded) -> None:
    (tmp_path / "mteb").mkdir()
    (tmp_path / "mteb" / "__init__.py").write_text("works = True\n", encoding="utf-8")
    code = (
        f"import sys; sys.path.insert(0, {str(tmp_path)!r}); import _gen2embed_hook; _gen2embed_hook.start(); "
        "import mteb; print(mteb.works)"
    )
    result = preloaded_stock.run(["-c", code], cwd=tmp_path, check=True, GEN2EMBED_NO_HOOK=None)
    assert result.stdout.split() == ["True"]
    assert result.stderr.count("RuntimeWarning") == 1
    assert "pip install 'mteb>=2.26,<3'" in result.stderr
