"""A release on the hub, in one commit, in a repository that is private unless told otherwise.

Reads a release's folder and refuses it where a byte is not as its release.json says. `huggingface/` goes to the
repository's root, so that transformers loads it by its name; what lies beside it keeps its place. The hub is
HF_ENDPOINT's, the user HF_TOKEN's, as for everything that huggingface_hub does.
"""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi

from tinyllama.errors import InputError
from tinyllama.hub import translate_hub_errors
from tinyllama.release.lineage import read_facts
from tinyllama.release.verify import file_checks

_FACTS = "release.json"
_ROOT = "huggingface/"


def push(release_folder: str | Path, name: str, public: bool = False) -> str:
    """Upload a release to the hub's repository `name`, OWNER/NAME or a name of the user's own; return its URL.

    A repository that is not there yet is made, private unless `public`; one that is there stays as visible as it is.
    What an earlier release put there and this one lacks is deleted in the same commit. Raises InputError where the
    folder is no whole release, and where the hub cannot be reached or will not have it.
    """
    folder = Path(release_folder)
    facts = _checked(folder)
    files = {_repo_path(file): folder / file for file in (*facts["files"], _FACTS)}
    api = HfApi(endpoint=os.environ.get("HF_ENDPOINT", "").rstrip("/") or None)
    with translate_hub_errors(api.endpoint, name):
        repository = name if "/" in name else f"{api.whoami()['name']}/{name}"
        url = api.create_repo(repository, private=not public, exist_ok=True)
        stale = _stale_remote_files(api, repository) - files.keys()
        operations: list[CommitOperationAdd | CommitOperationDelete] = [
            CommitOperationAdd(place, path) for place, path in files.items()
        ]
        operations += map(CommitOperationDelete, sorted(stale))
        api.create_commit(repository, operations, commit_message=_message(facts))
    return str(url)


def _message(facts: Mapping[str, Any]) -> str:
    if facts.get("step") is None:  # others' weights, of no run
        return str(facts["name"])
    return f"{facts['name']}, step {facts['step']:,}, {facts['tokens']:,} tokens"


def _checked(folder: Path) -> dict[str, Any]:
    """The release.json of a folder that is exactly as it says; hidden files aside."""
    facts = read_facts(folder)
    for check in file_checks(folder, facts["files"]):
        if not check.passed:
            how = "missing, but" if check.what == "file" else "not as"
            raise InputError(f"{folder / check.subject}: {how} {_FACTS} has it; put it back, or release with --force")
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        name = path.relative_to(folder).as_posix()
        if name not in (_FACTS, *facts["files"]) and not any(part.startswith(".") for part in Path(name).parts):
            raise InputError(f"{path}: not in {_FACTS}, so it would not be pushed; move it out of the release")
    return facts


def _repo_path(name: str) -> str:
    """Where a release's file lies in the repository."""
    return name.removeprefix(_ROOT)


def _stale_remote_files(api: HfApi, repository: str) -> set[str]:
    """What the repository has of a release that was pushed before: its shards, say, would be taken for this one's."""
    there = set(api.list_repo_files(repository))
    if _FACTS not in there:
        return set()
    with TemporaryDirectory() as cache:
        facts = json.loads(Path(api.hf_hub_download(repository, _FACTS, cache_dir=cache)).read_bytes())
    listed = facts.get("files") if isinstance(facts, dict) else None  # it may be anybody's file
    return there & {_repo_path(name) for name in listed or ()}
