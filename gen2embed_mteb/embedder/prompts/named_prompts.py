"""The part of `Gen2Embed` that finds prompts by name: a side's, a dataset's, or one that the user added."""

from __future__ import annotations

from typing import Any

from sentence_transformers import SentenceTransformer

from gen2embed_mteb.embedder.prompts.dataset_prompts import WithDatasetPrompts, prompts_for, side_of_prompt_name
from gen2embed_mteb.embedder.prompts.strategies import SIDES, side_of
from gen2embed_mteb.errors import Gen2EmbedError


class NamedPrompts(SentenceTransformer):
    """A `SentenceTransformer` in which the name of a prompt tells the side of the inputs."""

    def encode(
        self, inputs: Any, prompt_name: str | None = None, prompt: str | None = None, *args: Any, **kwargs: Any
    ) -> Any:
        """Encode inputs as sentence-transformers does; the name of a prompt may also tell the side of the inputs.

        Args:
            inputs: One input or a list of them; see `inputs.content_of`.
            prompt_name: "query" or "document", or a name that other libraries use for them (`SIDES`): the inputs get
                the prompt of that side. Any other value must be a name in `prompts`.
            prompt: A system prompt of the caller that replaces the strategy's.
            args: Further arguments of `SentenceTransformer.encode`.
            kwargs: Further arguments of `SentenceTransformer.encode`; `task` tells the side, too.

        Returns:
            (n, d) float32 for a list, (d,) for one input; other forms as in sentence-transformers.

        Raises:
            Gen2EmbedError: The name is unknown, or `prompt_name` and `task` name different sides.
        """
        task = side_of(kwargs.get("task"), "task")
        name = prompt_name
        if name is None and prompt is None and task is None:
            name = self.default_prompt_name
        if name is not None:
            side = SIDES.get(name.lower()) if isinstance(name, str) else None
            if side is None and name not in self.prompts:
                listed = [known for known in self.prompts if side_of_prompt_name(known) is None]
                example = next((f", and of datasets: {known}, …" for known in self.prompts if known not in listed), "")
                raise Gen2EmbedError(
                    f"unknown prompt_name {name!r}; known: {', '.join(dict.fromkeys([*SIDES, *listed]))}{example}"
                )
            side = side or side_of_prompt_name(name)
            if side is not None:
                if task not in (None, side):
                    raise Gen2EmbedError(f"prompt_name={name!r} is a {side}'s, task={task!r} is not; pass one of them")
                task = side
                if name not in self.prompts:
                    prompt_name = None if prompt is not None else self._prompt_name(side)
        if task is not None:
            kwargs["task"] = task
        return super().encode(inputs, prompt_name, prompt, *args, **kwargs)

    def side_prompt(self, task: str) -> str | None:
        """Return the system prompt in `prompts` that `encode_query` and `encode_document` use, if there is one.

        Args:
            task: "query" or "document".
        """
        return self._resolve_prompt(None, self._prompt_name(task))

    def _prompt_name(self, task: str) -> str | None:
        names = ("query",) if task == "query" else ("document", "passage", "corpus")
        return next((name for name in names if name in self.prompts), None)

    def for_dataset(self, dataset: str) -> WithDatasetPrompts | None:
        """Return an encoder with the prompts of a dataset; `None` if `prompts` has none for it.

        Args:
            dataset: The dataset's name: "N24News" has the prompts "N24News:query" and "N24News:document".
        """
        prompts = prompts_for(self, dataset)
        return WithDatasetPrompts(self, prompts) if prompts else None
