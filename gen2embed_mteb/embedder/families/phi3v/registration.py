"""Makes Phi-3.5-V known to the Auto classes of transformers, so that every library that loads by them finds it.

The start-up hook calls `install` when the module of one of these classes is imported. The model's class needs the rest
of transformers, which may be in the middle of its import then: it is registered when the first configuration is made.
"""

from __future__ import annotations

import sys

MODEL_TYPE = "phi3_v"
_AUTO = "transformers.models.auto."


def install() -> None:
    """Register with those Auto classes that are imported; calling it twice changes nothing.

    A class of transformers' own is left as it is, should there be one.
    """
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES, AutoConfig

    from gen2embed_mteb.embedder.families.phi3v.configuration import Phi3VConfig

    if MODEL_TYPE in CONFIG_MAPPING_NAMES:
        return
    AutoConfig.register(MODEL_TYPE, Phi3VConfig, exist_ok=True)
    if _is_there("processing_auto", "AutoProcessor"):
        from transformers.models.auto.processing_auto import AutoProcessor

        from gen2embed_mteb.embedder.families.phi3v.processing import Phi3VProcessor

        AutoProcessor.register(Phi3VConfig, Phi3VProcessor, exist_ok=True)
    if _is_there("image_processing_auto", "AutoImageProcessor"):
        from transformers.models.auto.image_processing_auto import AutoImageProcessor

        from gen2embed_mteb.embedder.families.phi3v.image_processing import Phi3VImageProcessor

        AutoImageProcessor.register(Phi3VConfig, image_processor_classes={"pil": Phi3VImageProcessor}, exist_ok=True)


def _is_there(module: str, name: str) -> bool:
    """Return whether a module of an Auto class is imported, and not in the middle of that."""
    return hasattr(sys.modules.get(f"{_AUTO}{module}"), name)


def install_model() -> None:
    """Register the model's class; transformers must be wholly imported."""
    from transformers.conversion_mapping import register_checkpoint_conversion_mapping
    from transformers.models.auto.modeling_auto import AutoModel

    from gen2embed_mteb.embedder.families.phi3v.configuration import Phi3VConfig
    from gen2embed_mteb.embedder.families.phi3v.modeling import NAMES, Phi3VModel

    AutoModel.register(Phi3VConfig, Phi3VModel, exist_ok=True)
    register_checkpoint_conversion_mapping(Phi3VModel.__name__, NAMES, overwrite=True)
