"""Routers on the hub: a checkpoint without its base's weights, kilobytes to a few megabytes, and back.

What is published are the small files of a run's output, a model card, and what identifies the base, so that whoever
fetches them can put them on the same base from wherever he has it. A repository of these is not a checkpoint; with the
base it becomes one again.
"""

import json
import shutil
import tempfile
from pathlib import Path
from typing import Any

from safetensors.torch import load_file

from utils.io.errors import UserError
from utils.io.files import read_json, write_json

from .base_identity import difference_of_bases, identify_model
from .base_models import HUB_TIMEOUT, HubUnreachableError, asking_the_hub
from .checkpoint import (
    ROUTERS_FILE,
    SUBSTITUTES_FILE,
    is_mod,
    make_settings,
    read_config,
    read_routers,
    read_units,
    write_checkpoint,
)
from .lora import holds_adapter

BASE_FILE = "base.json"
"""What identifies the base, as `identify_model` returns it."""
CARD_FILE = "README.md"
SMALL_FILES = ("config.json", ROUTERS_FILE, SUBSTITUTES_FILE, "results.json", "*_mod.py")


def stage(directory: str | Path, target: str | Path, base_model: str | None, table: str) -> None:
    """Write into a folder what is published of a checkpoint.

    Args:
        directory: the checkpoint, output of a run with a frozen backbone.
        target: an empty folder.
        base_model: hub name of the base; default what the checkpoint has.
        table: of the results, as text for the card; empty for none.

    Raises:
        UserError: it is no MoD checkpoint, has weights besides routers that were trained, or names no base that others
            can have.
    """
    directory, target = Path(directory), Path(target)
    config = read_config(directory)
    if not is_mod(config):
        raise UserError(f"{directory}: a dense model has no routers to publish; name the output of a run")
    if holds_adapter(directory) or _trained_backbone(directory):
        raise UserError(
            f"{directory}: not only its routers were trained, so they are of no use with the base alone: upload the "
            "directory whole, with `hf upload`"
        )
    name = base_model or config["mod"].get("base_model") or ""
    if name.count("/") != 1 or name.startswith(("/", ".")):
        raise UserError(f"base_model {name!r} is no name on the hub; give --base_model OWNER/NAME, where others get it")
    for pattern in SMALL_FILES:
        for path in sorted(directory.glob(pattern)):
            shutil.copyfile(path, target / path.name)
    write_json(target / "config.json", config | {"mod": config["mod"] | {"base_model": name}})
    write_json(target / BASE_FILE, identify_model(directory))
    (target / CARD_FILE).write_text(card(config, name, table), encoding="utf-8")


def card(config: dict[str, Any], base_model: str, table: str) -> str:
    """Return the model card, Markdown with the hub's metadata.

    Args:
        config: the checkpoint's `config.json`.
        base_model: hub name of the base.
        table: of the results, as text; empty for none.
    """
    settings = make_settings(config)
    layers = ", ".join(map(str, settings.layers))
    results = f"\n## Results\n\n```\n{table.strip()}\n```\n" if table.strip() else ""
    return f"""---
base_model: {base_model}
library_name: transformers
pipeline_tag: text-generation
tags:
- router-tuning
- dynamic-depth
---

# Routers for {base_model}

Routers that decide, for each input, what of the layers {layers} is computed (`{settings.granularity}`), trained by
[Router-Tuning](https://arxiv.org/abs/2410.13184) with the base frozen. This repository has no weights of the base. In a
clone of the code that made it:

```bash
python entrypoints/checkpoint/build_mod_checkpoint.py --folder_name NAME --routers THIS_REPOSITORY
```

fetches routers and base and makes `ckpt/NAME`, which transformers loads with `trust_remote_code=True`; with
`--base_model path/to/base` the base comes from there.
{results}"""


def publish(staged: str | Path, repo_id: str, private: bool = False) -> str:
    """Upload a folder of `stage` to the hub, into a repository that is made where it is not there.

    Returns:
        The address of the commit.

    Raises:
        UserError: the hub can't be reached, or does not let this user.
    """
    from huggingface_hub import HfApi

    api = HfApi()
    try:
        with asking_the_hub(f"repository {repo_id!r}", repo_id):
            api.create_repo(repo_id, private=private, exist_ok=True)
            done = api.upload_folder(repo_id=repo_id, folder_path=str(staged), commit_message="Routers and model card")
    except HubUnreachableError as unreachable:
        raise UserError(
            f"repository {repo_id!r}: the hub cannot be reached, or refuses ({unreachable}); run `hf auth login` "
            "with a token that may write there, and try again"
        ) from unreachable
    return str(done)


def fetch(name_or_path: str, revision: str | None = None) -> Path:
    """Return a local folder with published routers, fetching them where `name_or_path` is a name on the hub.

    Raises:
        UserError: they can't be had, or it holds no routers.
    """
    folder = Path(name_or_path).expanduser()
    if not folder.is_dir():
        from huggingface_hub import HfApi, snapshot_download
        from huggingface_hub.errors import LocalEntryNotFoundError

        patterns = [*SMALL_FILES, BASE_FILE, CARD_FILE]
        try:
            with asking_the_hub(f"routers {name_or_path!r}", name_or_path, revision):
                HfApi().model_info(name_or_path, revision=revision, timeout=HUB_TIMEOUT)
                folder = Path(snapshot_download(name_or_path, revision=revision, allow_patterns=patterns))
        except HubUnreachableError as unreachable:
            try:
                folder = Path(
                    snapshot_download(name_or_path, revision=revision, allow_patterns=patterns, local_files_only=True)
                )
            except LocalEntryNotFoundError:
                raise UserError(
                    f"routers {name_or_path!r}: the hub cannot be reached ({unreachable}) and they are not in its cache"
                ) from unreachable
    if not (folder / ROUTERS_FILE).is_file():
        raise UserError(f"routers {name_or_path!r}: no {ROUTERS_FILE} there")
    return folder


def assemble(routers_dir: Path, base_dir: Path, output_dir: Path, copy_base: bool = False) -> str:
    """Write the checkpoint of published routers on their base.

    Returns:
        How the base's weights got there, as `write_checkpoint`.

    Raises:
        UserError: it is another base than the routers were trained on.
    """
    config = read_config(routers_dir)
    if (routers_dir / BASE_FILE).is_file():
        identity = read_json(routers_dir / BASE_FILE)
        if differs := difference_of_bases(identity, json.loads(json.dumps(identify_model(base_dir)))):
            raise UserError(f"{base_dir}: not the base that these routers were trained on ({differs} differs)")
    routers, _ = read_routers(routers_dir)
    file = routers_dir / SUBSTITUTES_FILE
    substitutes = load_file(file) if file.is_file() else None
    return write_checkpoint(
        output_dir,
        base_dir,
        make_settings(config),
        routers,
        copy_base=copy_base,
        units=read_units(routers_dir),
        substitutes=substitutes,
    )


def _trained_backbone(directory: Path) -> bool:
    """Tell whether a run's record says that the backbone trained too."""
    record = directory / "run.json"
    if not record.is_file():
        return False
    arguments = read_json(record).get("arguments", {})
    return any(part.get("router_only") is False for part in arguments.values() if isinstance(part, dict))


def published(directory: str | Path, repo_id: str, base_model: str | None, table: str, private: bool = False) -> str:
    """Stage and publish a checkpoint's routers; returns the address of the commit."""
    with tempfile.TemporaryDirectory() as folder:
        stage(directory, folder, base_model, table)
        return publish(folder, repo_id, private)
