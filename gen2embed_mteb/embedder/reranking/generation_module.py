"""A stock `Transformer` module of sentence-transformers around a generative model that exists already.

The stock class can only load a model from files. Here the embedder's own module is copied without its model, and told
what the stock class finds out when it loads a generative model.
"""

from __future__ import annotations

import copy
import inspect
from typing import TYPE_CHECKING, Any

from sentence_transformers.base.modality import InputFormatter
from sentence_transformers.base.modules import transformer as stock

from gen2embed_mteb.embedder.model_folder.checked_loading import prepare_tokenizer, set_template
from gen2embed_mteb.embedder.reranking.generation_model import generation_class

if TYPE_CHECKING:
    from sentence_transformers.sentence_transformer.modules import Transformer


def generation_module(embedding: Transformer, model: Any, template: str) -> Transformer:
    """Return a module that gives logits: under "causal_logits", of the last position, (batch, 1, vocabulary).

    Args:
        embedding: The embedder's module; its processor is copied, its model is not.
        model: The generative model (see `generation_model`).
        template: The chat template that the copy of the processor gets.
    """
    module: Any = copy.copy(embedding)
    module.__dict__ = {**vars(embedding), "_modules": {"model": model}}
    module.processor = copy.deepcopy(embedding.processor)
    module.transformer_task = generation_class(embedding.config)[0]
    # As the constructor of sentence-transformers 6.2 does: what `forward` passes on, and padding before the text, so
    # that the last position is the last token of every row.
    parameters = inspect.signature(model.forward).parameters
    module._declared_forward_params = set(parameters)
    module.model_forward_params = None
    if not any(one.kind is inspect.Parameter.VAR_KEYWORD for one in parameters.values()):
        module.model_forward_params = set(parameters) | stock._FORWARD_SAFETY_NET_KEYS
    module._prompt_length_mapping, module._method_signature_cache = {}, {}
    module._chat_template_suffix_cache = {}
    tokenizer = module.tokenizer
    tokenizer.padding_side = "left"
    prepare_tokenizer(tokenizer)
    set_template(module.processor, template)
    module.input_formatter = InputFormatter(module.config.model_type, "structured", module.processor)
    module.modality_config, module.module_output_name = module.infer_modalities(model, module.processor)
    module.input_formatter.supported_modalities = list(module.modality_config)
    found: Transformer = module
    return found
