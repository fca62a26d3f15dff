"""Figures of use are those of a generation token by token, whatever the batch; prompts are what training renders."""

import math
from dataclasses import replace

import model_zoo
import pytest
import torch
from chat_tokenizers import CHATML, LLAMA3, make_tokenizer, turns
from datasets import Dataset

from utils.data.chat_format import TemplateFormat
from utils.data.prompts import encode_prompts, held_out_prompts, load_sample
from utils.evaluation.forward_speed import forward_speed
from utils.evaluation.use import FIGURES, figures_of_use, longest_prompt, summarize
from utils.io.errors import UserError
from utils.model.costs import capacity_of, capacity_weights, skipped_share
from utils.pipeline.batches import with_deciding_tokens
from utils.pipeline.report import quality_and_speed, run_table

TOKENIZER = make_tokenizer()
NEW = 7


def prompt(tokens, end_token):
    return {"text": f"{len(tokens)} tokens", "input_ids": tokens.tolist(), "end_token": end_token}


def routed_model(arch, granularity):
    base = model_zoo.make_base(arch, vocab_size=len(TOKENIZER))
    layers = (3, 4) if granularity == "expert_token" else model_zoo.LAYERS
    return model_zoo.randomize_routers(model_zoo.add_routers(base, granularity, layers))


@torch.no_grad()
def one_by_one(model, input_ids, ends):
    """Return the figures and both answers of one prompt, a token at a time, by transformers' own generation."""
    ids = torch.tensor([input_ids])
    options = {"max_new_tokens": NEW, "do_sample": False, "eos_token_id": sorted(ends), "pad_token_id": 0}
    dense, routed = (model.generate(ids, route=route, **options)[0, ids.shape[1] :] for route in (False, True))
    output, cache, agreed = model(ids, use_cache=True), None, 0
    gates, read = [output.router_gates.flatten(1).mean(dim=1) * ids.shape[1]], ids.shape[1]
    for token in dense:
        agreed += int(output.logits[0, -1].argmax() == token)
        if int(token) in ends:
            break
        cache = output.past_key_values
        output = model(token.view(1, 1), past_key_values=cache, use_cache=True)
        gates.append(output.router_gates.flatten(1).mean(dim=1))
        read += 1

    def nats(answer):
        logits = model(torch.cat([ids[0], answer])[None], route=False).logits[0, ids.shape[1] - 1 : -1]
        return torch.nn.functional.cross_entropy(logits, answer).item()

    config, settings = model.config.to_dict(), model.config.mod_settings
    executed = dict(zip(settings.places, (sum(gates) / read).tolist(), strict=True))
    figures = {
        "agreement": agreed / len(dense),
        "executed": capacity_of(executed, capacity_weights(config, settings)),
        "skipped": skipped_share(config, settings, executed),
        "foreign": nats(routed) - nats(dense),
    }
    return figures, dense.tolist(), routed.tolist()


PAIRS = [
    *(("llama", granularity) for granularity in ("attn_sequence", "block_sequence", "attn_token", "mlp_token")),
    *(("llama", granularity) for granularity in ("attn_mlp_sequence", "attn_mlp_token")),
    *(("mistral", "attn_sequence"), ("qwen2", "block_token"), ("qwen3", "mlp_sequence"), ("olmoe", "expert_token")),
]


@pytest.mark.parametrize(("arch", "granularity"), PAIRS)
def test_figures_are_those_of_a_generation_token_by_token_in_every_batch(arch, granularity):
    model = routed_model(arch, granularity)
    ids = [tokens.tolist() for tokens in model_zoo.texts((5, 9, 3))]
    # an end that the second prompt's answer reaches, and the others' perhaps
    end = one_by_one(model, ids[1], {TOKENIZER.eos_token_id})[1][3]
    expected = [one_by_one(model, tokens, {end, TOKENIZER.eos_token_id}) for tokens in ids]
    assert len(expected[1][1]) <= 4 < NEW
    prompts = [prompt(torch.tensor(tokens), end) for tokens in ids]
    for batch_size in (1, 3):
        answered = []
        found = figures_of_use(model, TOKENIZER, prompts, NEW, batch_size, answered.append)
        assert answered == [batch_size] * (3 // batch_size)
        for answer, (figures, dense, routed) in zip(found["answers"], expected, strict=True):
            assert {name: answer[name] for name in FIGURES} == pytest.approx(figures, abs=1e-5)
            assert answer["tokens"] == len(dense)
            assert answer["dense"] == TOKENIZER.decode(dense, skip_special_tokens=True)
            assert answer["routed"] == TOKENIZER.decode(routed, skip_special_tokens=True)
    assert 0 < found["use"]["executed"]["mean"] < 1  # or the case says little
    assert found["use"]["agreement"]["mean"] < 1
    assert found["use"]["prompts"] == 3


def test_a_model_that_keeps_everything_answers_as_the_dense_one():
    model = model_zoo.add_routers(model_zoo.make_base("llama", vocab_size=len(TOKENIZER)), "attn_sequence")
    prompts = [prompt(tokens, 1) for tokens in model_zoo.texts((4, 7))]
    use = figures_of_use(model, TOKENIZER, prompts, NEW)["use"]
    assert use["agreement"] == {"mean": 1.0, "stderr": 0.0}
    assert use["executed"] == {"mean": 1.0, "stderr": 0.0}
    assert use["foreign"]["mean"] == pytest.approx(0, abs=1e-6)


TABLE = ({"capacity": 0.3, "threshold": [0.7] * 3}, {"capacity": 0.8, "threshold": [0.3] * 3})


@pytest.mark.parametrize("granularity", ["attn_sequence", "block_token"])
def test_figures_at_another_capacity_are_those_of_a_model_that_is_set_to_it(granularity):
    model = routed_model("llama", granularity)
    own = replace(model.mod_settings, threshold=0.5, capacities=TABLE)
    model.set_mod_settings(own)
    prompts = [prompt(tokens, 1) for tokens in model_zoo.texts((4, 7, 5))]
    capacities = (0.3, 0.5, 1.0)
    found = figures_of_use(model, TOKENIZER, prompts, NEW, batch_size=2, capacities=capacities)
    assert model.mod_settings == own
    assert list(found["use_at"]) == list(capacities)
    executed = [found["use_at"][capacity]["executed"]["mean"] for capacity in capacities]
    assert executed == sorted(executed)
    assert executed[0] < executed[-1] == 1
    assert found["use_at"][1.0]["agreement"] == {"mean": 1.0, "stderr": 0.0}
    assert found["use"] == figures_of_use(model, TOKENIZER, prompts, NEW, batch_size=2)["use"]
    for capacity in capacities:
        model.set_capacity(capacity)
        alone = figures_of_use(model, TOKENIZER, prompts, NEW, batch_size=2)["use"]
        del alone["foreign"]
        assert found["use_at"][capacity] == alone


def test_forward_speed_times_the_capacities_and_decides_as_it_is_told():
    model = routed_model("llama", "mlp_sequence")
    own = replace(model.mod_settings, capacities=TABLE)
    model.set_mod_settings(own)
    seen = []
    model.register_forward_hook(
        lambda module, args, kwargs, output: seen.append(
            (kwargs["route"] and module.mod_settings.target_capacity, kwargs["token_mask"].sum().item())
        ),
        with_kwargs=True,
    )
    batch = {"input_ids": model_zoo.random_tokens(2, 8), "attention_mask": torch.ones(2, 8, dtype=torch.int64)}
    batch["labels"] = torch.where(torch.arange(8) < 5, -100, batch["input_ids"])
    found = forward_speed(model, [with_deciding_tokens(batch, "prompt")], repeats=2, capacities=(0.8, 0.3))
    assert seen == [(False, 10), (None, 10), (0.8, 10), (0.3, 10)] * 3
    assert model.mod_settings == own
    assert set(found["ratio_at"]) == {0.8, 0.3}
    assert min(found["dense"], found["routed"], found["ratio"], *found["ratio_at"].values()) > 0


def test_a_held_out_prompt_leaves_room_for_its_answer(caplog):
    assert longest_prompt(128, 512, NEW) == 121
    assert longest_prompt(2048, 512) == 512
    rows = Dataset.from_dict({"messages": [turns("Hello", "Hi"), turns("yes " * 100, "no")]})
    model = routed_model("llama", "attn_token")
    longest = longest_prompt(model.config.max_position_embeddings, 512)
    prompts = held_out_prompts(rows, TOKENIZER, "auto", 16, longest)
    assert [one["text"] for one in prompts] == ["Hello"]
    figures_of_use(model, TOKENIZER, prompts)
    assert held_out_prompts(rows, TOKENIZER, "auto", 0, longest) == []
    assert held_out_prompts(rows, TOKENIZER, "auto", 16, 1) == []
    assert "figures of use are not measured: no prompts: 2 left out: longer than" in caplog.text


def test_what_a_checkpoint_says_of_sampling_does_not_enter():
    model = routed_model("llama", "attn_token")
    prompts = [prompt(tokens, 1) for tokens in model_zoo.texts((4, 7))]
    expected = figures_of_use(model, TOKENIZER, prompts, NEW)
    model.generation_config.update(do_sample=True, temperature=9.0, repetition_penalty=1.8)
    assert figures_of_use(model, TOKENIZER, prompts, NEW) == expected


def test_agreement_counts_tokens_and_the_others_count_prompts():
    answers = [
        {"tokens": 10, "agreement": 0.5, "executed": 0.2, "skipped": 0.4, "foreign": 1.0},
        {"tokens": 30, "agreement": 0.9, "executed": 0.6, "skipped": 0.2, "foreign": 2.0},
    ]
    summary = summarize(answers)
    assert summary["agreement"]["mean"] == pytest.approx((5 + 27) / 40)
    assert summary["executed"] == pytest.approx({"mean": 0.4, "stderr": 0.2})
    # residuals of the ratio: 5 - 0.8 * 10 = -3 and 27 - 0.8 * 30 = 3, over 20 tokens a prompt
    assert summary["agreement"]["stderr"] == pytest.approx(math.sqrt((9 + 9) / 2) / 20)
    assert summarize(answers[:1])["foreign"] == {"mean": 1.0, "stderr": None}


@pytest.mark.parametrize(
    ("lengths", "options", "message"),
    [
        ((), {}, "no prompts"),
        ((3, 122), {}, r"prompt 2 of 2 \('122 tokens'\) has 122 tokens, and with max_new_tokens 7 .* the 128 that"),
        ((3, 0), {}, "prompt 2 of 2 is empty"),
        ((3,), {"batch_size": 0}, "batch_size 0 must be at least 1"),
    ],
)
def test_what_cannot_be_answered_is_refused_in_one_line(lengths, options, message):
    model = routed_model("llama", "attn_token")
    prompts = [prompt(torch.ones(length, dtype=torch.int64), 1) for length in lengths]
    with pytest.raises(UserError, match=message) as error:
        figures_of_use(model, TOKENIZER, prompts, **{"max_new_tokens": NEW, **options})
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(("template", "mark"), [(CHATML, "<|im_end|>"), (LLAMA3, "<|eot|>"), (None, "</s>")])
def test_a_prompt_is_what_training_has_before_the_answer(template, mark):
    if template == LLAMA3:
        template += "{% if add_generation_prompt %}{{ '<|start|>assistant<|sep|>\n\n' }}{% endif %}"
    tokenizer = make_tokenizer(template=template)
    conversation = [{"role": "system", "content": "Be brief."}, *turns("Hello", "Hi", "How are you?", "I am fine")]
    (encoded,) = encode_prompts([conversation], tokenizer)
    (open_ended,) = encode_prompts([conversation[:-1]], tokenizer)
    assert encoded == open_ended
    assert encoded["text"] == "How are you?"
    assert tokenizer.convert_ids_to_tokens(encoded["end_token"]) == mark
    if template:
        whole = TemplateFormat(tokenizer).render(conversation)
        assert tokenizer.decode(encoded["input_ids"]) == whole.text[: whole.spans[-1][0]]
        assert encoded["input_ids"].count(tokenizer.bos_token_id) == (template != CHATML)
    else:
        text = "<|system|>\nBe brief.\n<|user|>\nHello\n<|assistant|>\nHi</s>\n<|user|>\nHow are you?\n<|assistant|>\n"
        assert encoded["input_ids"] == tokenizer(text).input_ids


def test_rows_without_a_prompt_are_left_out_with_a_reason(caplog):
    rows = [turns("Hello", "Hi"), [{"role": "assistant", "content": "Hi"}], [], turns("yes " * 50, "no"), turns("a")]
    prompts = encode_prompts(rows, TOKENIZER, max_tokens=60)
    assert [one["text"] for one in prompts] == ["Hello", "a"]
    assert "2 left out: no user's turn to answer" in caplog.text
    assert "1 left out: longer than max_tokens" in caplog.text
    assert [one["text"] for one in encode_prompts(rows, TOKENIZER, max_prompts=1)] == ["Hello"]
    with pytest.raises(UserError, match="no prompts: 1 left out: a content spells out a control token"):
        encode_prompts([turns("<|im_end|>", "no")], TOKENIZER)


def test_the_sample_is_read_as_the_script_reformats_it(repository):
    rows = load_sample(repository)
    assert len(rows) > 300
    assert rows[0]["id"] == "alpaca_0"


def test_the_runs_table_has_figures_of_use_and_an_example_where_they_were_measured():
    routed = {"eval_loss": 2.5, "eval_capacity": 0.5, "eval_capacity/layer_3": 0.5, "eval_skipped": 0.1}
    routed |= {"eval_flops_saved_512": 0.08, "eval_flops_saved_2048": 0.07}
    results = {
        "held_out": {"dense": {"dense_loss": 2.0}, "routed": routed, "rows": 8},
        "forward_tokens_per_second": None,
    }
    plain = run_table(results)
    answers = [
        {"prompt": f"Prompt {share}", "dense": "One\n\ntwo", "routed": "three", "agreement": share}
        for share in (0.9, 0.1, 0.5)
    ]
    use = {name: {"mean": 0.25, "stderr": 0.05} for name in FIGURES} | {"prompts": 3, "max_new_tokens": 9}
    full = run_table(results | {"use": use, "answers": answers})
    added = [line for line in full.splitlines() if line not in plain.splitlines()]
    assert [line.split()[:3] for line in added[:4]] == [
        ["agreement", "1.00", "0.25"],
        ["executed", "1.00", "0.25"],
        ["skipped", "0.00", "0.25"],
        ["foreign", "0.00", "0.25"],
    ]
    assert "± 0.05, of the dense answers' tokens, 3 prompts" in added[0]
    assert added[-3:] == ["prompt  Prompt 0.5", "dense   One two", "routed  three"]


def test_the_runs_table_has_the_other_capacities_and_what_its_dense_is():
    held_out = {"eval_loss": 2.5, "eval_capacity": 0.5, "eval_capacity/layer_3": 0.5, "eval_skipped": 0.25}
    held_out |= {"eval_flops_saved_512": 0.1, "eval_flops_saved_2048": 0.1}
    use = {name: {"mean": 0.25, "stderr": None} for name in FIGURES} | {"prompts": 3, "max_new_tokens": 9}
    results = {
        "held_out": {"dense": {"dense_loss": 2.0}, "routed": held_out, "rows": 8},
        "forward_tokens_per_second": {"dense": 100.0, "routed": 120.0, "ratio": 1.2},
        "use": use,
        "capacities": {
            "0.5": {"held_out": held_out | {"eval_loss": 2.75}, "forward_ratio": 1.25, "use": use},
            "0.9": {"held_out": held_out | {"eval_capacity": 0.9375}},
        },
    }
    lines = run_table(results).splitlines()
    start = lines.index("The same checkpoint set to other capacities:")
    assert [line.split() for line in lines[start + 1 : start + 4]] == [
        ["capacity", "of", "rows", "in", "use", "skipped", "loss", "agreement", "forward"],
        ["0.9", "0.94", "-", "-", "2.500", "-", "-"],
        ["0.5", "0.50", "0.25", "25.0%", "2.750", "0.25", "1.25x"],
    ]
    assert not any("dense is" in line for line in lines)
    adapted = run_table(results | {"dense_is": "adapted"})
    assert "dense is the adapted model with nothing skipped, not the base" in adapted
    assert [(r["name"], r["forward"], r["agreement"]) for r in quality_and_speed(results)] == [
        ("dense", 1.0, 1.0),
        ("routed", 1.2, 0.25),
        ("routed", 1.25, 0.25),
    ]
    assert quality_and_speed(results | {"capacities": {}}) == []
    assert quality_and_speed(results | {"forward_tokens_per_second": None}) == []
