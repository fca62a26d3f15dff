"""The checkpoints' settings that are in git fit the models that they name."""

import json
from pathlib import Path

import pytest
import torch

from utils.model.checkpoint import make_settings, mod_config, model_class_for, read_config

ROOT = Path(__file__).resolve().parents[2]
VARIANTS = {  # folder -> base, billions of parameters, routed layers
    "smollm2-135m-mod": ("HuggingFaceTB/SmolLM2-135M-Instruct", 0.135, range(15, 29)),
    "mistral-7b-mod": ("mistralai/Mistral-7B-v0.3", 7.248, range(15, 31)),
    "qwen-2.5-7b-mod": ("Qwen/Qwen2.5-7B", 7.616, range(13, 27)),
    "llama3-8b-instruct-mod": ("meta-llama/Meta-Llama-3-8B-Instruct", 8.030, range(15, 31)),
    "olmoe-1b-7b-mod": ("allenai/OLMoE-1B-7B-0924", 6.920, range(7, 15)),  # 6.919 and a million for the routers
    "deepseek-v2-lite-mod": ("deepseek-ai/DeepSeek-V2-Lite", 15.708, range(13, 26)),
}


def test_all_named_variants_are_there():
    assert {path.parent.name for path in (ROOT / "ckpt").glob("*/config.json")} >= set(VARIANTS)


@pytest.mark.parametrize("folder", VARIANTS)
def test_variant(folder):
    base_model, billions, layers = VARIANTS[folder]
    config = read_config(ROOT / "ckpt" / folder)
    model_class = model_class_for(config)
    loaded = model_class.config_class.from_pretrained(ROOT / "ckpt" / folder)
    assert loaded.model_type == config["model_type"]
    assert loaded.mod_settings.layers == tuple(layers)
    assert loaded.mod_settings.base_model == base_model
    with torch.device("meta"):
        model = model_class(loaded)
    assert model.num_parameters() / 1e9 == pytest.approx(billions, abs=1e-3)
    dense = {name: value for name, value in config.items() if name not in ("auto_map", "mod")}
    dense["model_type"] = config["model_type"].removeprefix("mod_")
    assert mod_config(dense, make_settings(config)) == config


def test_smollm2s_is_what_building_it_from_the_embedded_base_writes(smollm2_dir):
    config = read_config(ROOT / "ckpt/smollm2-135m-mod")
    assert json.loads(json.dumps(mod_config(read_config(smollm2_dir), make_settings(config)))) == config
