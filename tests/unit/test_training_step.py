"""What a training step computes, keeps and waits for: no more than router-tuning needs."""

import pytest
import torch
from model_zoo import ARCHITECTURES, LAYERS, NUM_LAYERS, VOCAB_SIZE, make_pair, pad, randomize_routers, texts
from rounding import rounding
from torch.nn import functional as F
from torch.profiler import ProfilerActivity, profile

from utils.model.checkpoint import router_name
from utils.model.configuration_mod import GRANULARITIES
from utils.pipeline import losses
from utils.pipeline.arguments import RouterTrainingArguments
from utils.pipeline.batches import SupervisedBatches
from utils.pipeline.customized_trainer import RouterTrainer, freeze_backbone
from utils.pipeline.losses import next_token_nll

every_architecture = pytest.mark.parametrize("arch", list(ARCHITECTURES))
every_granularity = pytest.mark.parametrize("granularity", GRANULARITIES)


def collate(rows):
    input_ids, mask = pad([row["input_ids"] for row in rows], "right")
    labels = torch.full_like(input_ids, -100)
    for index, row in enumerate(rows):
        length = len(row["input_ids"])
        labels[index, row["prompt"] : length] = row["input_ids"][row["prompt"] :]
    return {"input_ids": input_ids, "attention_mask": mask, "labels": labels}


ROWS = [{"input_ids": text, "prompt": prompt} for text, prompt in zip(texts((9, 4, 12, 7)), (5, 1, 10, 3), strict=True)]


def make_trainer(tmp_path, arch="llama", granularity="attn_sequence", **arguments):
    _, model = make_pair(arch, granularity)
    randomize_routers(model, scale=0.7)
    # as the model decides by itself
    arguments = {"capacity_control": "hinge", "distillation_weight": 0.0, "sequence_pooling": "all"} | arguments
    args = RouterTrainingArguments(
        output_dir=str(tmp_path), use_cpu=True, report_to="none", global_batch_size=4, disable_tqdm=True, **arguments
    )
    if args.router_only:
        freeze_backbone(model)
    return RouterTrainer(model=model, args=args, train_dataset=ROWS, data_collator=collate)


def step(trainer) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Return the loss of one step on all rows, and the gradients."""
    model = trainer.model
    model.zero_grad()
    (batch,), tokens = trainer.get_batch_samples(iter([trainer.data_collator(ROWS)]), 1, torch.device("cpu"))
    loss = trainer.training_step(model, batch, tokens)
    return loss, {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


class TestTheLoss:
    @pytest.mark.parametrize("frozen", [True, False])
    @pytest.mark.parametrize("rows", [0, 1, 300])
    def test_loss_and_gradients_are_those_of_plain_cross_entropy(self, frozen, rows, monkeypatch):
        monkeypatch.setattr(losses, "ROWS_OF_LOGITS", 128)
        head = torch.nn.Linear(24, 500, bias=False).requires_grad_(not frozen)
        states, targets = torch.randn(rows, 24, requires_grad=True), torch.randint(0, 500, (rows,))
        targets[rows // 2 :: 7] = -100
        expected = F.cross_entropy(head(states), targets, reduction="sum")
        loss = next_token_nll(states, head, targets)
        torch.testing.assert_close(loss, expected, rtol=0, atol=rounding(expected, terms=rows + 500))
        wanted = [states] if frozen else [states, head.weight]
        gradients = torch.autograd.grad(3 * loss, wanted)
        for gradient, other in zip(gradients, torch.autograd.grad(3 * expected, wanted), strict=True):
            torch.testing.assert_close(gradient, other, rtol=0, atol=rounding(other, terms=max(rows, 500)))

    def test_a_low_precision_model_has_its_loss_in_float32(self):
        head = torch.nn.Linear(64, 800, bias=False, dtype=torch.bfloat16).requires_grad_(False)
        states = torch.randn(300, 64, dtype=torch.bfloat16, requires_grad=True)
        targets = torch.randint(0, 800, (300,))
        expected = F.cross_entropy(F.linear(states.float(), head.weight.float()), targets, reduction="sum")
        loss = next_token_nll(states, head, targets)
        assert loss.dtype == torch.float32
        torch.testing.assert_close(loss, expected, rtol=1e-4, atol=0)
        (gradient,), (other,) = torch.autograd.grad(loss, states), torch.autograd.grad(expected, states)
        torch.testing.assert_close(gradient, other, rtol=0.02, atol=2e-3)

    def test_autocast_reaches_into_it(self):
        head, states = torch.nn.Linear(16, 50, bias=False), torch.randn(8, 16, requires_grad=True)
        targets = torch.randint(0, 50, (8,))
        with torch.autocast("cpu", torch.bfloat16):
            loss = next_token_nll(states, head, targets)
        rounded = F.linear(states.bfloat16().float(), head.weight.bfloat16().float())
        torch.testing.assert_close(loss, F.cross_entropy(rounded, targets, reduction="sum"), rtol=1e-4, atol=0)
        loss.backward()
        assert states.grad.dtype == head.weight.grad.dtype == torch.float32

    @every_architecture
    @every_granularity
    def test_a_step_is_that_of_the_models_own_loss(self, tmp_path, arch, granularity):
        """Which has the padding in its attention mask, and logits for every token."""
        trainer = make_trainer(tmp_path, arch, granularity, gradient_scale=0.0)
        loss, gradients = step(trainer)
        trainer.model.zero_grad()
        expected = trainer.model(**collate(ROWS)).loss
        expected.backward()
        torch.testing.assert_close(loss, expected.detach(), rtol=1e-5, atol=0)
        assert set(gradients) == set(map(router_name, trainer.model.router_modules()))
        for name, gradient in gradients.items():
            other = trainer.model.get_parameter(name).grad
            torch.testing.assert_close(gradient, other, rtol=1e-4, atol=1e-4 * other.abs().max().item())

    def test_padding_on_the_left_is_refused(self):
        input_ids, mask = pad(texts((3, 5)), "left")
        batches = SupervisedBatches(lambda _: {"input_ids": input_ids, "attention_mask": mask, "labels": input_ids})
        with pytest.raises(ValueError, match="pads on the left"):
            batches([])

    def test_labels_and_states_exclude_each_other(self):
        _, model = make_pair("llama", "attn_sequence")
        ids = torch.tensor([[1, 2, 3]])
        with pytest.raises(ValueError, match="give one of the two"):
            model(ids, labels=ids, states_at=torch.tensor([0]))


class TestWhatAStepCosts:
    def test_nothing_is_kept_for_a_backward_below_the_first_routed_layer(self, tmp_path):
        trainer = make_trainer(tmp_path)
        kept = [0] * NUM_LAYERS
        running = []

        def pack(tensor):
            if running:
                kept[running[-1]] += tensor.numel()
            return tensor

        for index, layer in enumerate(trainer.model.model.layers):
            layer.register_forward_pre_hook(lambda *_, index=index: running.append(index))
            layer.register_forward_hook(lambda *_: running.clear())
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            step(trainer)
        assert kept[: LAYERS[0]] == [0] * LAYERS[0]
        assert all(kept[LAYERS[0] :])

    def test_logits_are_computed_for_supervised_positions_only(self, tmp_path, monkeypatch):
        monkeypatch.setattr(losses, "ROWS_OF_LOGITS", 4)
        trainer = make_trainer(tmp_path)
        with profile(activities=[ProfilerActivity.CPU], record_shapes=True) as profiler:
            step(trainer)
        widths = {
            event.name: [shape for shape in event.input_shapes if VOCAB_SIZE in shape]
            for event in profiler.events()
            if any(VOCAB_SIZE in shape for shape in event.input_shapes)
        }
        assert widths
        supervised = sum(len(row["input_ids"]) - row["prompt"] for row in ROWS)
        assert supervised > 4
        for shapes in widths.values():
            for shape in shapes:
                rows = torch.Size(shape).numel() // VOCAB_SIZE
                assert rows in (trainer.model.config.hidden_size, *range(5)), (
                    shape,
                    widths,
                )  # the head's, or a chunk's

    @every_granularity
    @pytest.mark.parametrize("arch", ["llama", "qwen3"])
    def test_a_step_never_waits_for_the_device(self, tmp_path, arch, granularity):
        trainer = make_trainer(tmp_path, arch, granularity)
        with profile(activities=[ProfilerActivity.CPU]) as profiler:
            (batch,), tokens = trainer.get_batch_samples(iter([trainer.data_collator(ROWS)]), 1, torch.device("cpu"))
        assert "aten::nonzero" in {event.name for event in profiler.events()}  # on the host, as the batch is made
        with profile(activities=[ProfilerActivity.CPU]) as profiler:
            trainer.training_step(trainer.model, batch, tokens)
        waits = {"aten::item", "aten::_local_scalar_dense", "aten::is_nonzero", "aten::nonzero", "aten::masked_select"}
        assert not waits & {event.name for event in profiler.events()}

    @every_granularity
    def test_gradient_checkpointing_is_exact_and_leaves_the_frozen_layers_alone(self, tmp_path, granularity):
        loss, expected = step(make_trainer(tmp_path, granularity=granularity))
        trainer = make_trainer(tmp_path, granularity=granularity, activation_checkpointing=True, max_steps=1)
        trainer.model.activation_checkpointing_enable()
        again, gradients = step(trainer)
        checkpointed = [layer.gradient_checkpointing for layer in trainer.model.model.layers]
        assert checkpointed == [index >= LAYERS[0] for index in range(NUM_LAYERS)]
        assert not trainer.model.get_input_embeddings()._forward_hooks
        torch.testing.assert_close(again, loss, rtol=1e-5, atol=0)  # recomputed with gradients, by another kernel
        for name, gradient in gradients.items():
            torch.testing.assert_close(gradient, expected[name], rtol=0, atol=rounding(expected[name], terms=2000))
