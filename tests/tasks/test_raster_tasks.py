"""Fine-tuning on small tasks whose outcome is known; losses and metrics against formulas written out."""

import json
from dataclasses import replace

import lightning as L
import numpy as np
import pytest
import torch
from torch import nn

from vision_lowrank.data.image_tasks import TaskData
from vision_lowrank.errors import ConfigError, DataError, TrainingError
from vision_lowrank.evaluation.task_metrics import score_task
from vision_lowrank.fitting import read_checkpoint
from vision_lowrank.models.heads import UPerNetHead
from vision_lowrank.raster_fitting import fit_raster
from vision_lowrank.runs import write_json
from vision_lowrank.tasks import raster_tasks
from vision_lowrank.tasks.raster_tasks import RasterModel, RasterTask, raster_loss

CHANNELS, CLASSES, SIDE = 3, 3, 8


class Encoder(nn.Module):
    """Patches of 4 x 4 pixels through a convolution, a normalisation, dropout and a layer."""

    def __init__(self):
        super().__init__()
        self.dim, self.patch_size, self.name = 12, 4, "tiny"
        self.embed = nn.Conv2d(CHANNELS, 16, 4, 4)
        self.norm = nn.BatchNorm2d(16)
        self.drop = nn.Dropout(0.1)
        self.mix = nn.Linear(16, 12)

    def forward_patch_features(self, image, wavelengths, gsd):
        assert wavelengths.shape == image.shape[:2]
        assert gsd.shape == image.shape[:1]
        height, width = image.shape[-2:]
        x = nn.functional.pad(image, (0, -width % 4, 0, -height % 4))
        x = self.drop(nn.functional.gelu(self.norm(self.embed(x))))
        return self.mix(x.movedim(1, -1)).movedim(-1, 1)

    def forward_patch_maps(self, image, wavelengths, gsd):
        return [self.forward_patch_features(image, wavelengths, gsd)] * 4

    def forward_image_features(self, image, wavelengths, gsd):
        return self.forward_patch_features(image, wavelengths, gsd).mean((2, 3))


class Samples(torch.utils.data.Dataset):
    def __init__(self, samples):
        self.samples = samples
        self.groups = np.arange(len(samples))

    def __len__(self):
        return len(self.samples)

    def __getitem__(self, index):
        return self.samples[index]


def make_samples(kind, count, seed, height=SIDE, width=SIDE):
    """Images in which a class is a bright channel: of the whole image, or of its left or right half."""
    generator = torch.Generator().manual_seed(seed)
    samples = []
    for _ in range(count):
        image = 0.5 * torch.randn(CHANNELS, height, width, generator=generator)
        sample = {"image": image, "wavelengths": torch.tensor([450.0, 550, 850]), "gsd": torch.tensor(10.0)}
        if kind == "classification":
            sample["label"] = torch.randint(CLASSES, (), generator=generator)
            image[sample["label"]] += 1.5
        elif kind == "multilabel":
            sample["labels"] = torch.randint(2, (CLASSES,), generator=generator).float()
            image += 1.5 * sample["labels"][:, None, None]
        else:
            sides = torch.randint(CLASSES, (2,), generator=generator)
            mask = sides[0].expand(height, width).clone()
            mask[:, 4:] = sides[1]
            image += 1.5 * nn.functional.one_hot(mask, CLASSES).permute(2, 0, 1)
            mask[torch.rand(height, width, generator=generator) < 0.2] = 255
            sample["mask"] = mask
        samples.append(sample)
    return Samples(samples)


METRICS = {"classification": "accuracy", "multilabel": "micro_map", "segmentation": "macro_miou"}


def make_task(kind="classification", **size):
    train, validation, test = (make_samples(kind, count, seed, **size) for seed, count in enumerate((48, 24, 30)))
    return TaskData(
        name="toy", kind=kind, classes=("a", "b", "c"), metric=METRICS[kind],
        wavelengths=np.array([450, 550, 850], np.float32), gsd=10.0, fingerprint="f00d",
        train=train, validation=validation, test=test,
    )  # fmt: skip


@pytest.fixture
def fit(tmp_path):
    """Function that fits the toy encoder and predicts the test set; `fit.encoders` are those of its last call."""

    def run(task, mode="finetune", rates=(0.02,), folder="fit", encoder=Encoder, **changes):
        run.encoders = []
        run.initial = []

        def make_encoder():
            run.encoders.append(encoder())
            run.initial.append({name: value.clone() for name, value in run.encoders[-1].state_dict().items()})
            return run.encoders[-1]

        options = {
            "mode": mode, "learning_rates": rates, "epochs": 4, "batch_size": 16, "precision": "32-true",
            "device": "cpu", "folder": tmp_path / folder, "seed": 3, "targets": ["mix", "embed"], "rank": 2,
            "num_workers": 0, "tests": {"test": task.test},
        }  # fmt: skip
        return fit_raster(task, make_encoder, **options | changes)

    return run


def logits_and_mask():
    generator = torch.Generator().manual_seed(0)
    logits = 3 * torch.randn(2, CLASSES, 4, 5, generator=generator)
    mask = torch.randint(CLASSES, (2, 4, 5), generator=generator)
    mask[0, 0] = mask[1, 2, 3] = 255
    return logits, mask


def test_loss_of_maps_is_the_mean_log_probability_of_pixels_that_count():
    logits, mask = logits_and_mask()
    terms = []
    for image in range(2):
        for row in range(4):
            for column in range(5):
                if mask[image, row, column] != 255:
                    values = logits[image, :, row, column].double().numpy()
                    terms.append(np.log(np.exp(values).sum()) - values[mask[image, row, column]])
    assert len(terms) == 34
    assert float(raster_loss(logits, mask, "segmentation")) == pytest.approx(np.mean(terms), rel=1e-6)


def test_pixels_that_do_not_count_have_no_part_in_loss_and_gradient():
    logits, mask = logits_and_mask()
    expected = raster_loss(logits, mask, "segmentation")
    changed = torch.where((mask == 255)[:, None], torch.tensor(50.0), logits).requires_grad_()
    loss = raster_loss(changed, mask, "segmentation")
    loss.backward()
    assert loss == expected
    assert torch.equal(changed.grad.abs().sum(1) == 0, mask == 255)
    nothing = raster_loss(changed, torch.full_like(mask, 255), "segmentation")
    assert nothing == 0
    assert not torch.autograd.grad(nothing, changed)[0].any()


def test_losses_of_labels():
    scores = torch.tensor([[0.3, -2.0, 4.0], [1.0, 0.0, -1.0]])
    labels = torch.tensor([[1.0, 0, 0], [0, 1, 1]])
    chance = 1 / (1 + np.exp(-scores.double().numpy()))
    expected = -np.mean(np.where(labels == 1, np.log(chance), np.log(1 - chance)))
    assert float(raster_loss(scores, labels, "multilabel")) == pytest.approx(expected, rel=1e-6)
    shares = np.exp(scores.double().numpy())
    expected = -np.log([shares[0, 2] / shares[0].sum(), shares[1, 0] / shares[1].sum()]).mean()
    assert float(raster_loss(scores, torch.tensor([2, 0]), "classification")) == pytest.approx(expected, rel=1e-6)


def test_logits_of_an_image_are_those_of_its_corner_of_the_padded_one():
    model = RasterModel(Encoder(), "segmentation", CLASSES).eval()
    image = torch.randn(2, CHANNELS, 7, 10)
    wavelengths, gsd = torch.zeros(2, CHANNELS), torch.ones(2)
    padded = nn.functional.pad(image, (0, 2, 0, 1))
    with torch.no_grad():
        assert torch.equal(model(image, wavelengths, gsd), model(padded, wavelengths, gsd)[..., :7, :10])


def test_classes_are_learned_and_finished_work_is_not_repeated(fit, monkeypatch):
    task = make_task()
    fitted = fit(task, rates=(0.01, 0.02))
    predicted, targets = fitted.tests["test"]
    truth = np.array([int(sample["label"]) for sample in task.test])
    assert np.array_equal(predicted, truth)
    assert np.array_equal(targets, truth)
    assert fitted.trainable_parameters == sum(p.numel() for p in Encoder().parameters()) + 13 * CLASSES
    assert [trial.learning_rate for trial in fitted.trials] == [0.01, 0.02]
    assert fitted.seconds == sum(trial.seconds for trial in fitted.trials)
    assert min(trial.seconds for trial in fitted.trials) > 0
    monkeypatch.setattr(RasterTask, "training_step", lambda *_: pytest.fail("trained again"))
    again = fit(task, rates=(0.01, 0.02))
    assert np.array_equal(again.tests["test"][0], truth)
    assert again.trials == fitted.trials


def test_maps_are_learned_and_the_weights_kept_are_those_of_the_best_epoch(fit):
    """Sides that patches do not divide; the validation set is tested, so both ways to the metric must agree."""
    task = make_task("segmentation", height=7, width=10)
    fitted = fit(replace(task, test=task.validation), rates=(0.01,))
    confusion, targets = fitted.tests["test"]
    assert targets is None
    assert confusion.shape == (24, CLASSES, CLASSES)
    pixels = [[int((sample["mask"] == k).sum()) for k in range(CLASSES)] for sample in task.validation]
    assert np.array_equal(confusion.sum(2), pixels)
    total = confusion.sum(0)
    union = total.sum(0) + total.sum(1) - total.diagonal()
    assert fitted.trials[0].score == pytest.approx((total.diagonal() / union).mean(), rel=1e-6)
    assert 0.5 < fitted.trials[0].score < 1


class Narrow(UPerNetHead):
    """UPerNet that trains in a second."""

    def __init__(self, dims, num_classes, patch_size):
        super().__init__(dims, num_classes, patch_size, decoder_dim=32)


@pytest.mark.parametrize("mode", ["finetune", "adapter"])
def test_maps_are_learned_by_upernet(fit, monkeypatch, mode):
    """Which half is which class is told by the pixels of a patch only, which all four maps see."""
    monkeypatch.setattr(raster_tasks, "UPerNetHead", Narrow)
    task = make_task("segmentation", height=7, width=10)
    fitted = fit(task, mode=mode, rates=(0.01,), head="upernet", epochs=6)
    untrained = fit(task, mode="linear", rates=(1e-9,), epochs=1, folder="untrained")
    scores = []
    for outcome in (fitted, untrained):
        confusion, _ = outcome.tests["test"]
        scores.append(confusion.sum(0).trace() / confusion.sum())
    assert scores[0] > 0.6 > scores[1]
    head = sum(p.numel() for p in Narrow([12] * 4, CLASSES, 4).parameters())
    encoder = sum(p.numel() for p in Encoder().parameters())
    adapters = 2 * (16 + 12) + 2 * (CHANNELS * 16 + 16)
    assert fitted.trainable_parameters == head + {"finetune": encoder, "adapter": adapters}[mode]


def test_labels_are_learned(fit):
    task = make_task("multilabel")
    fitted = fit(task, epochs=10)
    predicted, targets = fitted.tests["test"]
    assert np.array_equal(targets, np.stack([sample["labels"].numpy() for sample in task.test]))
    assert predicted.min() > 0
    assert predicted.max() < 1
    assert np.array_equal(predicted > 0.5, targets == 1)
    assert score_task("multilabel", predicted, targets, CLASSES)["micro_map"] == pytest.approx(1)


def test_every_set_is_predicted_by_the_chosen_weights_whatever_its_size(fit):
    task = make_task()
    wide = make_samples("classification", 5, seed=7, height=12, width=20)
    fitted = fit(task, tests={"": task.test, "wide": wide})
    assert list(fitted.tests) == ["", "wide"]
    assert np.array_equal(*fitted.tests[""])
    assert np.array_equal(fitted.tests["wide"][1], [int(sample["label"]) for sample in wide])
    assert np.array_equal(*fitted.tests["wide"])


def test_of_equally_good_epochs_the_latest_is_kept_of_rates_the_earliest(fit, tmp_path):
    fitted = fit(make_task(), rates=(0.03, 0.02), epochs=6)
    assert [trial.score for trial in fitted.trials] == [1.0, 1.0]
    assert (fitted.learning_rate, fitted.epoch) == (0.03, 6)
    history = read_checkpoint(tmp_path / "fit" / "lr_0.03" / "best.ckpt")["history"]
    assert len(history) == 6
    assert history[4]["val/accuracy"] == 1


def test_the_best_epoch_is_kept_where_later_ones_are_worse(fit, monkeypatch, tmp_path):

    def spoil(task, outputs, batch, index):
        if task.current_epoch == 2 and index == 2:
            task.model.head.weight.data.mul_(-1)

    monkeypatch.setattr(RasterTask, "on_train_batch_end", spoil)
    fitted = fit(make_task(), rates=(0.03,), epochs=3)
    history = read_checkpoint(tmp_path / "fit" / "lr_0.03" / "best.ckpt")["history"]
    assert len(history) == fitted.epoch == 2
    assert fitted.trials[0].score == history[1]["val/accuracy"] == 1
    assert np.array_equal(*fitted.tests["test"])


def test_a_head_alone_leaves_the_encoder_bit_for_bit(fit, tmp_path):
    fitted = fit(make_task(), "linear", rates=(0.1,), epochs=12)
    assert np.equal(*fitted.tests["test"]).mean() > 0.9
    assert fitted.trainable_parameters == 13 * CLASSES
    trained, initial = fit.encoders[1].state_dict(), fit.initial[1]
    assert all(torch.equal(trained[name], initial[name]) for name in initial)
    saved = read_checkpoint(tmp_path / "fit" / "lr_0.1" / "best.ckpt")["state_dict"]
    buffers = {f"model.encoder.{name}" for name, _ in Encoder().named_buffers()}
    assert saved.keys() == {"model.head.weight", "model.head.bias"} | buffers


def test_a_frozen_encoder_stays_in_evaluation_mode():
    task = RasterTask(RasterModel(Encoder(), "classification", CLASSES), "accuracy", 0.1, 0.0, 0.0)
    task.train()
    assert all(module.training for module in task.modules())
    task.model.encoder.requires_grad_(False)
    task.train()
    assert not any(module.training for module in task.model.encoder.modules())
    assert task.model.head.training
    # with a part to train, dropout belongs to training, and frozen statistics stay
    task.model.encoder.mix.requires_grad_(True)
    task.train()
    assert task.model.encoder.drop.training
    assert not task.model.encoder.norm.training


def test_adapters_change_nothing_but_themselves_and_the_head(fit, tmp_path):
    fitted = fit(make_task(), "adapter", rates=(0.1,), epochs=6)
    assert np.equal(*fitted.tests["test"]).mean() > 0.9
    # factors of rank 2 of 16 x 12 and of 16 x (3 x 4 x 4) weights
    assert fitted.trainable_parameters == 2 * (16 + 12) + 2 * (16 + 48) + 13 * CLASSES
    trained = {name.replace(".base", ""): value for name, value in fit.encoders[1].state_dict().items()}
    assert all(torch.equal(trained[name], value) for name, value in fit.initial[1].items())
    # alpha is twice the rank
    assert [part.scaling for part in fit.encoders[1].modules() if hasattr(part, "scaling")] == [2, 2]
    adapters = {name: value for name, value in trained.items() if "adapters" in name and value.ndim > 1}
    assert len(adapters) == 4
    assert all(value.any() for value in adapters.values())
    saved = read_checkpoint(tmp_path / "fit" / "lr_0.1" / "best.ckpt")["state_dict"]
    assert not any(name.endswith((".base.weight", "norm.weight")) for name in saved)


def test_the_rate_is_chosen_on_the_validation_set_and_the_test_set_read_afterwards(fit, tmp_path):
    """Test labels are turned round, so that whoever chose by them would take the rate that learns nothing."""
    task = make_task()
    rates = (1e-9, 0.02)

    class Sealed(Samples):
        def __getitem__(self, index):
            assert all((tmp_path / "fit" / f"lr_{rate}" / "finished.json").exists() for rate in rates)
            return super().__getitem__(index)

    turned = [{**sample, "label": (sample["label"] + 1) % CLASSES} for sample in task.test]
    fitted = fit(replace(task, test=Sealed(turned)), rates=rates)
    assert fitted.learning_rate == 0.02
    assert fitted.trials[0].score < fitted.trials[1].score == 1
    assert not np.equal(*fitted.tests["test"]).any()
    idle = fit(replace(task, test=Samples(turned)), rates=rates[:1], folder="idle")
    assert np.equal(*idle.tests["test"]).any()


def test_an_interrupted_run_ends_where_the_uninterrupted_one_does(fit, monkeypatch, tmp_path):
    task = make_task("multilabel")
    rates = (1e-3, 2e-3)
    whole = fit(task, rates=rates, folder="whole")
    expected = fit.encoders[2].state_dict()

    class Stop(Exception):
        pass

    step = RasterTask.training_step

    def stop(module, batch, index):
        if module.learning_rate == rates[1] and module.current_epoch == 2 and index == 1:
            raise Stop
        return step(module, batch, index)

    with monkeypatch.context() as patch:
        patch.setattr(RasterTask, "training_step", stop)
        with pytest.raises(Stop):
            fit(task, rates=rates)
    assert (tmp_path / "fit" / "lr_0.001" / "finished.json").exists()
    assert not (tmp_path / "fit" / "lr_0.002" / "finished.json").exists()
    resumed = fit(task, rates=rates)
    assert len(fit.encoders) == 3  # looked at, trained, predicting
    trained = fit.encoders[1].state_dict()
    assert [name for name in expected if not torch.equal(trained[name], expected[name])] == []
    assert [trial.score for trial in resumed.trials] == [trial.score for trial in whole.trials]
    assert whole.epoch == resumed.epoch > 2
    assert np.array_equal(resumed.tests["test"][0], whole.tests["test"][0])
    assert not list(tmp_path.glob("*/*/last.ckpt"))


def test_training_that_was_complete_but_not_noted_down_is_not_repeated(fit, monkeypatch, tmp_path):
    task = make_task()

    def write(path, content):
        if path.name == "finished.json":
            raise OSError(28, "No space left on device")
        write_json(path, content)

    with monkeypatch.context() as patch:
        patch.setattr("vision_lowrank.raster_fitting.write_json", write)
        with pytest.raises(OSError, match="No space"):
            fit(task)
    monkeypatch.setattr(RasterTask, "training_step", lambda *_: pytest.fail("trained again"))
    fitted = fit(task)
    assert np.array_equal(*fitted.tests["test"])
    assert fitted.seconds > 0


@pytest.mark.parametrize(("height", "width", "kinds"), [(4, 4, 8), (2, 4, 4)])
def test_images_and_masks_turn_together(monkeypatch, height, width, kinds):
    seen = []

    class Watch(RasterModel):
        def forward(self, image, wavelengths, gsd):
            seen.append(image)
            return torch.zeros(len(image), CLASSES, *image.shape[-2:], requires_grad=True)

    task = RasterTask(Watch(Encoder(), "segmentation", CLASSES), "macro_miou", 0.1, 0.0, 0.0)
    monkeypatch.setattr(task, "log", lambda *_, **__: None)
    monkeypatch.setattr(raster_tasks, "raster_loss", lambda logits, target, kind: seen.append(target))
    mask = torch.arange(height * width).view(1, height, width).repeat(200, 1, 1)
    zeros = torch.zeros(200)
    batch = {"image": mask[:, None].float(), "mask": mask, "wavelengths": zeros, "gsd": zeros, "index": zeros}
    torch.manual_seed(1)
    task.training_step(batch, 0)
    image, target = seen
    assert torch.equal(image[:, 0].long(), target)
    variants = {tuple(one.flatten().tolist()) for one in target}
    assert len(variants) == kinds
    # a turn keeps neighbours: what lay beside the first corner still does
    assert all({*row} >= {0} for row in variants)
    corners = target[:, [0, 0, -1, -1], [0, -1, 0, -1]].sort(1).values
    assert torch.equal(corners, mask[:, [0, 0, -1, -1], [0, -1, 0, -1]])


def test_each_step_draws_anew_and_a_repeated_one_the_same():
    torch.manual_seed(5)
    task = RasterTask(RasterModel(Encoder(), "classification", CLASSES), "accuracy", 0.1, 0.0, 0.0)
    draws = []
    for step in (0, 1, 0):
        task.trainer = L.Trainer(accelerator="cpu", logger=False, enable_checkpointing=False)
        task.__class__ = type("Stepped", (RasterTask,), {"global_step": step})
        task.on_train_batch_start(None, 0)
        draws.append(torch.rand(3))
    assert torch.equal(draws[0], draws[2])
    assert not torch.equal(draws[0], draws[1])


def test_a_rate_at_which_training_diverges_is_out(fit, tmp_path):
    task = make_task()
    fitted = fit(task, rates=(1e30, 0.02))
    assert fitted.learning_rate == 0.02
    lost = fitted.trials[0]
    assert (lost.score, lost.epoch) == (None, 0)
    assert json.loads((tmp_path / "fit" / "lr_1e+30" / "finished.json").read_text())["failure"] == lost.failure
    with pytest.raises(TrainingError, match=r"toy: training diverged at each of .*1e\+30.* sample \d+, \d+.* not fini"):
        fit(task, rates=(1e30,), folder="other")


@pytest.mark.parametrize("split", ["train", "validation", "test"])
def test_an_image_that_is_not_finite_is_named(fit, split):
    task = make_task()
    task.train[1]["image"][0, 0, 0] = 1e6  # large is not damaged
    getattr(task, split)[21]["image"][2, 3, 3] = float("nan")
    getattr(task, split)[5]["image"][0, 0, 0] = float("inf")
    name = {"train": "training"}.get(split, split)
    with pytest.raises(DataError, match=rf"{name} sample \d+(, \d+)?: the image holds NaN or infinite") as caught:
        fit(task, batch_size=48)
    numbers = str(caught.value).split("sample ")[1].split(":")[0]
    assert sorted(map(int, numbers.split(", "))) == [5, 21]


class Maps(Encoder):
    """Forgets to take the mean."""

    def forward_image_features(self, image, wavelengths, gsd):
        return self.forward_patch_features(image, wavelengths, gsd)


class Coarse(Encoder):
    """Promises patches smaller than they are."""

    def __init__(self):
        super().__init__()
        self.patch_size = 2


def test_an_encoder_of_another_shape_is_refused_before_anything_is_written(fit, tmp_path):
    with pytest.raises(ConfigError, match=r"encoder Maps: .*\(1, 12, 2, 2\), not \(1, 12\)"):
        fit(make_task(), encoder=Maps)
    with pytest.raises(ConfigError, match=r"encoder Coarse: .*\(1, 12, 2, 2\), not \(1, 12, 4, 4\)"):
        fit(make_task("segmentation"), encoder=Coarse)
    assert not any(tmp_path.iterdir())


class Scaled(Encoder):
    """Other weights under the same name."""

    def __init__(self):
        super().__init__()
        self.mix.weight.data.mul_(2)


def test_a_folder_belongs_to_one_configuration(fit):
    task = make_task()
    fit(task, epochs=1)
    fit(task, epochs=1, rank=7, targets=["nothing"])  # which mean nothing without adapters
    for changes in ({"epochs": 2}, {"seed": 4}, {"mode": "linear"}, {"rates": (0.02, 0.01)}, {"batch_size": 8}):
        key = next(iter(changes)).replace("rates", "learning_rates")
        with pytest.raises(ConfigError, match=rf"training there was begun with .*{key} .*, not .*another folder"):
            fit(task, **{"epochs": 1} | changes)
    with pytest.raises(ConfigError, match="data 'f00d', not 'beef'"):
        fit(replace(task, fingerprint="beef"), epochs=1)
    with pytest.raises(ConfigError, match="begun with weights '"):
        fit(task, epochs=1, encoder=Scaled)


def test_wrong_options_are_refused(fit, tmp_path):
    task = make_task()
    for changes, message in (
        ({"mode": "full"}, "mode='full': choose one of finetune, adapter, linear"),
        ({"rates": ()}, r"learning_rates=\[\]: give at least one"),
        ({"rates": (0.1, 0.1)}, "none twice"),
        ({"rates": (0.1, -1.0)}, "positive"),
        ({"epochs": 0}, "epochs=0, batch_size=16: give at least 1"),
    ):
        with pytest.raises(ConfigError, match=message):
            fit(task, **changes)
    with pytest.raises(DataError, match="toy: the set 'validation' is empty"):
        fit(replace(task, validation=Samples([])))
    with pytest.raises(DataError, match="toy: the set 'infrared' is empty"):
        fit(task, tests={"test": task.test, "infrared": Samples([])})
    with pytest.raises(ConfigError, match="metric 'macro_miou' is not one of classification: accuracy"):
        fit(replace(task, metric="macro_miou"))
    assert not any(tmp_path.iterdir())
    with pytest.raises(ConfigError, match="the kind of a task is 'regression'"):
        RasterModel(Encoder(), "regression", CLASSES)
    with pytest.raises(ConfigError, match="head is 'upernet' for classification; it can be linear"):
        RasterModel(Encoder(), "classification", CLASSES, "upernet")


def test_parts_of_the_encoder_say_what_is_not_decayed():
    encoder = Encoder()
    encoder.part = nn.Module()
    encoder.part.token = nn.Parameter(torch.ones(1, 1, 12))
    encoder.part.no_weight_decay = lambda: {"token"}
    model = RasterModel(encoder, "classification", CLASSES)
    assert model.no_weight_decay() == {"encoder.part.token"}
    task = RasterTask(model, "accuracy", 0.1, 0.3, 0.0)
    task.trainer = type("Trainer", (), {"estimated_stepping_batches": 10})()
    groups = task.configure_optimizers()["optimizer"].param_groups
    decayed = {id(p) for group in groups if group["weight_decay"] for p in group["params"]}
    assert decayed == {id(p) for p in (encoder.embed.weight, encoder.mix.weight, model.head.weight)}
