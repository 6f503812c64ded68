"""What is saved is the model that was in memory: read back, loaded by a clean process, and put in place at once."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import LoHaConfig, LoraConfig, get_peft_model, inject_adapter_in_model
from safetensors.torch import load_file, save_file
from samples import sample_of
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.modules import Dense, LayerNorm
from tiny_models import FAMILIES
from transformers import modeling_utils

import gen2embed_mteb
from gen2embed_mteb import Gen2Embed, cli
from gen2embed_mteb.embedder.export import export
from gen2embed_mteb.embedder.model_folder.adapters import new_adapter
from gen2embed_mteb.storage.atomic import ForeignFileError
from gen2embed_mteb.storage.owned_folder import LEDGER, LOCK

pytestmark = pytest.mark.slow

ROOT = Path(gen2embed_mteb.__file__).parents[1]
TEXTS = ["a red circle, b c d", "which of the two is larger?", "x"]

CLIENT = """
import json, sys
import gen2embed_mteb  # torchvision may be absent
import numpy as np
from sentence_transformers import SentenceTransformer
texts = json.loads(sys.argv[1])
for directory in sys.argv[2:]:
    model = SentenceTransformer(directory)
    assert type(model) is SentenceTransformer
    np.save(directory + ".npy", model.encode_query([{"text": text} for text in texts]))
"""


@pytest.fixture
def by_a_clean_process(preloaded: Any) -> Callable[..., list[np.ndarray]]:
    """The vectors that plain sentence-transformers makes of saved directories, in a process of its own."""

    def vectors(*directories: Path) -> list[np.ndarray]:
        done = preloaded.run(["-c", CLIENT, json.dumps(TEXTS), *map(str, directories)], check=True)
        assert "MISSING" not in done.stderr
        assert "UNEXPECTED" not in done.stderr
        return [np.load(f"{directory}.npy") for directory in directories]

    return vectors


def shaken(model: Any) -> Any:
    """The model with an adapter that matters, as after training."""
    torch.manual_seed(4)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * 0.1)
    return model.eval()


# ---------------------------------------------------------------------------------------------------------------------
# Adapters


@pytest.mark.parametrize("source", ["base", "exported"])
@pytest.mark.parametrize("family", sample_of(FAMILIES, ["qwen2_vl"]))
def test_export_of_what_sentence_transformers_saved_with_an_adapter(
    tiny_dir: Any, exported: Any, tmp_path: Path, *, family: str, source: str, by_a_clean_process: Any
) -> None:
    """Its loader leaves renamings of the adapter's keys on the model, which its saver would reverse."""
    directory = tiny_dir(family) if source == "base" else exported(family)
    model = Gen2Embed(directory, device="cpu")
    model.add_adapter(LoraConfig(r=4, target_modules=["q_proj", "v_proj"]))
    want = shaken(model).encode_query(TEXTS)
    SentenceTransformer.save(model, str(tmp_path / "adapter"))
    export(tmp_path / "adapter", tmp_path / "out")
    again = Gen2Embed(directory, device="cpu")
    again.load_adapter(str(tmp_path / "adapter"))
    again.save_pretrained(str(tmp_path / "again"))
    for vectors in by_a_clean_process(tmp_path / "out", tmp_path / "again"):
        assert np.abs(vectors - want).max() < 1e-5


KINDS: dict[str, dict[str, Any]] = {
    "a norm trained as a whole": {"modules_to_save": ["norm"]},
    "embeddings trained as a whole": {"modules_to_save": ["embed_tokens"]},
    "projector trained as a whole": {"modules_to_save": ["merger"]},
    "some tokens": {"trainable_token_indices": [1, 2, 3, 300]},
    "tokens and a norm": {"trainable_token_indices": {"embed_tokens": [5, 6]}, "modules_to_save": ["norm"]},
    "biases": {"bias": "all"},
    "biases of the adapted layers": {"bias": "lora_only"},
    "a bias in the adapter": {"target_modules": ["q_proj"], "lora_bias": True, "init_lora_weights": False},
    "some layers": {"layers_to_transform": [1]},
    "embeddings adapted": {"target_modules": ["embed_tokens", "q_proj"]},
    "convolution adapted": {"target_modules": ["proj", "q_proj"]},
    "ranks and strengths by layer": {"rank_pattern": {"q_proj": 2}, "alpha_pattern": {"v_proj": 32}},
    "DoRA": {"use_dora": True},
}


@pytest.fixture(scope="module")
def merged(tiny_dir: Any, tmp_path_factory: Any) -> dict[str, tuple[np.ndarray, Path]]:
    """For each kind of adapter: the vectors of the model in memory, and its export."""
    made = {}
    for number, (name, kind) in enumerate(KINDS.items()):
        folder = tmp_path_factory.mktemp("kind")
        settings = {"r": 4, "target_modules": ["q_proj", "v_proj"], "init_lora_weights": "gaussian", **kind}
        model = Gen2Embed(tiny_dir("qwen2_vl"), device="cpu")
        trained = shaken(get_peft_model(model[0].model, LoraConfig(**settings)))
        trained.save_pretrained(folder / "adapter")
        out = export(tiny_dir("qwen2_vl"), folder / f"out{number}", adapter=folder / "adapter")
        made[name] = model.encode_query(TEXTS), out
    return made


def test_every_kind_of_adapter_is_merged_to_the_vectors_it_had(merged: Any, tiny: Any, by_a_clean_process: Any) -> None:
    plain = tiny("qwen2_vl").encode_query(TEXTS)
    for name, vectors in zip(KINDS, by_a_clean_process(*(out for _, out in merged.values())), strict=True):
        want = merged[name][0]
        assert np.abs(want - plain).max() > 1e-3 or name in ("projector trained as a whole", "convolution adapted")
        assert np.abs(vectors - want).max() < 1e-5, name


def test_a_tuner_of_another_kind_is_merged(tiny_dir: Any, tmp_path: Path, by_a_clean_process: Any) -> None:
    model = Gen2Embed(tiny_dir("qwen2_vl"), device="cpu")
    inject_adapter_in_model(LoHaConfig(r=4, target_modules=["q_proj", "v_proj"], init_weights=False), model[0].model)
    want = model.encode_query(TEXTS)
    model.save_pretrained(str(tmp_path / "out"))
    assert np.abs(by_a_clean_process(tmp_path / "out")[0] - want).max() < 1e-5


def test_what_is_switched_off_is_not_merged(tiny_dir: Any, tiny: Any, tmp_path: Path, by_a_clean_process: Any) -> None:
    model = Gen2Embed(tiny_dir("qwen2_vl"), device="cpu")
    model.add_adapter(LoraConfig(r=4, target_modules=["q_proj"], modules_to_save=["norm"]))
    shaken(model)
    model.disable_adapters()
    want = model.encode_query(TEXTS)
    assert np.abs(want - tiny("qwen2_vl").encode_query(TEXTS)).max() < 1e-6
    model.save_pretrained(str(tmp_path / "out"))
    assert np.abs(by_a_clean_process(tmp_path / "out")[0] - want).max() < 1e-5


def test_two_adapters_of_which_one_is_active(tiny_dir: Any, tmp_path: Path, by_a_clean_process: Any) -> None:
    model = Gen2Embed(tiny_dir("qwen2_vl"), device="cpu")
    for name in ("first", "second"):
        model.add_adapter(LoraConfig(r=4, target_modules=["q_proj"], init_lora_weights=False), name)
    vectors = {}
    for name in ("first", "second"):
        model.set_adapter(name)
        vectors[name] = model.encode_query(TEXTS)
        model.save_pretrained(str(tmp_path / name))
    assert np.abs(vectors["first"] - vectors["second"]).max() > 1e-3
    saved = by_a_clean_process(tmp_path / "first", tmp_path / "second")
    for name, loaded in zip(vectors, saved, strict=True):
        assert np.abs(loaded - vectors[name]).max() < 1e-5


def test_an_adapter_that_cannot_be_merged_is_refused(tiny_dir: Any, tmp_path: Path, monkeypatch: Any) -> None:
    model = Gen2Embed(tiny_dir("qwen2_vl"), device="cpu")
    new_adapter(model[0].model, ["q_proj"])
    with torch.no_grad():
        next(parameter for name, parameter in model.named_parameters() if "lora_B" in name).fill_(float("nan"))
    with pytest.raises(ValueError, match=r"adapter of layer .*q_proj .* cannot be merged .*NaN"):
        model.save_pretrained(str(tmp_path / "out"))
    assert list(tmp_path.iterdir()) == []


# ---------------------------------------------------------------------------------------------------------------------
# What was written is read back


def test_a_user_given_renaming_of_keys_is_not_reversed(tiny_dir: Any, tmp_path: Path, by_a_clean_process: Any) -> None:
    """Weights under names of one's own load with `key_mapping`; the export needs none."""
    weights = load_file(tiny_dir("qwen2_vl") / "model.safetensors")
    odd = tmp_path / "odd"
    odd.mkdir()
    for path in tiny_dir("qwen2_vl").iterdir():
        (odd / path.name).write_bytes(path.read_bytes())
    save_file(
        {f"wrapped.{name}": value for name, value in weights.items()}, odd / "model.safetensors", {"format": "pt"}
    )
    model = Gen2Embed(odd, device="cpu", model_kwargs={"key_mapping": {r"^wrapped\.": ""}})
    want = Gen2Embed(tiny_dir("qwen2_vl"), device="cpu").encode_query(TEXTS)
    assert np.abs(model.encode_query(TEXTS) - want).max() < 1e-6
    model.save_pretrained(str(tmp_path / "out"))
    assert np.abs(by_a_clean_process(tmp_path / "out")[0] - want).max() < 1e-5


def losing(change: Any) -> Any:
    """A stand-in for the writer of weights of transformers that writes something else."""
    write = modeling_utils.safe_save_file

    def changed(tensors: dict[str, torch.Tensor], *args: Any, **kwargs: Any) -> None:
        write(change(tensors), *args, **kwargs)

    return changed


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda w: dict(list(w.items())[1:]), r"missing \['.*\.weight'\] \(1 in all\)"),
        (lambda w: {**w, "visual.extra": torch.ones(1)}, r"left over \['visual.extra'\]"),
        (lambda w: {f"x.{k}": v for k, v in w.items()}, r"missing .*left over"),
        (lambda w: {k: v[:1].clone() if k.endswith("q_proj.weight") else v for k, v in w.items()}, "another shape"),
    ],
)
def test_weights_that_were_written_wrongly_are_refused(
    tiny_dir: Any, tmp_path: Path, monkeypatch: Any, change: Any, message: str
) -> None:
    model = Gen2Embed(tiny_dir("qwen2_vl"), device="cpu")
    monkeypatch.setattr("transformers.modeling_utils.safe_save_file", losing(change))
    with pytest.raises(ValueError, match=rf"does not load as the model that it was written of: .*{message}"):
        model.save_pretrained(str(tmp_path / "out"))
    assert list(tmp_path.iterdir()) == []


def test_layers_that_the_configuration_does_not_know_are_refused(tiny_dir: Any, tmp_path: Path) -> None:
    model = Gen2Embed(tiny_dir("qwen2_vl"), device="cpu")
    del model[0].model.language_model.layers[1]  # the configuration says two
    with pytest.raises(ValueError, match=r"missing \['language_model\.layers\.1\."):
        model.save_pretrained(str(tmp_path / "out"))
    assert not (tmp_path / "out").exists()


def test_modules_behind_pooling_are_read_back(tiny_dir: Any, tmp_path: Path, monkeypatch: Any) -> None:
    model = Gen2Embed(tiny_dir("qwen2_vl"), device="cpu")
    model.add_module("3", Dense(32, 8))
    model.add_module("4", LayerNorm(8))
    model.save_pretrained(str(tmp_path / "whole"))
    monkeypatch.setattr(LayerNorm, "save", lambda self, path, **_: self.save_config(path))
    with pytest.raises(ValueError, match=r"norm\.bias: not there instead of \(8,\)"):
        model.save_pretrained(str(tmp_path / "out"))
    assert not (tmp_path / "out").exists()


def test_a_full_disk_is_said_in_one_line_and_nothing_is_left(
    tiny_dir: Any, tmp_path: Path, monkeypatch: Any, capsys: Any
) -> None:
    from safetensors import SafetensorError

    def full(*_: Any, **__: Any) -> None:
        raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    base = tiny_dir("qwen2_vl")
    monkeypatch.setattr("transformers.modeling_utils.safe_save_file", full)
    assert cli.main(["export", str(base), str(tmp_path / "out"), "--device", "cpu"]) == 2
    message = capsys.readouterr().err.strip().splitlines()[-1]
    assert "No space left on device" in message
    assert "free space on that disk" in message
    assert list(tmp_path.iterdir()) == []


# ---------------------------------------------------------------------------------------------------------------------
# Where it is put


def contents(folder: Path) -> dict[str, bytes]:
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file() and path.name not in (LEDGER, LOCK)
    }


def test_a_folder_is_saved_again_and_again(tiny_dir: Any, tmp_path: Path) -> None:
    """As trainers do, between whose saves the processor writes its own files, and which keep theirs there."""
    model = Gen2Embed(tiny_dir("qwen2_vl"), device="cpu")
    out = tmp_path / "out"
    model.save_pretrained(str(out))
    first = contents(out)
    (out / "trainer_state.json").write_text("{}")
    for _ in range(2):
        model.processor.save_pretrained(out)
        model.save_pretrained(str(out))
    assert contents(out) == {**first, "trainer_state.json": b"{}"}
    # Another process, another model: the files are proved to be ours.
    other = Gen2Embed(tiny_dir("qwen2_vl"), prompt_mode="none", device="cpu")
    other.save_pretrained(str(out))
    assert Gen2Embed(out, device="cpu").prompt_mode == "none"


def test_a_model_of_others_is_never_replaced(tiny_dir: Any, tmp_path: Path) -> None:
    model = Gen2Embed(tiny_dir("qwen2_vl"), device="cpu")
    taken = tmp_path / "taken"
    taken.mkdir()
    for path in tiny_dir("qwen2_vl").iterdir():
        (taken / path.name).write_bytes(path.read_bytes())
    before = contents(taken)
    with pytest.raises(ForeignFileError, match="was not written by gen2embed"):
        model.save_pretrained(str(taken))
    assert contents(taken) == before


@pytest.mark.parametrize("name", ["adapter_config.json", "pytorch_model.bin", "model.safetensors.index.json"])
def test_what_would_be_mixed_with_the_model_on_loading_is_refused(tiny_dir: Any, tmp_path: Path, name: str) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / name).write_text("{}")
    with pytest.raises(ForeignFileError, match=name):
        Gen2Embed(tiny_dir("qwen2_vl"), device="cpu").save_pretrained(str(tmp_path / "out"))
    assert contents(tmp_path / "out") == {name: b"{}"}


def test_an_edited_model_card_is_the_users(tiny_dir: Any, tmp_path: Path) -> None:
    model = Gen2Embed(tiny_dir("qwen2_vl"), device="cpu")
    model.save_pretrained(str(tmp_path / "out"))
    (tmp_path / "out" / "README.md").write_text("my notes")
    with pytest.raises(ForeignFileError, match=r"README\.md was changed since"):
        model.save_pretrained(str(tmp_path / "out"))
    assert (tmp_path / "out" / "README.md").read_text() == "my notes"


def test_weights_of_an_earlier_save_are_not_left_beside_new_ones(tiny_dir: Any, tmp_path: Path) -> None:
    """Transformers reads `model.safetensors` where there are shards too, and all shards that an index names."""
    model = Gen2Embed(tiny_dir("qwen2_vl"), device="cpu")
    out = tmp_path / "out"
    model.save_pretrained(str(out))
    stock = type(model[0].model).save_pretrained
    try:
        type(model[0].model).save_pretrained = lambda self, path, **options: stock(self, path, max_shard_size="20KB")
        model.save_pretrained(str(out))
    finally:
        type(model[0].model).save_pretrained = stock
    assert not (out / "model.safetensors").exists()
    assert len(list(out.glob("model-*-of-*.safetensors"))) > 1
    want = model.encode_query(TEXTS)
    assert np.abs(Gen2Embed(out, device="cpu").encode_query(TEXTS) - want).max() < 1e-6
    model.save_pretrained(str(out))
    assert [path.name for path in out.glob("model*.safetensors*")] == ["model.safetensors"]


@pytest.mark.parametrize("kill_after", [0, 5, 11])
def test_a_save_that_is_cut_off_leaves_nothing_that_loads(
    tiny_dir: Any, tmp_path: Path, monkeypatch: Any, kill_after: int
) -> None:
    """While a folder is replaced, `config.json` is not there; the next save puts all in place."""
    out = tmp_path / "out"
    Gen2Embed(tiny_dir("qwen2_vl"), device="cpu").save_pretrained(str(out))
    model = Gen2Embed(tiny_dir("qwen2_vl"), prompt_mode="none", device="cpu")
    replace, moved = Path.replace, []

    def cut_off(self: Path, target: Any) -> Any:
        if "gen2embed-tmp" in str(self.parent) and "gen2embed-tmp" not in str(target):
            if len(moved) == kill_after:
                raise KeyboardInterrupt
            moved.append(target)
        return replace(self, target)

    monkeypatch.setattr(Path, "replace", cut_off)
    with pytest.raises(KeyboardInterrupt):
        model.save_pretrained(str(out))
    monkeypatch.setattr(Path, "replace", replace)
    assert not (out / "config.json").exists()
    with pytest.raises((OSError, ValueError)):
        SentenceTransformer(str(out))
    model.save_pretrained(str(out))
    assert Gen2Embed(out, device="cpu").prompt_mode == "none"


def test_a_new_folder_holds_no_lock_and_one_in_use_is_not_renamed(
    tiny_dir: Any, tmp_path: Path, monkeypatch: Any
) -> None:
    model = Gen2Embed(tiny_dir("qwen2_vl"), device="cpu")
    (tmp_path / "empty").mkdir()
    (tmp_path / "linked").symlink_to(tmp_path / "empty")
    for name in ("new", "linked"):
        model.save_pretrained(str(tmp_path / name))
        assert not (tmp_path / name / LOCK).exists()
    assert (tmp_path / "linked").is_symlink()
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    number = (tmp_path / "here").stat().st_ino
    model.save_pretrained(".")
    assert (tmp_path / "here").stat().st_ino == number
    assert contents(tmp_path / "here") == contents(tmp_path / "new")


# ---------------------------------------------------------------------------------------------------------------------
# What cannot be expressed


@pytest.mark.parametrize(("family", "policy"), [("qwen2_vl", "official"), ("llava_next", "square-448")])
def test_a_resize_policy_is_not_dropped(tiny_dir: Any, tmp_path: Path, family: str, policy: str) -> None:
    model = Gen2Embed(tiny_dir(family), resize=policy, device="cpu")
    with pytest.raises(ValueError, match=f"resize='{policy}' cannot be saved"):
        model.save_pretrained(str(tmp_path / "out"))
    with pytest.raises(ValueError, match=f"resize='{policy}' cannot be saved"):
        export(tiny_dir(family), tmp_path / "out", resize=policy, device="cpu")
    assert not (tmp_path / "out").exists()


def test_pickled_weights_are_not_written(tiny_dir: Any, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="safe_serialization=False would write pickled weights"):
        Gen2Embed(tiny_dir("qwen2_vl"), device="cpu").save_pretrained(str(tmp_path / "out"), safe_serialization=False)


@pytest.mark.parametrize("backend", ["onnx", "openvino", "anything"])
@pytest.mark.parametrize("source", ["base", "exported"])
def test_another_backend_is_refused(tiny_dir: Any, exported: Any, backend: str, source: str) -> None:
    directory = tiny_dir("qwen2_vl") if source == "base" else exported("qwen2_vl")
    with pytest.raises(ValueError, match=rf"backend='{backend}' is not supported"):
        Gen2Embed(directory, backend=backend)


def test_it_is_said_that_half_precision_is_normalised_otherwise_in_plain_sentence_transformers(
    tiny_dir: Any, tmp_path: Path, caplog: Any, by_a_clean_process: Any
) -> None:
    model = Gen2Embed(tiny_dir("qwen2_vl"), device="cpu", model_kwargs={"dtype": torch.bfloat16})
    model.save_pretrained(str(tmp_path / "half"))
    assert "plain sentence-transformers normalises in the weights' bfloat16" in caplog.text
    plain = SentenceTransformer(str(tmp_path / "half")).encode_query([{"text": text} for text in TEXTS])
    ours = Gen2Embed(tmp_path / "half", device="cpu").encode_query(TEXTS)
    assert np.abs(np.linalg.norm(plain, axis=1) - 1).max() < 4e-3  # as the message says
    assert np.abs(np.linalg.norm(ours, axis=1) - 1).max() < 1e-6
    cosines = (plain * ours).sum(axis=1) / np.linalg.norm(plain, axis=1)
    assert cosines.min() > 0.9999
    caplog.clear()
    export(tmp_path / "half", tmp_path / "whole", device="cpu", model_kwargs={"dtype": torch.float32})
    assert "normalises" not in caplog.text
    whole = Gen2Embed(tmp_path / "whole", device="cpu").encode_query(TEXTS)
    assert np.abs(by_a_clean_process(tmp_path / "whole")[0] - whole).max() < 1e-6


def test_an_adapter_that_was_loaded_stays_attached_after_a_refused_save(tiny_dir: Any, tmp_path: Path) -> None:
    model = Gen2Embed(tiny_dir("qwen2_vl"), device="cpu")
    model.add_adapter(LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False))
    want = model.encode_query(TEXTS)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "config.json").write_text("{}")
    with pytest.raises(ForeignFileError):
        model.save_pretrained(str(tmp_path / "out"))
    assert np.array_equal(model.encode_query(TEXTS), want)
