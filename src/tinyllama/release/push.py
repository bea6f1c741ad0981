"""Upload of a release to the Hugging Face Hub in one commit; new repositories are private by default.

A release whose files differ from release.json is refused. The content of `huggingface/` is uploaded to the repository's
root, so that transformers loads the repository by its name. Other files keep their paths. The environment
variables HF_ENDPOINT and HF_TOKEN select the hub and the user.
"""

import json
from pathlib import Path
from tempfile import TemporaryDirectory

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi

from tinyllama.errors import InputError
from tinyllama.files import Row
from tinyllama.hub import open_hub, translate_hub_errors
from tinyllama.release.verify import verify_files
from tinyllama.runs.run_dir import ReleaseDir


def push_release(folder: Path, name: str, public: bool = False) -> str:
    """Upload a release to the repository `name` (OWNER/NAME, or NAME in the user's account) of the hub; return its URL.

    A missing repository is created; the new repository is private unless `public` is true. An existing repository keeps
    its visibility. Files of an earlier release that are not part of this release are deleted in the same commit. Raises
    InputError if the release is damaged, or if the hub cannot be reached or refuses the upload.
    """
    release = ReleaseDir(folder)
    metadata, metadata_name = _verified_metadata(release), release.metadata_path.name
    files = {_repo_path(file): folder / file for file in (*metadata["files"], metadata_name)}
    message = str(metadata["name"])
    if metadata.get("step") is not None:  # releases of external weights have no step
        message += f", step {metadata['step']:,}, {metadata['tokens']:,} tokens"
    api = open_hub()
    with translate_hub_errors(api.endpoint, name):
        repository = name if "/" in name else f"{api.whoami()['name']}/{name}"
        url = api.create_repo(repository, private=not public, exist_ok=True)
        stale = _files_of_earlier_release(api, repository, metadata_name) - files.keys()
        operations = [CommitOperationAdd(path_in_repo, path) for path_in_repo, path in files.items()]
        deletions = map(CommitOperationDelete, sorted(stale))
        api.create_commit(repository, [*operations, *deletions], commit_message=message)
    return str(url)


def _verified_metadata(release: ReleaseDir) -> Row:
    """Verify that the folder contains exactly the files listed in release.json; return the content of release.json.

    Hidden files are ignored.
    """
    metadata, name = release.metadata(), release.metadata_path.name
    for check in verify_files(release.path, metadata["files"]):
        if not check.passed:
            problem = "missing" if check.what == "file" else f"differs from {name}"
            raise InputError(f"{release.path / check.subject}: {problem}; restore it, or release with --force")
    for path in sorted(path for path in release.path.rglob("*") if path.is_file()):
        file = path.relative_to(release.path)
        if file.as_posix() not in (name, *metadata["files"]) and not any(part.startswith(".") for part in file.parts):
            raise InputError(f"{path}: not in {name}, so it would not be pushed; move it out of the release")
    return metadata


def _repo_path(name: str) -> str:
    """Return the repository path of a file in a release."""
    return name.removeprefix("huggingface/")


def _files_of_earlier_release(api: HfApi, repository: str, metadata_name: str) -> set[str]:
    """Return the repository's files from an earlier push, such as old shards that would be mixed with the new ones."""
    existing = set(api.list_repo_files(repository))
    if metadata_name not in existing:
        return set()
    with TemporaryDirectory() as cache:
        metadata = json.loads(Path(api.hf_hub_download(repository, metadata_name, cache_dir=cache)).read_bytes())
    files = metadata.get("files") if isinstance(metadata, dict) else None  # another program may have written the file
    return existing & {_repo_path(name) for name in files or ()}
