"""Worked-out memory: what is counted on the meta device, and what is refused because it can't fit."""

import json
from dataclasses import replace

import pytest
import torch

from utils.io.errors import UserError
from utils.model.allocation import AllocatedBytes, peak_of_shapes
from utils.model.checkpoint import make_settings, meta_model
from utils.pipeline.held_out import held_out_results
from utils.pipeline.memory import OVERHEAD, Step, count_step, model_of, refuse_what_cannot_fit, step_bytes

GB = 1e9
TRAINED = Step(rows=1, tokens=2048, processes=8, zero_stage=1, train_backbone=True, distilled=False)
LINEAR = {"kind": "linear", "rank": 341}


@pytest.fixture(scope="module")
def shapes(repository):
    """Folder under ckpt, granularity, number of layers -> a config and settings; half of the layers are routed."""

    def make(name, granularity="attn_sequence", layers=None):
        config = json.loads((repository / "ckpt" / name / "config.json").read_text())
        if layers is not None:
            config["num_hidden_layers"] = layers
            return config, make_settings(config, mod_n=layers // 2, granularity=granularity)
        return config, make_settings(config, granularity=granularity)

    return make


class TestCounting:
    def test_peaks_on_the_meta_device_are_those_of_a_real_run(self):
        def run(device):
            x = torch.ones(100, 50, device=device)
            y = (x * 2).relu()
            z = y @ torch.ones(50, 30, device=device)
            del y
            return z.exp()

        with AllocatedBytes() as real:
            kept = run("cpu")
        assert real.now == kept.nbytes
        assert peak_of_shapes(lambda: run("meta")) == real.peak

    def test_a_program_that_looks_at_values_sees_ones(self):
        def look():
            x = torch.zeros(4, 3, device="meta")
            assert x.sum().item() == 1.0
            assert len(x[x > 0]) == 12
            assert x.cpu().sum() == 12
            assert x.nonzero().shape == (12, 2)

        peak_of_shapes(look)

    def test_attention_keeps_no_weights_of_all_keys(self):
        def attend():
            q = torch.zeros(1, 4, 1000, 16, device="meta", requires_grad=True)
            torch.nn.functional.scaled_dot_product_attention(q, q, q, is_causal=True).sum().backward()

        assert peak_of_shapes(attend) < 4 * 1000 * 1000

    def test_activations_grow_with_what_is_kept_for_the_backward(self, shapes):
        config, settings = shapes("mistral-7b-mod", layers=4)

        def activations(**changed):
            step = Step(**({"rows": 1, "tokens": 512, "distilled": False} | changed))
            return count_step(model_of(config, settings, step), step)

        frozen, trained = activations(), activations(train_backbone=True)
        assert frozen < trained
        assert activations(train_backbone=True, checkpointing=True) < trained
        assert activations(rows=2) > 1.5 * frozen


def test_a_trained_backbone_that_cannot_fit_is_refused_with_what_would(shapes):
    config, settings = shapes("mistral-7b-mod", layers=4)
    parts = step_bytes(config, settings, TRAINED)
    assert parts["weights"] == parts["gradients"] > parts["optimizer"]
    total = sum(parts.values())
    refuse_what_cannot_fit(config, settings, TRAINED, total + OVERHEAD, "a GPU")
    with pytest.raises(UserError) as refused:
        refuse_what_cannot_fit(config, settings, TRAINED, total + OVERHEAD - 1, "a GPU")
    message = str(refused.value)
    assert f"= {total / GB:.1f} GB" in message
    assert "it does with --activation_checkpointing true" in message
    least = sum(step_bytes(config, settings, replace(TRAINED, zero_stage=3, checkpointing=True)).values())
    with pytest.raises(UserError, match=r"deepspeed_zero3\.yaml and --activation_checkpointing true"):
        refuse_what_cannot_fit(config, settings, TRAINED, least + OVERHEAD, "a GPU")
    with pytest.raises(UserError, match="nothing fits"):
        refuse_what_cannot_fit(config, settings, TRAINED, OVERHEAD, "a GPU")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "granularity", "substitute", "peak"),
    [
        ("mistral-7b-mod", "attn_sequence", None, 19.8),
        ("mistral-7b-mod", "block_token", LINEAR, 21.5),
        ("llama3-8b-instruct-mod", "attn_sequence", None, 21.4),
        ("llama3-8b-instruct-mod", "block_token", LINEAR, 23.4),
    ],
)
def test_peak_of_router_training(shapes, name, granularity, substitute, peak):
    config, settings = shapes(name, granularity)
    total = sum(step_bytes(config, settings, Step(rows=1, tokens=2048, substitute=substitute)).values())
    assert total / GB == pytest.approx(peak, rel=0.02)


@pytest.mark.slow
def test_the_example_of_the_readme_fits_on_eight_gpus_of_80_gb_and_its_table_is_right(shapes, repository):
    config, settings = shapes("mistral-7b-mod")
    text = (repository / "README.md").read_text()
    rows = {
        "Mistral-7B, routers of 16 layers": Step(rows=1, tokens=2048),
        "trained, 8 GPUs, ZeRO-1": TRAINED,
    }
    for stage, name in ((1, "the same, activation checkpointing"), (2, "the same, ZeRO-2"), (3, "the same, ZeRO-3")):
        rows[name] = Step(
            rows=1,
            tokens=2048,
            processes=8,
            zero_stage=stage,
            checkpointing=True,
            train_backbone=True,
            distilled=False,
        )
    for name, step in rows.items():
        parts = step_bytes(config, settings, step)
        cells = " | ".join(f"{size / GB:.1f}" for size in (*parts.values(), sum(parts.values())))
        assert f"| {name} | {cells} |" in text
    assert sum(step_bytes(config, settings, rows["the same, ZeRO-2"]).values()) + OVERHEAD < 80 * GB
    assert sum(parts.values()) < 80 * GB


@pytest.mark.slow
@pytest.mark.parametrize("name", ["mistral-7b-mod", "llama3-8b-instruct-mod"])
def test_recalibration_and_evaluation_take_little_more_than_training(shapes, name):
    from utils.pipeline.calibration import logits_of_routers

    config, settings = shapes(name)
    training = sum(step_bytes(config, settings, Step(rows=1, tokens=2048)).values())
    model = meta_model(config, settings).to(torch.bfloat16).eval()
    weights = sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())
    ones = torch.ones(8, 2048, dtype=torch.int64, device="meta")
    batch = {"input_ids": ones, "attention_mask": ones, "labels": ones}
    cuts = dict.fromkeys(settings.places, (0.0, 1.0))
    longer = torch.ones(8, 2500, dtype=torch.int64, device="meta")

    def calibrate():
        logits_of_routers(model, [{k: v for k, v in batch.items() if k != "labels"}], cuts, lambda u: (u >= 0).float())

    def evaluate():  # as the harness's model does: logits of continuations alone
        with torch.no_grad():
            model(longer, attention_mask=longer, use_cache=False, logits_to_keep=16)

    for call in (calibrate, lambda: held_out_results(model, [batch]), evaluate):
        assert weights + peak_of_shapes(call) <= 1.1 * training
