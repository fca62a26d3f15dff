"""Fetches the raw datasets from the Hugging Face hub, at fixed commits, and checks every file against the hub's hash.

huggingface_hub does the transfer: it resumes what was interrupted and gives a file its name only when it is whole. A
file that is there and has the right hash is not fetched again. `download.json` beside the files records the commit.
"""

import fnmatch
import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import HfApi, hf_hub_download
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from utils.io.errors import UserError, suggest
from utils.io.files import write_json

_ANSWER_WITHIN = 10  # seconds
_READ = 1 << 20


@dataclass(frozen=True)
class HubDataset:
    """Where a raw dataset comes from.

    Args:
        repo: dataset repository on the hub.
        revision: commit, or a branch where none is pinned.
        files: shell patterns of the files that are needed.
    """

    repo: str
    revision: str
    files: tuple[str, ...]


def read_hub_datasets(path: Path) -> dict[str, HubDataset]:
    """Read the table of datasets from a YAML file.

    Raises:
        UserError: the file is not of the form `NAME: {repo, revision, files}`.
    """
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
        return {
            str(name): HubDataset(str(entry["repo"]), str(entry["revision"]), tuple(map(str, entry["files"])))
            for name, entry in content.items()
        }
    except (yaml.YAMLError, UnicodeDecodeError, AttributeError, KeyError, TypeError) as error:
        raise UserError(f"{path}: must hold `NAME:` with repo, revision and files for each dataset ({error})") from None


def choose(table: dict[str, HubDataset], names: list[str] | None) -> dict[str, HubDataset]:
    """Return the named entries of the table, all of them for None.

    Raises:
        UserError: a name is not in the table.
    """
    for name in names or ():
        if name not in table:
            raise UserError(f"--datasets {name}: unknown{suggest(name, table)}; there are {', '.join(table)}")
    return {name: table[name] for name in names or table}


def download(name: str, source: HubDataset, raw_data_root: Path) -> dict[str, Any]:
    """Bring one dataset to `raw_data_root/name`.

    Args:
        name: its folder.
        source: where it comes from.
        raw_data_root: made if it is not there.

    Returns:
        What `download.json` records: repository, commit, and size and hash of each file.

    Raises:
        UserError: the hub cannot be reached, does not have it, or what arrived is not what the hub says it has.
    """
    try:
        info = HfApi().dataset_info(source.repo, revision=source.revision, files_metadata=True, timeout=_ANSWER_WITHIN)
        wanted = [
            file
            for file in info.siblings or ()
            if any(fnmatch.fnmatchcase(file.rfilename, pattern) for pattern in source.files)
        ]
        for pattern in source.files:
            if not fnmatch.filter([file.rfilename for file in wanted], pattern):
                raise UserError(f"{name}: {source.repo} has no file {pattern} at {info.sha}")
        files = {file.rfilename: _fetch(file, source.repo, info.sha, raw_data_root / name) for file in wanted}
    except UserError:
        raise
    except Exception as error:
        if message := _explain(error, source):
            raise UserError(f"{name}: {message}") from None
        raise
    record = {"repo": source.repo, "revision": source.revision, "commit": info.sha, "files": files}
    write_json(raw_data_root / name / "download.json", record)
    return record


def _fetch(file: Any, repo: str, commit: str, folder: Path) -> dict[str, Any]:
    path = folder / file.rfilename
    if not _is_whole(path, file):
        # Without force, a file that is there but has been changed would be taken for the one that was downloaded.
        changed = path.exists()
        hf_hub_download(
            repo, file.rfilename, repo_type="dataset", revision=commit, local_dir=folder, force_download=changed
        )
        if not _is_whole(path, file):
            path.unlink(missing_ok=True)
            raise UserError(f"{path}: what arrived does not have the hash that the hub gives for it; download it again")
    return {"bytes": file.size, "hash": file.lfs.sha256 if file.lfs else file.blob_id}


def _is_whole(path: Path, file: Any) -> bool:
    """Compare size and hash: SHA-256 for large files, git's blob hash for the others."""
    if not path.is_file() or path.stat().st_size != file.size:
        return False
    digest = hashlib.sha256() if file.lfs else hashlib.sha1(b"blob %d\0" % file.size, usedforsecurity=False)
    with open(path, "rb") as content:
        while piece := content.read(_READ):
            digest.update(piece)
    return digest.hexdigest() == (file.lfs.sha256 if file.lfs else file.blob_id)


def _explain(error: Exception, source: HubDataset) -> str:
    """Say in one line what a failure of the hub client means; an empty string for anything else."""
    where = f"https://huggingface.co/datasets/{source.repo}"
    if isinstance(error, OfflineModeIsEnabled):
        return "HF_HUB_OFFLINE is set, so nothing can be downloaded; unset it"
    if isinstance(error, GatedRepoError):
        return f"{where} asks for your agreement: give it there, then log in with `hf auth login`"
    if isinstance(error, RepositoryNotFoundError):
        return f"{where} does not exist or is not for your account"
    if isinstance(error, RevisionNotFoundError):
        return f"{where} has no revision {source.revision}; set another in the YAML file, for example main"
    if isinstance(error, HfHubHTTPError):
        return f"{where}: the hub answered: {str(error).splitlines()[0]}"
    # Errors of the connection come from the HTTP library that huggingface_hub uses, which changes with its version.
    lost = isinstance(error, (ConnectionError, LocalEntryNotFoundError)) or type(error).__module__.startswith("http")
    if lost:
        return (
            f"the hub cannot be reached ({str(error).splitlines()[0] if str(error) else type(error).__name__}). Is "
            f"there a connection? What has arrived is kept and resumed; or fetch {where} elsewhere and put "
            f"{', '.join(source.files)} into the dataset's folder"
        )
    return ""
