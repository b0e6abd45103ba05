"""What steps do for adapters, each against arithmetic written out here, and every configuration of an adapter."""

import copy
from pathlib import Path

import lightning as L
import pytest
import torch
import torch.multiprocessing as mp
import torch.nn.functional as F
from hydra import compose, initialize_config_dir
from torch import nn
from torch.utils.data import DataLoader

from vision_lowrank.adapters import DyLoRA, FlyLoRA, LoRA, LoRAXS, SoRA, count_parameters, inject, load_adapter
from vision_lowrank.adapters.peft_methods import PEFT_METHODS
from vision_lowrank.errors import AdapterError, ConfigError
from vision_lowrank.instantiate import instantiate
from vision_lowrank.models import LolaSpecViT
from vision_lowrank.processes import SharedBatches
from vision_lowrank.tasks.adapter_training import (
    AdapterTraining,
    PeftAdapter,
    count_trained,
    first_batches,
    put_adapters,
    save_adapters,
)
from vision_lowrank.tasks.scene_classification import SceneClassification

CONFIGS = Path(__file__).resolve().parents[2] / "configs"
NAMES = sorted(path.stem for path in (CONFIGS / "adapter").glob("[a-z]*.yaml") if path.stem != "sprite_lora")
# two of these are in peft as well
OWN = {
    "lora", "rslora", "lora_plus", "lora_pro", "gated_lora", "hydra", "nola", "dylora", "sora", "lora_xs", "lora_sb",
    "flylora",
}  # fmt: skip
RATE, DECAY = 0.02, 0.3


class Pooled(nn.Module):
    """Logits of the mean spectrum: no symmetry of the patch changes them."""

    def __init__(self):
        super().__init__()
        self.norm = nn.BatchNorm2d(6)
        self.body = nn.Linear(6, 8)
        self.head = nn.Linear(8, 3)

    def forward(self, x):
        return self.head(self.body(self.norm(x).mean((2, 3))).tanh())


def make_task(model, **options):
    settings = {
        "class_counts": [5, 5, 5], "learning_rate": RATE, "weight_decay": DECAY, "warmup": 0.0,
        "label_smoothing": 0.0, "balance": 0.0, "mixup": 0.0,
    }  # fmt: skip
    return SceneClassification(model, **(settings | options))


def samples(size=16):
    generator = torch.Generator().manual_seed(0)
    label = torch.arange(size) % 3
    image = torch.randn(size, 6, 3, 3, generator=generator) + label.view(-1, 1, 1, 1)
    return [{"image": x, "label": y} for x, y in zip(image, label, strict=True)]


class Watch(L.Callback):
    """Notes what the optimiser is given and what is there at the end of each step."""

    def __init__(self, see):
        self.see, self.seen = see, []

    def on_train_batch_end(self, trainer, task, outputs, batch, index):
        self.seen.append(self.see(trainer, task))


def fit(task, epochs, callbacks, size=16, checkpoint=None, **options):
    trainer = L.Trainer(
        accelerator="cpu", max_epochs=epochs, logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, num_sanity_val_steps=0, callbacks=callbacks, **options,
    )  # fmt: skip
    loader = DataLoader(samples(size), 16)
    trainer.fit(task, loader, loader, ckpt_path=checkpoint)
    return trainer


def adapted(method, train="head"):
    torch.manual_seed(1)
    model = Pooled()
    nn.init.normal_(model.head.weight)
    inject(model, "body", method, train=train)
    return model


def batch():
    rows = samples()
    return torch.stack([row["image"] for row in rows]), torch.stack([row["label"] for row in rows])


def test_dylora_draws_a_rank_a_step_from_seed_and_step_alone():
    torch.manual_seed(3)
    model = adapted(DyLoRA(6, 6))
    task = make_task(model)
    watch = Watch(lambda trainer, task: task.model.body.adapters["default"].sampled_rank)
    fit(task, 12, [AdapterTraining(), watch])
    expected = [
        int(torch.randint(1, 7, (), generator=torch.Generator().manual_seed(task.seed + step))) for step in range(12)
    ]
    assert watch.seen == expected
    assert len(set(expected)) > 3


class Bare(L.LightningModule):
    """A task of somebody else's, whose network is named `net` and which has no seed."""

    def __init__(self, net):
        super().__init__()
        self.net = net

    def training_step(self, batch, index):
        return F.cross_entropy(self.net(batch["image"]), batch["label"])

    def configure_optimizers(self):
        return torch.optim.SGD([p for p in self.parameters() if p.requires_grad], lr=0.1)


def test_a_task_without_model_and_seed_draws_from_torchs_initial_seed_and_resumes(tmp_path):
    def ranks(epochs, checkpoint=None):
        torch.manual_seed(3)
        task = Bare(adapted(DyLoRA(6, 6)))
        torch.manual_seed(5)
        watch = Watch(lambda trainer, task: task.net.body.adapters["default"].sampled_rank)
        trainer = fit(task, epochs, [AdapterTraining(), watch], checkpoint=checkpoint)
        trainer.save_checkpoint(tmp_path / "last.ckpt")
        return watch.seen

    expected = [int(torch.randint(1, 7, (), generator=torch.Generator().manual_seed(5 + step))) for step in range(8)]
    assert ranks(8) == expected
    assert ranks(4) + ranks(8, tmp_path / "last.ckpt") == expected
    # the adapters are found wherever they are
    with pytest.raises(ConfigError, match="SoRA without"):
        fit(Bare(adapted(SoRA(2, 2))), 1, [AdapterTraining()])
    fit(Bare(adapted(LoRA(2, 4))), 1, [AdapterTraining(lora_pro=True)])


def test_soras_gates_take_a_proximal_step_of_sparsity_times_the_rate_and_do_not_decay():
    model = adapted(SoRA(8, 8))
    adapter = model.body.adapters["default"]
    with torch.no_grad():
        adapter.lora_B.weight.normal_()
        adapter.sora_gate[:2] = torch.tensor([0.021, -0.5])
    start, decayed = adapter.sora_gate.detach().clone(), adapter.lora_A.weight.detach().clone()
    image, label = batch()
    reference = copy.deepcopy(model).train()
    reference.norm.eval()
    F.cross_entropy(reference(image), label).backward()
    other = reference.body.adapters["default"]

    def first_step(value, gradient, decay):
        # moments of Adam, corrected for their start, make the first step one of length RATE
        return value * (1 - RATE * decay) - RATE * gradient / (gradient.abs() + 1e-8)

    fit(make_task(model, cycles=None), 1, [AdapterTraining(sparsity=0.5)])
    stepped = first_step(start, other.sora_gate.grad, 0.0)
    threshold = 0.5 * RATE
    expected = torch.where(stepped.abs() <= threshold, 0.0, stepped - threshold * stepped.sign())
    torch.testing.assert_close(adapter.sora_gate.detach(), expected, atol=1e-6, rtol=0)
    torch.testing.assert_close(
        adapter.lora_A.weight.detach(), first_step(decayed, other.lora_A.weight.grad, DECAY), atol=1e-6, rtol=0
    )


def test_the_proximal_step_follows_steps_and_not_batches():
    model = adapted(SoRA(8, 8))
    adapter = model.body.adapters["default"]
    start = adapter.sora_gate.detach().clone()
    adapter.requires_grad_(True)
    # B is zero and its gradient is stopped, so that nothing but the proximal step moves the gates
    adapter.lora_B.weight.register_hook(torch.zeros_like)
    task = make_task(model, weight_decay=0.0)
    watch = Watch(lambda trainer, task: adapter.sora_gate.detach().clone())
    fit(task, 1, [AdapterTraining(sparsity=0.5), watch], size=64, accumulate_grad_batches=2)
    shrunk = F.softshrink(start, 0.5 * RATE)
    assert torch.equal(watch.seen[0], start)
    torch.testing.assert_close(watch.seen[1], shrunk)
    assert torch.equal(watch.seen[2], watch.seen[1])
    assert not torch.equal(watch.seen[3], watch.seen[1])


def test_flyloras_biases_move_once_a_step_by_the_tokens_of_all_its_batches():
    model = adapted(FlyLoRA(4, 8, active=1, balance_rate=0.25))
    adapter = model.body.adapters["default"]
    counts = []

    def watch_counts(trainer, task):
        counts.append(adapter.fly_counts.clone())
        return adapter.fly_d.clone()

    watch = Watch(watch_counts)
    fit(make_task(model), 1, [AdapterTraining(), watch], size=64, accumulate_grad_batches=2)
    assert not watch.seen[0].any()
    assert counts[0].any()
    assert not counts[1].any()
    assert watch.seen[1].any()
    assert torch.equal(watch.seen[2], watch.seen[1])
    assert not torch.equal(watch.seen[3], watch.seen[1])


def test_lora_pro_replaces_gradients_before_they_are_clipped():
    model = adapted(LoRA(2, 4))
    adapter = model.body.adapters["default"]
    nn.init.normal_(adapter.lora_B.weight)
    image, label = batch()
    plain = copy.deepcopy(model).train()
    plain.norm.eval()
    # the full gradient, by a weight that holds the adapter
    weight = (plain.body.base.weight + plain.body.adapters["default"].delta_weight()).detach().requires_grad_()
    hidden = F.linear(plain.norm(image).mean((2, 3)), weight, plain.body.base.bias)
    F.cross_entropy(plain.head(hidden.tanh()), label).backward()
    down, up = adapter.lora_A.weight.detach().clone(), adapter.lora_B.weight.detach().clone()

    def gradients(trainer, task):
        return {name: p.grad.clone() for name, p in task.model.named_parameters() if p.grad is not None}

    watch = Watch(gradients)
    fit(make_task(model), 1, [AdapterTraining(lora_pro=True), watch])
    (seen,) = watch.seen
    new_down, new_up = (seen[f"body.adapters.default.{name}.weight"] for name in ("lora_A", "lora_B"))
    change = 2 * (up @ new_down + new_up @ down)
    outside_up = torch.eye(8) - up @ torch.linalg.pinv(up)
    outside_down = torch.eye(6) - torch.linalg.pinv(down) @ down
    torch.testing.assert_close(change, weight.grad - outside_up @ weight.grad @ outside_down, atol=1e-5, rtol=1e-4)

    watch = Watch(gradients)
    fit(make_task(adapted(LoRA(2, 4))), 1, [AdapterTraining(lora_pro=True), watch], gradient_clip_val=0.01)
    norm = torch.stack([gradient.norm() for gradient in watch.seen[0].values()]).norm()
    assert float(norm) == pytest.approx(0.01, rel=1e-3)


def test_lora_plus_keeps_the_ratio_of_rates_through_the_schedule():
    model = adapted(LoRA(2, 4))
    up = model.body.adapters["default"].lora_B.weight

    def rates(trainer, task):
        groups = trainer.optimizers[0].param_groups
        return {group["lr"]: [p is up for p in group["params"]] for group in groups}

    watch = Watch(rates)
    fit(make_task(model, rate_ratio=16.0), 4, [watch])
    for found in watch.seen[:-1]:
        slow, fast = sorted(found)
        assert fast == pytest.approx(16 * slow)
        assert found[fast] == [True]
        assert not any(found[slow])


def test_lora_sb_starts_with_the_first_step_on_the_samples():
    torch.manual_seed(1)
    model = Pooled().train()
    reference = copy.deepcopy(model).eval()
    taken = first_batches(DataLoader(samples(48), 16), ["image"], 20)
    assert [len(label) for _, label in taken] == [16, 16]
    for (image,), label in taken:
        F.cross_entropy(reference(image), label).backward()
    method = LoRAXS(3, 3, "gradient", 0.01)
    put = put_adapters(model, method, "body", "head", lambda: taken)
    assert put is model
    assert model.training
    u, values, vh = torch.linalg.svd(-0.01 * reference.body.weight.grad.sign())
    expected = u[:, :3] @ torch.diag(values[:3]) @ vh[:3]
    torch.testing.assert_close(model.body.adapters["default"].delta_weight(), expected, atol=1e-6, rtol=1e-4)
    assert all(parameter.grad is None for parameter in model.parameters())


def shared_loader():
    return DataLoader(samples(48), batch_sampler=SharedBatches(range(47, -1, -1), 16))


@pytest.mark.parametrize("rank", [0, 1, 2])
def test_every_process_sees_the_samples_that_one_alone_would(rank, monkeypatch):
    first = torch.stack([row["image"] for row in samples(48)[:31:-1]])
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 3)
    monkeypatch.setattr(torch.distributed, "get_rank", lambda: rank)
    taken = first_batches(shared_loader(), ["image"], 20)
    assert [len(label) for _, label in taken] == [16, 16]
    assert torch.equal(taken[0][0][0], first)


def _started():
    """The weights at the start of methods that look at the data."""
    found = {}
    for name, method in {"lora_sb": LoRAXS(3, 3, "gradient", 0.01), "eva": PeftAdapter("eva", 2)}.items():
        torch.manual_seed(1)
        model = put_adapters(Pooled(), method, "body", "head", lambda: first_batches(shared_loader(), ["image"], 20))
        found |= {f"{name}.{key}": value for key, value in model.state_dict().items()}
    return found


def _worker(rank, folder):
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", f"file://{folder}/rendezvous", rank=rank, world_size=2)
    torch.save(_started(), f"{folder}/{rank}.pt")
    torch.distributed.destroy_process_group()


@pytest.mark.slow
def test_two_processes_start_as_one(tmp_path):
    mp.spawn(_worker, (str(tmp_path),), nprocs=2)
    alone = _started()
    for rank in (0, 1):
        found = torch.load(tmp_path / f"{rank}.pt", weights_only=True)
        assert found.keys() == alone.keys()
        for key, value in found.items():
            assert torch.equal(value, alone[key]), key


def test_frozen_statistics_stay_without_cycles_too():
    model = adapted(LoRA(2, 4))
    before = copy.deepcopy(model.norm.state_dict())
    fit(make_task(model), 2, [AdapterTraining()])
    assert all(torch.equal(value, before[name]) for name, value in model.norm.state_dict().items())
    free = Pooled()
    fit(make_task(free), 1, [])
    assert free.norm.num_batches_tracked == 1


def test_a_method_of_peft_trains_and_is_saved_in_its_layout(tmp_path):
    import peft

    torch.manual_seed(1)
    base = Pooled()
    model = put_adapters(copy.deepcopy(base), PeftAdapter("dora", 2, alpha=4), "body", "head", list)
    # A, B and the lengths of the rows; then weight and bias of the head
    count = count_trained(model)
    assert (count.adapter, count.head, count.trainable) == (2 * (6 + 8) + 8, 3 * 8 + 3, 36 + 27)
    assert count.base == sum(p.numel() for p in base.parameters()) - count.head
    with pytest.raises(AdapterError, match="no adapters"):
        fit(make_task(model, cycles={"first_cycle": 1}), 1, [])
    before = copy.deepcopy(model.state_dict())
    fit(make_task(model), 3, [AdapterTraining()])
    changed = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
    assert {name for name in changed if "lora" not in name and "modules_to_save" not in name} == set()
    assert len(changed) == 5
    save_adapters(model, tmp_path / "adapter")
    loaded = peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "adapter").eval()
    image, _ = batch()
    torch.testing.assert_close(loaded(image), model.eval()(image))


def test_settings_without_their_adapters_are_refused():
    with pytest.raises(ConfigError, match=r"SoRA without adapter\.training\.sparsity"):
        AdapterTraining().check(adapted(SoRA(2, 2)))
    with pytest.raises(AdapterError, match="no SoRA adapter"):
        AdapterTraining(sparsity=0.1).check(adapted(LoRA(2, 2)))
    with pytest.raises(AdapterError, match="LoRA-Pro needs"):
        AdapterTraining(lora_pro=True).check(adapted(DyLoRA(2, 2)))
    with pytest.raises(ConfigError, match=r"sparsity=-1"):
        AdapterTraining(sparsity=-1)


def test_there_is_a_configuration_for_every_method():
    assert set(NAMES) == set(PEFT_METHODS) | OWN


@pytest.mark.parametrize("name", NAMES)
def test_every_configuration_fits_the_model_and_its_gradients_reach_adapters_and_head(name, tmp_path):
    with initialize_config_dir(str(CONFIGS), version_base="1.3"):
        config = compose("train", ["experiment=indian_pines", "regime=adapt", f"adapter={name}"]).adapter
    assert config.name == name
    torch.manual_seed(0)
    model = LolaSpecViT(9, 3, 3, stem_channels=(4, 4), stem_depths=(3, 3), dim=64, depths=(1,), num_heads=(2,)).eval()
    image = torch.randn(16, 9, 3, 3)
    base = copy.deepcopy(model)
    taken = [([image], torch.arange(16) % 3)]
    put = put_adapters(model, instantiate(config.method), list(config.targets), list(config.train), lambda: taken)
    AdapterTraining(**config.training).check(put)
    if name not in ("lora_sb", "lora_xs"):
        torch.testing.assert_close(put.eval()(image), base(image), atol=2e-4, rtol=1e-3)
    task = make_task(put, rate_ratio=config.rate_ratio)
    of_peft = name in set(PEFT_METHODS) - OWN
    assert (config.cycles is None) == of_peft
    task.log = lambda *args, **kwargs: None
    task.train()
    task.training_step({"image": image, "label": taken[0][1]}, 0).backward()
    trained = {key: parameter for key, parameter in put.named_parameters() if parameter.requires_grad}
    reached = sum(parameter.grad is not None and bool(parameter.grad.any()) for parameter in trained.values())
    # where a factor starts at zero the other waits for it
    assert reached >= len(trained) / 4
    count = count_trained(put)
    assert count.head == 3 * 128 + 3
    assert 0 < count.adapter == count.trainable - count.head
    if of_peft:
        return
    save_adapters(put, tmp_path)
    again = copy.deepcopy(base)
    load_adapter(again, tmp_path)
    assert count_parameters(again) == count
    torch.testing.assert_close(again.eval()(image), put.eval()(image))
