"""What the meter counts while a model generates or scores is what its decisions were, without padding."""

import model_zoo
import pytest
import torch

from utils.evaluation.capacity import CapacityMeter


def routed_model(arch, granularity):
    _, model = model_zoo.make_pair(arch, granularity)
    return model_zoo.randomize_routers(model)


@pytest.mark.parametrize("granularity", ["block_sequence", "attn_token"])
def test_a_padded_batch_counts_as_its_texts_do(granularity):
    model, texts = routed_model("llama", granularity), model_zoo.texts((5, 9, 3, 12))
    meter = CapacityMeter(model)
    with torch.no_grad():
        for text in texts:
            model(text.unsqueeze(0))
        alone = meter.read()
        for side in ("left", "right"):
            input_ids, mask = model_zoo.pad(texts, side, extra=2)
            model(input_ids, attention_mask=mask)
            together = meter.read()
            assert together["inputs"] == alone["inputs"] == (4 if granularity == "block_sequence" else 29)
            assert together["layers"] == alone["layers"]
            assert together["capacity"] == pytest.approx(sum(alone["layers"].values()) / 3)
        model(texts[0].unsqueeze(0), route=False)
    assert meter.read() is None
    meter.close()


@pytest.mark.parametrize(("granularity", "inputs"), [("attn_sequence", 2), ("mlp_token", 2 * (7 + 4 - 1))])
def test_a_generation_counts_a_sequence_once_and_every_token(granularity, inputs):
    model = routed_model("llama", granularity)
    meter = CapacityMeter(model)
    model.generate(model_zoo.random_tokens(2, 7), max_new_tokens=4, min_new_tokens=4, do_sample=False)
    counted = meter.read()
    assert counted["inputs"] == inputs
    assert list(counted["layers"]) == list(model_zoo.LAYERS)
    meter.close()


def test_tokens_are_counted_for_each_expert():
    model = routed_model("olmoe", "expert_token")
    meter = CapacityMeter(model)
    texts = model_zoo.texts((6, 11))
    input_ids, mask = model_zoo.pad(texts, "left")
    with torch.no_grad():
        output = model(input_ids, attention_mask=mask)
    counted = meter.read()
    meter.close()
    real = mask.bool().unsqueeze(-1).expand_as(output.router_gates[0])
    for number, layer in enumerate(counted["layers"]):
        gates, experts = output.router_gates[number][real], output.router_experts[number][real]
        for expert in range(model_zoo.NUM_EXPERTS):
            assert counted["experts"][layer]["assigned"][expert] == int((experts == expert).sum())
            assert counted["experts"][layer]["executed"][expert] == int(gates[experts == expert].sum())
        assert sum(counted["experts"][layer]["assigned"]) == 3 * (6 + 11) == counted["inputs"]
        assert counted["layers"][layer] == pytest.approx(float(gates.mean()))
