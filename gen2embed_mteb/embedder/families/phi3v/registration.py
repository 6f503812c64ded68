"""Makes Phi-3.5-V known to the Auto classes of transformers, so that every library that loads by them finds it.

The start-up hook calls `install` when the module of an Auto class is imported. The rest of transformers may be in the
middle of its import then, so nothing is imported here: the classes are registered when an Auto class is first asked to
load something.
"""

from __future__ import annotations

import functools
import sys
import warnings
from typing import Any

MODEL_TYPE = "phi3_v"
_MODULES = {
    "AutoConfig": "configuration_auto",
    "AutoImageProcessor": "image_processing_auto",
    "AutoProcessor": "processing_auto",
}


def install() -> None:
    """Let those Auto classes that are imported register Phi-3.5-V before they load; twice changes nothing."""
    for name, module in _MODULES.items():
        auto = getattr(sys.modules.get(f"transformers.models.auto.{module}"), name, None)
        if auto is None or hasattr(auto.from_pretrained, "_registers_first"):
            continue
        auto.from_pretrained = classmethod(_registering_first(auto.from_pretrained.__func__))


def _registering_first(stock: Any) -> Any:
    @functools.wraps(stock)
    def from_pretrained(cls: Any, *args: Any, **kwargs: Any) -> Any:
        _register_or_warn()
        return stock(cls, *args, **kwargs)

    from_pretrained._registers_first = True  # type: ignore[attr-defined]
    return from_pretrained


@functools.cache
def _register_or_warn() -> None:
    """Register once; other models must load even if that fails."""
    try:
        register()
    except Exception as error:  # whatever another version of transformers raises
        warnings.warn(
            f"Gen2Embed could not add Phi-3.5-V to transformers ({type(error).__name__}: {error}); models of type "
            f"{MODEL_TYPE!r} cannot be loaded. Update gen2embed",
            RuntimeWarning,
            stacklevel=3,
        )


def register() -> None:
    """Register the classes with transformers; a class of its own is left as it is, should there be one."""
    from transformers import AutoConfig, AutoImageProcessor, AutoModel, AutoProcessor
    from transformers.conversion_mapping import register_checkpoint_conversion_mapping
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES

    from gen2embed_mteb.embedder.families.phi3v.configuration import Phi3VConfig
    from gen2embed_mteb.embedder.families.phi3v.image_processing import Phi3VImageProcessor
    from gen2embed_mteb.embedder.families.phi3v.modeling import NAMES, Phi3VModel
    from gen2embed_mteb.embedder.families.phi3v.processing import Phi3VProcessor

    if MODEL_TYPE in CONFIG_MAPPING_NAMES:
        return
    AutoConfig.register(MODEL_TYPE, Phi3VConfig, exist_ok=True)
    AutoModel.register(Phi3VConfig, Phi3VModel, exist_ok=True)
    AutoImageProcessor.register(Phi3VConfig, image_processor_classes={"pil": Phi3VImageProcessor}, exist_ok=True)
    AutoProcessor.register(Phi3VConfig, Phi3VProcessor, exist_ok=True)
    register_checkpoint_conversion_mapping(Phi3VModel.__name__, NAMES, overwrite=True)
