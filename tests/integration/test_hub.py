"""Base models and routers from and to a hub on this machine: pinned, cut, gated, missing, offline, published."""

import json
import sys

import pytest
from commands import run
from model_hub import COMMIT, TOKEN, running_hub
from safetensors.torch import load_file

BASE = "owner/base"


@pytest.fixture(scope="module")
def hub(workplace):
    with running_hub() as server:
        files = {path.name: path.read_bytes() for path in (workplace / "base").iterdir()}
        server.models[BASE] = files | {"original/model.bin": b"not wanted"}
        yield server


@pytest.fixture
def build(hub, repository, tmp_path):
    """Builds a checkpoint as a user of that hub, with a cache of his own."""

    def build(*arguments, home=tmp_path / "home", offline=False, token=None, check=True, endpoint=hub.address):
        hub.seen.clear()
        environment = {"HF_HUB_OFFLINE": str(int(offline)), "HF_ENDPOINT": endpoint, "HF_HOME": str(home)}
        environment |= {"HF_TOKEN": token or "", "NO_PROXY": "127.0.0.1,localhost", "HF_HUB_DISABLE_XET": "1"}
        script = repository / "entrypoints/checkpoint/build_mod_checkpoint.py"
        return run(sys.executable, script, "--ckpt_root", tmp_path / "ckpt", *arguments, check=check, **environment)

    return build


def error_line(done):
    assert done.returncode == 1, done.stderr
    assert "Traceback" not in done.stderr
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    return line


def test_a_base_is_fetched_once_whole_though_the_connection_is_cut_and_then_is_there_offline(hub, build, tmp_path):
    hub.cuts = 1
    first = build("--folder_name", "a", "--base_model", BASE, check=False)
    if first.returncode:  # depending on its version the hub client tries again by itself
        assert "cannot be reached" in error_line(first)
        build("--folder_name", "a", "--base_model", BASE)
    assert hub.cuts == 0
    fetched = load_file(tmp_path / "ckpt/a/base.safetensors")
    assert fetched
    build("--folder_name", "b", "--base_model", BASE, offline=True)
    assert hub.seen == []
    assert not list((tmp_path / "home").rglob("model.bin"))


@pytest.mark.slow
def test_gated_missing_and_unreachable_models_are_errors_of_one_line(hub, build, tmp_path):
    hub.models["owner/gated"] = hub.models[BASE]
    hub.gated.add("owner/gated")
    gated = "--folder_name", "a", "--base_model", "owner/gated"
    for token in (None, "hf_of_another"):
        assert "accept its licence" in error_line(build(*gated, token=token, check=False))
    build(*gated, token=TOKEN)
    assert "no such model on the hub" in error_line(
        build("--folder_name", "b", "--base_model", "owner/none", check=False)
    )
    elsewhere = tmp_path / "empty"
    for options in ({"offline": True}, {"endpoint": "http://127.0.0.1:9"}):
        done = build("--folder_name", "b", "--base_model", BASE, home=elsewhere, check=False, **options)
        assert "cannot be reached" in error_line(done)


def test_routers_are_published_and_put_on_a_base_from_elsewhere(hub, build, repository, trained, tmp_path, workplace):
    output, _ = trained
    publish = [sys.executable, repository / "entrypoints/checkpoint/publish.py", output, "me/routers"]
    environment = {"HF_HUB_OFFLINE": "0", "HF_ENDPOINT": hub.address, "HF_HOME": str(tmp_path / "publisher")}
    environment |= {"NO_PROXY": "127.0.0.1,localhost", "HF_HUB_DISABLE_XET": "1"}
    assert "base_model" in error_line(run(*publish, check=False, HF_TOKEN=TOKEN, **environment))
    refused = run(*publish, "--base_model", BASE, check=False, HF_TOKEN="hf_of_another", **environment)
    assert "hf auth login" in error_line(refused)
    done = run(*publish, "--base_model", BASE, HF_TOKEN=TOKEN, **environment)
    assert COMMIT in done.stdout
    files = hub.models["me/routers"]
    assert sum(map(len, files.values())) < 1e6
    assert not any(name.startswith("base") and name.endswith("safetensors") for name in files)
    card = files["README.md"].decode()
    assert card.startswith(f"---\nbase_model: {BASE}\n")
    assert "held-out loss" in card
    assert str(workplace) not in "".join(content.decode("utf-8", "replace") for content in files.values())

    routers = "--routers", "me/routers", "--revision", COMMIT
    build("--folder_name", "from-hub", *routers)
    build("--folder_name", "from-folder", *routers, "--base_model", workplace / "base", offline=True)
    wanted = load_file(output / "routers.safetensors")
    for name in ("from-hub", "from-folder"):
        folder = tmp_path / "ckpt" / name
        assert all(weight.equal(wanted[key]) for key, weight in load_file(folder / "routers.safetensors").items())
        settings = json.loads((folder / "config.json").read_text())["mod"]
        assert settings["base_model"] == BASE
        assert settings["threshold"] == json.loads((output / "config.json").read_text())["mod"]["threshold"]
