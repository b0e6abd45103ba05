import lightning as L
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader

from vision_lowrank.adapters import CyclicalStrength, LoRA, inject
from vision_lowrank.data.augmentation import mixup, random_symmetries
from vision_lowrank.errors import TrainingError
from vision_lowrank.tasks.scene_classification import SceneClassification


class Pooled(nn.Module):
    """Logits of the mean spectrum: no symmetry of the patch changes them."""

    def __init__(self):
        super().__init__()
        self.norm = nn.BatchNorm2d(4)
        self.body = nn.Linear(4, 5)
        self.head = nn.Linear(5, 3)

    def forward(self, x):
        return self.head(self.body(self.norm(x).mean((2, 3))).relu())


def make(model, **options):
    settings = {
        "class_counts": [40, 10, 0],
        "learning_rate": 0.05,
        "weight_decay": 0.0,
        "warmup": 0.1,
        "label_smoothing": 0.2,
        "balance": 0.5,
        "mixup": 0.0,
    }
    return SceneClassification(model, **(settings | options))


@pytest.mark.parametrize("balance", [0.0, 0.5, 1.0])
def test_loss_is_smoothed_cross_entropy_with_weights_by_class_size(balance):
    torch.manual_seed(0)
    task = make(Pooled().eval(), balance=balance)
    task.log = lambda *args, **kwargs: None
    image, label = torch.randn(6, 4, 3, 3), torch.tensor([0, 0, 1, 0, 1, 0])
    found = task.training_step({"image": image, "label": label}, 0)
    logs = F.log_softmax(task.model(image), dim=1)
    raw = np.array([40.0, 10.0, 1.0]) ** -balance
    # the mean weight over the training pixels is 1
    weights = torch.tensor(raw * 50 / (raw[:2] * [40, 10]).sum(), dtype=torch.float32)
    share = torch.full((6, 3), 0.2 / 3)
    share[range(6), label] += 0.8
    expected = -(share * weights * logs).sum() / weights[label].sum()
    torch.testing.assert_close(found, expected)
    assert ((weights[:2] * torch.tensor([40.0, 10])).sum() / 50).item() == pytest.approx(1)


def test_loss_of_mixed_patches_is_the_mixture_of_the_losses():
    task = make(Pooled().eval(), mixup=0.4)
    task.log = lambda *args, **kwargs: None
    image, label = torch.randn(8, 4, 3, 3), torch.tensor([0, 1, 0, 1, 0, 0, 1, 0])
    torch.manual_seed(5)
    found = task.training_step({"image": image, "label": label}, 0)
    torch.manual_seed(5)
    mixed, partner, share = mixup(random_symmetries(image), 0.4)
    logits = task.model(mixed)
    losses = [F.cross_entropy(logits, y, task.class_weights, label_smoothing=0.2) for y in (label, label[partner])]
    torch.testing.assert_close(found, share * losses[0] + (1 - share) * losses[1])


def loader(size=64):
    generator = torch.Generator().manual_seed(0)
    label = torch.randint(2, (size,), generator=generator)
    image = torch.randn(size, 4, 3, 3, generator=generator) + 2 * label.view(-1, 1, 1, 1)
    samples = [{"image": x, "label": y} for x, y in zip(image, label, strict=True)]
    return DataLoader(samples, 16)


def fit(task, epochs, callbacks=(), **options):
    trainer = L.Trainer(
        accelerator="cpu", max_epochs=epochs, logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, num_sanity_val_steps=0, callbacks=list(callbacks),
        **options,
    )  # fmt: skip
    trainer.fit(task, loader(), loader())
    return trainer


class Watch(L.Callback):
    """Notes strength and rate at every step and at validation."""

    def __init__(self):
        self.strengths, self.rates, self.validation = [], [], []

    def on_before_optimizer_step(self, trainer, task, optimizer):
        self.strengths.append(task.model.body.adapters["default"].strength.item())
        self.rates.append(optimizer.param_groups[0]["lr"])

    def on_validation_batch_start(self, trainer, task, batch, index, loader=0):
        self.validation.append(task.model.body.adapters["default"].strength.item())


@pytest.mark.parametrize("accumulated", [1, 2])
def test_strength_and_rate_cycle_while_training_and_strength_is_one_at_validation(accumulated):
    torch.manual_seed(0)
    model = Pooled()
    inject(model, "body", LoRA(2, 2), train="head")
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    watch = Watch()
    task = make(model, cycles={"first_cycle": 1, "growth": 2, "minimum": 0.25})
    fit(task, 7, [watch], accumulate_grad_batches=accumulated)
    steps = 28 // accumulated
    strength = CyclicalStrength(steps, steps // 7, 2, 0.25)
    rate = CyclicalStrength(steps, steps // 7, 2, 0.25, warmup=round(0.1 * steps), rising=False)
    assert watch.strengths == pytest.approx([strength(step) for step in range(steps)])
    assert watch.rates == pytest.approx([0.05 * rate(step) for step in range(steps)])
    assert watch.strengths[-1] == 1.0
    assert set(watch.validation) == {1.0}
    frozen = [name for name in before if name.startswith(("norm", "body.base"))]
    assert len(frozen) == 7
    for name in frozen:
        assert torch.equal(model.state_dict()[name], before[name]), name
    assert not torch.equal(model.head.weight, before["head.weight"])


def test_history_has_a_line_an_epoch_with_the_scores_of_the_final_weights():
    torch.manual_seed(0)
    task = make(Pooled())
    fit(task, 5)
    assert [row["epoch"] for row in task.history] == [1, 2, 3, 4, 5]
    task.eval()
    batches = list(loader())
    logits = torch.cat([task(batch) for batch in batches])
    label = torch.cat([batch["label"] for batch in batches])
    last = task.history[-1]
    assert last["val/OA"] == pytest.approx((logits.argmax(1) == label).float().mean().item())
    assert last["val/loss"] == pytest.approx(F.cross_entropy(logits, label).item(), rel=1e-5)
    assert last["val/OA"] > 0.9
    assert last["train/loss"] < task.history[0]["train/loss"]
    assert "strength" not in last


def test_a_loss_that_is_no_number_ends_the_training():
    torch.manual_seed(0)
    model = Pooled()
    model.head.weight.register_hook(lambda gradient: gradient * float("nan"))
    with pytest.raises(TrainingError, match=r"epoch 1: the training loss is nan; lower"):
        fit(make(model), 5)


@pytest.mark.parametrize(
    ("accuracies", "kept"),
    [
        # of 64 pixels: one standard error at 1.0 is 0.015, one pixel 0.016; at 0.9 it is 0.038
        ([0.5, 1.0, 63 / 64, 0.9], 2),
        ([0.5, 1.0, 0.985, 0.9], 3),
        ([0.5, 0.90, 0.87, 0.85], 3),
        ([0.9, 0.9, 0.9, 0.9], 4),
        ([0.9, 0.2, 0.3, 0.4], 1),
    ],
)
def test_the_latest_epoch_within_a_standard_error_of_the_best_is_kept(accuracies, kept):
    task = make(Pooled())
    task.trainer = L.Trainer(logger=False, barebones=True)
    logged = {}
    task.log = lambda name, value, **kwargs: logged.__setitem__(name, value)
    task.log_dict = lambda *args, **kwargs: None
    choices = []
    for epoch, accuracy in enumerate(accuracies):
        task.validation_pixels = 64
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(type(task.validation_scores), "compute", lambda self, a=accuracy: {"val/OA": a})
            patch.setattr(SceneClassification, "current_epoch", epoch)
            task.on_validation_epoch_end()
        task.history.append({"val/OA": accuracy})
        choices.append(logged["val/choice"])
    assert choices.index(max(choices)) + 1 == kept


class PooledMaps(Pooled):
    """Logits of every pixel from its own spectrum and its channels' wavelengths."""

    def forward(self, x, wavelengths):
        weighted = (self.norm(x) * (wavelengths / 500)[:, :, None, None]).movedim(1, -1)
        return self.head(self.body(weighted).relu()).movedim(-1, 1)


def test_loss_and_scores_of_maps_are_those_of_their_labelled_pixels():
    torch.manual_seed(0)
    task = make(PooledMaps().eval(), inputs=("image", "wavelengths"), balance=0.0)
    task.log = lambda *args, **kwargs: None
    batch = {
        "image": torch.randn(6, 4, 5, 5),
        "wavelengths": torch.tensor([400.0, 500, 700, 900]).expand(6, -1),
        "label": torch.randint(3, (6, 5, 5)),
    }
    batch["label"][torch.rand(6, 5, 5) < 0.4] = 255
    known = batch["label"] != 255
    logits = task(batch).movedim(1, -1)[known]
    expected = F.cross_entropy(logits, batch["label"][known], label_smoothing=0.2)
    # pixels alone: symmetries move images and labels together, so that the loss stays
    for seed in range(4):
        torch.manual_seed(seed)
        torch.testing.assert_close(task.training_step(batch, 0), expected)
    task.on_validation_epoch_start()
    task.validation_step(batch, 0)
    assert task.validation_pixels == known.sum()
    accuracy = (logits.argmax(1) == batch["label"][known]).float().mean()
    torch.testing.assert_close(task.validation_scores.compute()["val/OA"], accuracy)
