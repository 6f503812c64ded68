"""The flags of `gen2embed push`."""

from __future__ import annotations

import re
from dataclasses import dataclass

from gen2embed_mteb.errors import Gen2EmbedError
from gen2embed_mteb.flags import check_options, option

_REPO = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9_][\w.-]*")
_BRANCH = re.compile(r"[\w.-]+(/[\w.-]+)*")


@dataclass(frozen=True, kw_only=True)
class PushOptions:
    """What is sent to the hub, and where to."""

    path: str = option(
        "folder of a model (export, train, calibrate) or of sampling files (sample)", needs="a folder", positional=True
    )
    repo_id: str = option("repository on the hub, OWNER/NAME; made if it is missing", positional=True)
    revision: str = option("branch; made from main if it is missing", default="main")
    private: bool = option("only its owner may see the repository", default=True, opposite="public")
    overwrite: bool = option("replace files that the hub holds with another content", default=False)
    results: tuple[str, ...] = option(
        "output folders of evaluate on this model, whose tables the card gets (default: none)", default=()
    )
    dry_run: bool = option(
        "send nothing: show files, sizes, digests and the card, and what is left out and why", default=False
    )

    def __post_init__(self) -> None:
        """Check every value.

        Raises:
            Gen2EmbedError: A name is not one that the hub accepts.
        """
        check_options(self)
        if not _REPO.fullmatch(self.repo_id) or ".." in self.repo_id or "--" in self.repo_id:
            raise Gen2EmbedError(f"repo_id is {self.repo_id!r}; pass OWNER/NAME")
        if not _BRANCH.fullmatch(self.revision):
            raise Gen2EmbedError(f"revision is {self.revision!r}; pass the name of a branch")
