"""The short names inside one process: what they stand for, and what patching ``SentenceTransformer`` leaves alone.

That they reach a fresh interpreter through the start-up hook is the matter of ``test_packaging.py``.
"""

import importlib
import importlib.util
import inspect
import pickle
import sys
import types
from importlib.machinery import ModuleSpec
from pathlib import Path

import numpy as np
import pytest
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.modules import StaticEmbedding, Transformer
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace

import _gen2embed_hook
from gen2embed_mteb.embedder import short_names
from gen2embed_mteb.errors import Gen2EmbedError
from gen2embed_mteb.mini import model_dir

TEXTS = ["a red circle at the top", "two blue squares"]


def static_model(dim: int) -> SentenceTransformer:
    """A stock model of three words and ``dim`` dimensions, to be told apart from ours by its width."""
    tokenizer = Tokenizer(WordLevel({"[UNK]": 0, "red": 1, "circle": 2}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = Whitespace()
    return SentenceTransformer(modules=[StaticEmbedding(tokenizer, embedding_dim=dim)], device="cpu")


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty working directory and no ``GEN2EMBED_MODEL``."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv(short_names.MODEL_VARIABLE, raising=False)
    return tmp_path


def test_names_and_what_they_stand_for() -> None:
    assert short_names.resolve("gen2embed") == "Qwen/Qwen2-VL-2B-Instruct"
    assert short_names.resolve("gen2embed-mini") == str(model_dir())
    for other in (
        "gen2embed-large",
        "someone/gen2embed",
        "sentence-transformers/gen2embed",
        "",
        None,
        Path("gen2embed"),
    ):
        assert short_names.resolve(other) is None


def test_variable_points_the_default_elsewhere_and_leaves_the_mini_alone(
    elsewhere: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (elsewhere / "exported").mkdir()
    for value, meaning in {
        "": "Qwen/Qwen2-VL-2B-Instruct",
        "gen2embed": "Qwen/Qwen2-VL-2B-Instruct",
        "Qwen/Qwen2.5-VL-3B-Instruct": "Qwen/Qwen2.5-VL-3B-Instruct",
        "gen2embed-mini": str(model_dir()),
        str(elsewhere / "exported"): str(elsewhere / "exported"),
        "./exported": "exported",
    }.items():
        monkeypatch.setenv("GEN2EMBED_MODEL", value)
        assert short_names.resolve("gen2embed") == meaning
        assert short_names.resolve("gen2embed-mini") == str(model_dir())


def test_variable_naming_a_missing_directory_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GEN2EMBED_MODEL", "/nowhere/exported")
    with pytest.raises(FileNotFoundError, match="GEN2EMBED_MODEL=/nowhere/exported is not a directory"):
        SentenceTransformer("gen2embed")


@pytest.mark.parametrize("name", ["gen2embed", "gen2embed-mini"])
def test_folder_of_that_name_wins(name: str, elsewhere: Path) -> None:
    static_model(dim=3).save(str(elsewhere / name))
    assert short_names.resolve(name) is None
    assert SentenceTransformer(name, device="cpu").encode(["red"]).shape == (1, 3)


def test_file_of_that_name_does_not(elsewhere: Path) -> None:
    (elsewhere / "gen2embed").write_text("the console script, say", encoding="utf-8")
    assert short_names.resolve("gen2embed") == "Qwen/Qwen2-VL-2B-Instruct"


def test_plain_sentence_transformer_equals_ours() -> None:
    from gen2embed_mteb import Gen2Embed

    ours = Gen2Embed("gen2embed-mini", device="cpu")
    for plain in (
        SentenceTransformer("gen2embed-mini", device="cpu"),
        SentenceTransformer(model_name_or_path="gen2embed-mini", device="cpu"),
    ):
        assert type(plain) is SentenceTransformer
        assert {type(module).__module__.partition(".")[0] for module in plain} == {"sentence_transformers"}
        for side in ("encode_query", "encode_document"):
            np.testing.assert_allclose(getattr(plain, side)(TEXTS), getattr(ours, side)(TEXTS), atol=1e-6)


def test_a_directory_given_by_path_is_left_to_sentence_transformers() -> None:
    by_path = SentenceTransformer(str(model_dir()), device="cpu")  # stock: mean pooling, no prompt
    by_name = SentenceTransformer("gen2embed-mini", device="cpu")
    assert len(by_path) != len(by_name)


def test_exported_directory_loads_through_the_variable(
    elsewhere: Path, monkeypatch: pytest.MonkeyPatch, exported, tiny
) -> None:
    (elsewhere / "exported").symlink_to(exported("qwen2_vl"))
    monkeypatch.setenv("GEN2EMBED_MODEL", "./exported")
    model = SentenceTransformer("gen2embed", device="cpu")
    assert type(model) is SentenceTransformer
    assert type(model[0]) is Transformer
    np.testing.assert_allclose(model.encode_query(TEXTS), tiny("qwen2_vl").encode_query(TEXTS), atol=1e-6)


def test_a_folder_of_other_modules_is_refused(elsewhere: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    static_model(dim=5).save(str(elsewhere / "static"))
    monkeypatch.setenv("GEN2EMBED_MODEL", "./static")
    with pytest.raises(Gen2EmbedError, match=r"modules\.json: module '.*StaticEmbedding' is not one that is run here"):
        SentenceTransformer("gen2embed", device="cpu")


def test_other_arguments_reach_sentence_transformers() -> None:
    model = SentenceTransformer(
        "gen2embed-mini", device="cpu", truncate_dim=7, similarity_fn_name="dot", model_kwargs={"dtype": "bfloat16"}
    )
    assert model.encode(TEXTS).shape == (2, 7)
    assert model.similarity_fn_name == "dot"
    assert str(model.dtype) == "torch.bfloat16"


def test_other_backends_are_refused_with_the_way_out() -> None:
    with pytest.raises(ValueError, match="gen2embed export"):
        SentenceTransformer("gen2embed-mini", backend="onnx")


def test_subclass_with_modules_of_its_own_only_has_the_name_replaced() -> None:
    class Own(SentenceTransformer):
        """As ``Gen2Embed``: knows how to build its modules."""

        def _load_default_modules(self, name: str, **_: object) -> tuple[list[StaticEmbedding], dict[str, object]]:
            self.seen = name
            return [static_model(dim=4)[0]], {}

    assert Own("gen2embed-mini", device="cpu").seen == str(model_dir())


def test_subclass_without_gets_ours() -> None:
    class Renamed(SentenceTransformer):
        """A user's subclass, which builds nothing itself."""

    model = Renamed("gen2embed-mini", device="cpu")
    assert type(model) is Renamed
    np.testing.assert_array_equal(
        model.encode_query(TEXTS), SentenceTransformer("gen2embed-mini", device="cpu").encode_query(TEXTS)
    )


def test_model_pickles_as_worker_processes_need() -> None:
    model = SentenceTransformer("gen2embed-mini", device="cpu")
    copy = pickle.loads(pickle.dumps(model))
    np.testing.assert_array_equal(copy.encode_query(TEXTS), model.encode_query(TEXTS))


def test_installing_twice_patches_once_and_keeps_the_signature() -> None:
    short_names.install()
    once = SentenceTransformer.__init__
    short_names.install()
    assert SentenceTransformer.__init__ is once
    assert "truncate_dim" in inspect.signature(SentenceTransformer.__init__).parameters
    assert not hasattr(once.__wrapped__, "_knows_short_names")


@pytest.fixture
def library(elsewhere: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """The name of an importable library that the hook waits for; ``patches.install`` is what it then calls."""
    name = "hooked_library"
    (elsewhere / f"{name}.py").write_text("ready = True\n", encoding="utf-8")
    monkeypatch.syspath_prepend(str(elsewhere))
    monkeypatch.setitem(_gen2embed_hook.PATCHES, name, ("patches_of_a_test",))
    monkeypatch.setitem(sys.modules, "patches_of_a_test", types.ModuleType("patches_of_a_test"))
    monkeypatch.delitem(sys.modules, name, raising=False)
    return name


def test_hook_patches_after_the_library_ran_and_on_import_only(library: str) -> None:
    seen = []
    sys.modules["patches_of_a_test"].install = lambda: seen.append(sys.modules[library].ready)  # type: ignore[attr-defined]
    assert importlib.util.find_spec(library) is not None  # as transformers probes what is installed
    assert seen == []
    module = importlib.import_module(library)
    assert seen == [True]
    assert inspect.getsource(module) == "ready = True\n"
    assert not isinstance(module.__loader__, _gen2embed_hook._Loader)
    assert module.__spec__.loader is module.__loader__
    del sys.modules[library]
    importlib.import_module(library)
    assert seen == [True, True]


def test_hook_that_fails_warns_and_lets_the_library_be_imported(library: str) -> None:
    def install() -> None:
        raise AttributeError("no SentenceTransformer here")

    sys.modules["patches_of_a_test"].install = install  # type: ignore[attr-defined]
    with pytest.warns(RuntimeWarning, match="GEN2EMBED_NO_HOOK=1"):
        assert __import__(library).ready


def test_hook_and_a_finder_that_asks_all_others_do_not_chase_each_other(
    library: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Asking:
        """As other packages' import hooks: delegates to every finder but itself."""

        def find_spec(self, name: str, path: object = None, target: object = None) -> object:
            found = (f.find_spec(name, path, target) for f in sys.meta_path if f is not self)
            return next((spec for spec in found if spec is not None), None)

    calls = []
    sys.modules["patches_of_a_test"].install = lambda: calls.append(1)  # type: ignore[attr-defined]
    monkeypatch.setattr(sys, "meta_path", [Asking(), *sys.meta_path])
    assert __import__(library).ready
    assert calls == [1]


def test_hook_leaves_a_loader_that_serves_several_modules_alone(library: str, monkeypatch: pytest.MonkeyPatch) -> None:
    class Shared:
        """As pytest's: one object that finds and loads many modules."""

        def find_spec(self, name: str, path: object = None, target: object = None) -> ModuleSpec | None:
            return ModuleSpec(name, self) if name in (library, "its_neighbour") else None

        def create_module(self, spec: ModuleSpec) -> None:
            return None

        def exec_module(self, module: types.ModuleType) -> None:
            module.ready = True

    calls = []
    sys.modules["patches_of_a_test"].install = lambda: calls.append(1)  # type: ignore[attr-defined]
    shared = Shared()
    monkeypatch.setattr(sys, "meta_path", [_gen2embed_hook._FINDER, shared])
    importlib.util.find_spec(library)
    for name in ("its_neighbour", library):
        assert importlib.import_module(name).__loader__ is shared
        monkeypatch.delitem(sys.modules, name)
    assert calls == [1]
    assert vars(shared) == {}
