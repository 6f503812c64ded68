"""Columns of training data: the first holds queries, the others candidates."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from datasets import Dataset

from gen2embed_mteb.embedder.prompts.strategies import HierarchicalPrompt
from gen2embed_mteb.errors import Gen2EmbedError
from gen2embed_mteb.names import Side


def roles_of(
    columns: Sequence[str], prompt: HierarchicalPrompt, *, query_prompt_in_training: bool = True
) -> dict[str, Side]:
    """Return the role of every column, as sentence-transformers' `router_mapping` takes it.

    Args:
        columns: The columns in order; the first holds the queries.
        prompt: The prompt in use.
        query_prompt_in_training: False leaves the representation prompt off the queries, as the official code did.

    Raises:
        ValueError: Queries and candidates differ in more than the representation prompt, so no role gives a query
            without it.
    """
    query: Side = "query"
    if not query_prompt_in_training:
        same = replace(prompt, query_text=prompt.document_text, query_image=prompt.document_image)
        if same.query_system != same.document_system or prompt.document_text or prompt.document_image:
            raise Gen2EmbedError(
                f"query_prompt_in_training=False with the prompt {prompt.name!r}: its queries differ from candidates "
                "in more than the representation prompt; use prompt_mode hierarchical, or leave the switch on"
            )
        query = "document"
    return {column: "document" if number else query for number, column in enumerate(columns)}


def columns_of(dataset: Any) -> list[str]:
    """Return the names of a dataset's columns; of a dictionary of datasets, those of the first one.

    Args:
        dataset: A dataset, a dictionary of them, or None.
    """
    if dataset is None:
        return []
    names = next(iter(dataset.values())).column_names if isinstance(dataset, dict) else dataset.column_names
    return list(names)


def refuse_colliding(columns: Sequence[str]) -> None:
    """Refuse columns whose features sentence-transformers would mix up, since it finds them by the prefix `COLUMN_`.

    Args:
        columns: The columns.

    Raises:
        Gen2EmbedError: The name of one column begins with that of another and an underscore.
    """
    for column in columns:
        for other in columns:
            if other.startswith(f"{column}_"):
                raise Gen2EmbedError(
                    f"columns {column!r} and {other!r} would be mixed up, as one begins with the other and '_'; "
                    "rename one (dataset.rename_column)"
                )


def with_missing_texts(dataset: Any) -> Any:
    """Return a dataset in which a text that a row lacks is a cell of its own kind, `{"text": None}`.

    The stock model card tokenizes the first cells of a column of strings, and cannot take nulls among them.

    Args:
        dataset: A dataset; one without columns of strings and nulls, or with a transform, is returned as it is.
    """
    if not isinstance(dataset, Dataset) or dataset.format["type"] is not None:
        return dataset
    table = dataset.data
    strings = [name for name, feature in dataset.features.items() if getattr(feature, "dtype", "") == "string"]
    missing = {name for name in strings if table.column(name).null_count}
    if not missing:
        return dataset

    def as_cells(batch: dict[str, list[Any]]) -> dict[str, list[Any]]:
        return {
            name: [{"text": text} for text in column] if name in missing else column for name, column in batch.items()
        }

    return dataset.with_transform(as_cells)
