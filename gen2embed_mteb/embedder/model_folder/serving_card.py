"""Writes the section of an exported folder's README that says how vLLM serves it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from gen2embed_mteb.embedder.preparation.features import NO_LIMIT
from gen2embed_mteb.storage.atomic import write_in_scratch

_BEFORE = ("\n## Training Details", "\n### Framework Versions", "\n<!--\n## Glossary", "\n## Citation")
_GUIDE = "https://github.com/gen2embed/gen2embed/blob/main/docs/guides/serving.md"


def add_serving(path: Path, model: Any) -> None:
    """Put the section into a model card; without a card nothing is done.

    Args:
        path: The card, in a temporary folder of ours.
        model: The model, which the section says how to ask.
    """
    if not path.is_file():
        return
    card = path.read_text(encoding="utf-8")
    place = min((found for mark in _BEFORE if (found := card.find(mark)) >= 0), default=len(card))
    section = _SECTION.replace("ADD_SPECIAL_TOKENS", str(adds_special_tokens(model)))
    write_in_scratch(path, f"{card[:place].rstrip()}\n\n{section}\n{card[place:].lstrip(chr(10))}".encode())


def adds_special_tokens(model: Any) -> bool:
    """Return whether the tokenizer must add its special tokens to the rendered conversation.

    It must for LLaVA-NeXT, for example, whose template leaves the token that begins a text to the tokenizer.

    Args:
        model: The model.
    """
    wanted = model.preprocess(["a red circle"], task="document", max_length=NO_LIMIT)["input_ids"][0].tolist()
    rendered = model.render("a red circle", "document")
    without = model.tokenizer(rendered, add_special_tokens=False)["input_ids"]
    return bool(wanted != without and wanted == model.tokenizer(rendered)["input_ids"])


_SECTION = f"""## Serving

vLLM serves this folder with the same vectors (`vllm serve DIR --runner pooling --convert embed`). Send a conversation,
and say the side; a plain text as `input` would bypass the prompt:

```python
client.embeddings.create(
    model="DIR",
    input=[{{"role": "user", "content": [{{"type": "text", "text": "a red circle"}}]}}],
    encoding_format="float",
    extra_body={{
        "chat_template_kwargs": {{"task": "query"}},  # or "document"
        "add_generation_prompt": True,
        "add_special_tokens": ADD_SPECIAL_TOKENS,
    }},
)
```

`gen2embed serving-check http://localhost:8000 DIR` compares a running server with this folder.
[More](<{_GUIDE}>), also on images and on safe settings.
"""
