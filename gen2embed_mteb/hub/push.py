"""Sends planned files to the hub as one commit, and reads back what the hub then lists.

1. The repository and its branch are looked up, and made if they are missing; private, unless the user says otherwise.
2. What the hub lists is compared with the plan. If every file is there as it should be, nothing is sent.
3. The files are uploaded and committed at once, so that readers see all of them or none. Large files that arrived
   before an interruption are not sent again. If somebody else committed meanwhile, the hub refuses the commit.
4. What the commit lists is compared with the plan, size and digest of every file.

A file of another content on the hub is replaced only with `overwrite`; the hub keeps the old one in its history. No
file is deleted. The token is the one that huggingface_hub finds; it is neither printed nor written.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from gen2embed_mteb.hub.errors import HubError, hub_errors, require_online
from gen2embed_mteb.hub.plans import Plan, PlannedFile
from gen2embed_mteb.version import __version__

MAIN = "main"
_SHOWN = 5


@dataclass(frozen=True, kw_only=True)
class Target:
    """Where files are sent.

    Attributes:
        repo_id: `OWNER/NAME`.
        revision: The branch.
        private: Whether only its owner may see it.
        overwrite: Whether files of another content are replaced.
    """

    repo_id: str
    revision: str = MAIN
    private: bool = True
    overwrite: bool = False


@dataclass(frozen=True)
class Pushed:
    """The outcome.

    Attributes:
        commit: The commit that has the files.
        sent: The names of files that were sent; empty if all were there.
        url: Where people see them.
    """

    commit: str
    sent: tuple[str, ...]
    url: str


def push(plan: Plan, target: Target) -> Pushed:
    """Send a plan's files; see this module's docstring.

    Args:
        plan: What is sent.
        target: Where to.

    Raises:
        HubError: There is no token, the hub refused, the repository is public or holds other files, or what it lists
            afterwards is not what was sent.
    """
    from huggingface_hub import CommitOperationAdd, HfApi, get_token

    name = target.repo_id
    require_online(name, "cannot be sent to")
    if not get_token():
        raise HubError(f"{name}: nothing to log in with; run `hf auth login`, or set HF_TOKEN")
    api = HfApi(library_name="gen2embed", library_version=__version__)
    with hub_errors(name, "cannot be sent to"):
        head = _prepared(api, plan, target)
        listed = _listed(api, plan, target, head)
        changed = [file for file in plan.files if _fault(file, listed.get(file.name))]
        _require_free(plan, target, listed, changed)
        url = f"{api.endpoint}/{'datasets/' if plan.kind == 'dataset' else ''}{name}"
        if not changed:
            return Pushed(head, (), url)
        made = api.create_commit(
            name,
            [CommitOperationAdd(file.name, _content(file)) for file in changed],
            commit_message=f"{len(changed)} files by gen2embed {__version__}",
            repo_type=plan.kind,
            revision=target.revision,
            parent_commit=head,
        )
        listed = _listed(api, plan, target, made.oid)
    faults = [f"{file.name} {fault}" for file in plan.files if (fault := _fault(file, listed.get(file.name)))]
    if faults:
        raise HubError(
            f"{name}: read back from commit {made.oid[:12]}, {'; '.join(faults[:_SHOWN])} ({len(faults)} in all); push "
            "again with --overwrite, and do not use that commit"
        )
    return Pushed(made.oid, tuple(file.name for file in changed), url)


def _content(file: PlannedFile) -> str | bytes:
    return file.content if isinstance(file.content, bytes) else str(file.content)


def _prepared(api: Any, plan: Plan, target: Target) -> str:
    """Return the commit that the branch is at, after making repository and branch if they are missing."""
    from huggingface_hub.errors import RepositoryNotFoundError, RevisionNotFoundError

    where = {"repo_id": target.repo_id, "repo_type": plan.kind}
    try:
        found = api.repo_info(**where)
    except RepositoryNotFoundError:
        api.create_repo(**where, private=target.private, exist_ok=True)
        found = api.repo_info(**where)
    if target.private and not found.private:
        raise HubError(f"{target.repo_id} is public, and these files would be, too; pass --public, or another name")
    if target.revision == MAIN:
        return str(found.sha)
    try:
        return str(api.repo_info(**where, revision=target.revision).sha)
    except RevisionNotFoundError:
        api.create_branch(**where, branch=target.revision, exist_ok=True)
        return str(api.repo_info(**where, revision=target.revision).sha)


def _listed(api: Any, plan: Plan, target: Target, commit: str) -> dict[str, Any]:
    """Return what a commit lists, by path."""
    from huggingface_hub import RepoFile

    tree = api.list_repo_tree(target.repo_id, recursive=True, revision=commit, repo_type=plan.kind)
    return {entry.path: entry for entry in tree if isinstance(entry, RepoFile)}


def _fault(file: PlannedFile, found: Any) -> str:
    """Return in which way what the hub lists is not the file; an empty text if it is."""
    if found is None:
        return "is not there"
    if found.size != file.size:
        return f"has {found.size:,} bytes, not {file.size:,}"
    if found.lfs is not None:
        return (
            "" if found.lfs.sha256 == file.sha256 else f"has SHA-256 {found.lfs.sha256[:12]}…, not {file.sha256[:12]}…"
        )
    return "" if found.blob_id == file.blob else f"has the digest {found.blob_id[:12]}…, not {file.blob[:12]}…"


def _require_free(plan: Plan, target: Target, listed: dict[str, Any], changed: list[PlannedFile]) -> None:
    """Refuse to replace files without leave, and to send a model beside weights of another."""
    replaced = [file.name for file in changed if file.name in listed]
    if replaced and not target.overwrite:
        raise HubError(
            f"{target.repo_id} holds {', '.join(replaced[:_SHOWN])} with another content ({len(replaced)} in all); "
            "pass --overwrite to replace them (the hub's history keeps the old ones), or another name or --revision"
        )
    ours = {file.name for file in plan.files}
    mixed = sorted(path for path in listed if path not in ours and plan.decisive.fullmatch(path))
    if mixed:
        raise HubError(
            f"{target.repo_id} holds {', '.join(mixed[:_SHOWN])}, which is not of this folder and would be read "
            "together with it; delete it on the hub, or pass another name or --revision"
        )
