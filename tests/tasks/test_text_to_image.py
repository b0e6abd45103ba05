"""Losses, averages and rates against diffusers' own schedule and formulas written out."""

import copy

import lightning as L
import numpy as np
import pytest
import torch
from torch.nn.functional import mse_loss, scaled_dot_product_attention
from torch.overrides import TorchFunctionMode
from torch.utils.data import DataLoader

from vision_lowrank.errors import ConfigError
from vision_lowrank.processes import SEEDS_APART
from vision_lowrank.tasks.text_to_image import TextToImage, rise_hold_fall

diffusers = pytest.importorskip("diffusers")

WORDS = ["a", "dog", "owl", "on", "grass"]
OPTIONS = {"learning_rate": 1e-3, "weight_decay": 0.0, "warmup": 0.1, "cooldown": 0.2}
CAPTIONS = ["a dog on grass", "", "an owl"]


@pytest.fixture
def pipeline():
    from vision_lowrank.composer.pipeline import build_pipeline

    torch.manual_seed(0)
    return build_pipeline(
        WORDS, length=10, side=16, channels=(8, 16), heads=2, groups=4, text_width=16, text_layers=1, text_heads=2
    )


@pytest.fixture
def image():
    return torch.rand(3, 3, 16, 16, generator=torch.Generator().manual_seed(1)) * 2 - 1


def test_loss_is_that_of_the_velocity_under_limited_weights(pipeline, image):
    task = TextToImage(pipeline, **OPTIONS, min_snr=4.0)
    times, noise = torch.tensor([3, 300, 950]), torch.randn(3, 12, 8, 8)
    scheduler = diffusers.DDPMScheduler(beta_schedule="squaredcos_cap_v2", prediction_type="v_prediction")
    latents = torch.stack([image[:, c, i::2, j::2] for c in range(3) for i in range(2) for j in range(2)], 1)
    with torch.no_grad():
        text = torch.cat([pipeline.encode_prompt(c, "cpu", 1, False)[0] for c in CAPTIONS])
        found = pipeline.unet(scheduler.add_noise(latents, noise, times), times, text).sample
        errors = mse_loss(found, scheduler.get_velocity(latents, noise, times), reduction="none").mean((1, 2, 3))
        loss = task.loss(image, CAPTIONS, times, noise)
    cumulative = scheduler.alphas_cumprod[times]
    snr = cumulative / (1 - cumulative)
    weights = torch.minimum(snr + 1, torch.tensor(4.0)) / (snr + 1)
    assert weights[0] < 0.01
    assert weights[1] > 0.5
    assert weights[2] == 1
    assert float(loss) == pytest.approx(float((weights * errors).mean()), rel=1e-5)


def test_accumulated_batches_draw_each_its_own(pipeline):
    torch.manual_seed(11)
    task = TextToImage(pipeline, **OPTIONS)
    task.trainer = L.Trainer(accelerator="cpu", accumulate_grad_batches=2, logger=False, enable_checkpointing=False)
    seeds = []
    for index in range(4):
        task.on_train_batch_start(None, index)
        seeds.append(torch.initial_seed())
    assert seeds[0] == 11 + SEEDS_APART
    assert seeds[1] != seeds[0]
    # no step of the optimiser was made
    assert seeds[2:] == seeds[:2]


def test_average_forgets_sooner_at_first(pipeline, monkeypatch):
    task = TextToImage(pipeline, **OPTIONS, average=0.3)
    weight = pipeline.unet.conv_in.bias.detach()
    values = [float(weight[0])]
    expected = values[0]
    for step in range(4):
        # of two batches that are accumulated to a step the second one makes it
        monkeypatch.setattr(TextToImage, "global_step", step)
        task.on_train_batch_end(None, None, 2 * step)
        weight[0] += 1.0 + step
        monkeypatch.setattr(TextToImage, "global_step", step + 1)
        task.on_train_batch_end(None, None, 2 * step + 1)
        values.append(float(weight[0]))
        # the first call copies
        decay = 0.0 if step == 0 else min(0.3, (1 + step) / (10 + step))
        expected = decay * expected + (1 - decay) * values[-1]
    averaged = task.averaged_pipeline().unet.conv_in.bias
    assert float(averaged[0]) == pytest.approx(expected, rel=1e-6)
    assert float(weight[0]) == values[-1] != pytest.approx(expected, rel=1e-3)
    assert not any(parameter.requires_grad for parameter in task.averaged.parameters())


def test_without_average_the_trained_networks_are_used(pipeline):
    task = TextToImage(pipeline, **OPTIONS, average=None)
    task.on_train_batch_end(None, None, 0)
    assert task.averaged_pipeline().unet is pipeline.unet


def test_steps_draw_times_from_all_parts_of_the_schedule_and_leave_captions_out(pipeline, image, monkeypatch):
    task = TextToImage(pipeline, **OPTIONS, dropout=0.5)
    seen = []
    monkeypatch.setattr(task, "log", lambda *_, **__: None)
    monkeypatch.setattr(task, "loss", lambda _, captions, times, noise: seen.append((captions, times, noise)))
    batch = {"image": image[:1].repeat(25, 1, 1, 1), "caption": ["a dog"] * 25}
    torch.manual_seed(4)
    for index in range(10):
        task.training_step(batch, index)
    for _, times, noise in seen:
        assert torch.equal(times // 40, torch.arange(25))
        assert noise.shape == (25, 12, 8, 8)
    left_out = np.mean([caption == "" for captions, _, _ in seen for caption in captions])
    assert left_out == pytest.approx(0.5, abs=0.1)
    assert {caption for captions, _, _ in seen for caption in captions} == {"", "a dog"}


def test_gradients_reach_both_networks_and_frozen_ones_take_no_part(pipeline, image):
    pipeline.text_encoder.requires_grad_(False)
    task = TextToImage(pipeline, **OPTIONS)
    task.loss(image, CAPTIONS, torch.tensor([5, 500, 900]), torch.randn(3, 12, 8, 8)).backward()
    assert all(parameter.grad is not None for parameter in pipeline.unet.parameters())
    assert all(parameter.grad is None for parameter in pipeline.text_encoder.parameters())
    pipeline.text_encoder.requires_grad_(True)
    task.loss(image, CAPTIONS, torch.tensor([5, 500, 900]), torch.randn(3, 12, 8, 8)).backward()
    assert pipeline.text_encoder.get_input_embeddings().weight.grad.abs().sum() > 0


def test_all_attention_in_training_is_in_float32(pipeline, image):
    class Formats(TorchFunctionMode):
        def __torch_function__(self, func, types, args=(), kwargs=None):
            if func is scaled_dot_product_attention:
                found.append((torch.is_autocast_enabled("cpu"), args[0].dtype))
            return func(*args, **(kwargs or {}))

    found = []
    task = TextToImage(pipeline, **OPTIONS)
    with torch.autocast("cpu", torch.bfloat16), Formats():
        task.loss(image, CAPTIONS, torch.tensor([5, 500, 900]), torch.randn(3, 12, 8, 8)).backward()
    assert len(found) == len(pipeline.unet.attn_processors) + 1
    assert set(found) == {(False, torch.float32)}


def train_one_step(pipeline, image, clip):
    """Norm of the gradients that a step of mixed precision left, after clipping, and the task."""
    task = TextToImage(pipeline, **OPTIONS)
    trainer = L.Trainer(
        accelerator="cpu", precision="bf16-mixed", max_steps=1, gradient_clip_val=clip, logger=False,
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    trainer.fit(task, DataLoader([{"image": image, "caption": CAPTIONS}], batch_size=None))
    gradients = [weight.grad for weight in task.networks.parameters() if weight.grad is not None]
    return float(torch.stack([gradient.square().sum() for gradient in gradients]).sum().sqrt()), task


def test_gradients_are_clipped_before_a_fused_step_and_adamw_takes_it(pipeline, image):
    whole, _ = train_one_step(copy.deepcopy(pipeline), image, None)
    before = pipeline.unet.conv_in.weight.detach().clone()
    clipped, task = train_one_step(pipeline, image, 0.01)
    assert whole > 0.02
    assert clipped == pytest.approx(0.01, rel=1e-3)
    assert task.optimizers().param_groups[0]["fused"]
    weight = pipeline.unet.conv_in.weight
    # of the first step of Adam
    expected = before - task.learning_rate * weight.grad / (weight.grad.abs() + 1e-8)
    torch.testing.assert_close(weight.detach(), expected, atol=1e-7, rtol=0)


def test_rate_rises_stays_and_falls():
    factor = rise_hold_fall(100, warmup=0.1, cooldown=0.25)
    assert [factor(step) for step in (0, 4, 9, 10, 74, 75)] == pytest.approx([0.1, 0.5, 1, 1, 1, 1])
    assert [factor(step) for step in (80, 90, 99, 100)] == pytest.approx([0.8, 0.4, 0.04, 0])
    assert rise_hold_fall(7, 0, 0)(6) == 1
    with pytest.raises(ConfigError, match=r"warmup=0.6 and task.cooldown=0.5"):
        rise_hold_fall(10, 0.6, 0.5)


def test_wrong_options_are_refused(pipeline):
    for option in ({"dropout": 1.0}, {"min_snr": 0}, {"average": 1.5}):
        with pytest.raises(ConfigError, match="shares are from 0"):
            TextToImage(pipeline, **OPTIONS | option)
    pipeline.scheduler = diffusers.DDPMScheduler()
    with pytest.raises(ConfigError, match="predicts epsilon; this task trains v_prediction"):
        TextToImage(pipeline, **OPTIONS)
