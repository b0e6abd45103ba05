"""The whole way from a card to a run folder, on a scene that a small model can learn."""

import json
import subprocess
import sys
from datetime import timedelta
from pathlib import Path

import lightning as L
import numpy as np
import pytest
import rasterio
import torch
import yaml
from hydra import compose, initialize_config_dir
from safetensors.torch import load_file
from sklearn.svm import SVC

from vision_lowrank import checkpoints, fitting, scene_run
from vision_lowrank.adapters import load_adapter
from vision_lowrank.data.cards import load_card
from vision_lowrank.data.splits import Split
from vision_lowrank.errors import CheckpointError, ConfigError, VisionLowRankError
from vision_lowrank.evaluation.tables import read_result
from vision_lowrank.fitting import read_checkpoint
from vision_lowrank.models import LessViT, LolaSpecViT
from vision_lowrank.models.heads import LessSegmentation
from vision_lowrank.tasks.masked_pretraining import MaskedPretraining
from vision_lowrank.tasks.scene_classification import SceneClassification
from vision_lowrank.training import train

REPOSITORY = Path(__file__).resolve().parents[1]
HEIGHT, WIDTH, BANDS, CLASSES = 30, 26, 8, 3


@pytest.fixture(scope="module")
def scene(tmp_path_factory):
    """Card of a scene in which every class is a stripe of columns with a spectrum of its own."""
    folder = tmp_path_factory.mktemp("scene")
    generator = np.random.default_rng(3)
    spectra = generator.normal(100, 20, (CLASSES, BANDS))
    classes = np.arange(WIDTH) * CLASSES // WIDTH * np.ones((HEIGHT, 1), int)
    image = spectra[classes] + generator.normal(0, 4, (HEIGHT, WIDTH, BANDS))
    labels = np.where(generator.random((HEIGHT, WIDTH)) < 0.8, classes + 1, 0)
    np.save(folder / "image.npy", image.astype(np.float32))
    np.save(folder / "labels.npy", labels.astype(np.uint8))
    colours = ["#00ff00", "#aa5500", "#0000ff"]
    card = {
        "name": "stripes",
        "title": "Stripes",
        "sensor": "a random generator",
        "files": {"image": ["image.npy"], "labels": ["labels.npy"]},
        "shape": {"height": HEIGHT, "width": WIDTH, "channels": BANDS},
        "bands": {"start": 450, "stop": 950, "count": BANDS},
        "gsd": 2,
        "classes": [{"name": f"class {i}", "colour": colour} for i, colour in enumerate(colours)],
        "licence": "CC0",
        "citation": "nobody",
    }
    (folder / "stripes.yaml").write_text(yaml.safe_dump(card))
    return folder / "stripes.yaml"


@pytest.fixture
def configure(scene, tmp_path, repository):
    """Function that composes the configuration of a short run, with further overrides."""

    def make(*overrides, baselines=False):
        with initialize_config_dir(str(repository / "configs"), version_base="1.3"):
            return compose(
                "train",
                [
                    "experiment=own_scene",
                    f"data.card={scene}",
                    f"data.root={scene.parent}",
                    f"runs_root={tmp_path / 'runs'}",
                    "data.patch_size=5",
                    "data.components=4",
                    "data.split.train=0.2",
                    "data.split.validation=0.1",
                    "data.batch_size=16",
                    "trainer.max_epochs=3",
                    "trainer.precision=32-true",
                    "+model.dim=16",
                    "+model.num_heads=[2]",
                    "+model.depths=[1]",
                    "+model.stem_channels=[2,4]",
                    "+model.stem_depths=[3,3]",
                    *([] if baselines else ["baselines=null"]),
                    *overrides,
                ],
            )

    return make


def run_folder(config):
    """The newest run of a configuration."""
    return max((Path(config.runs_root) / "own_scene").glob("*-seed*"), key=lambda path: path.stat().st_mtime_ns)


def test_run_leaves_everything_and_scores_are_those_of_its_map(configure):
    config = configure("trainer.max_epochs=12")
    (result,) = train(config)
    folder = run_folder(config)
    assert {path.name for path in folder.iterdir()} >= {
        "config.yaml", "provenance.json", "split.npz", "preprocessing.safetensors", "model", "checkpoints",
        "history.csv", "metrics.json", "metrics.csv", "table.md", "curves.png", "composite.png", "ground_truth.png",
        "prediction.png", "errors.png", "overview.png", "confusion.png", "prediction.tif", "prediction.npy",
    }  # fmt: skip
    predicted = np.load(folder / "prediction.npy")
    with rasterio.open(folder / "prediction.tif") as file:
        assert np.array_equal(file.read(1), predicted)
    split = Split.load(folder / "split.npz")
    labels = np.load(config.data.root + "/labels.npy").astype(int) - 1
    for name, pixels in split.subsets().items():
        assert result.scores[name].oa == pytest.approx(np.mean(predicted.flat[pixels] == labels.flat[pixels]))
    assert result.scores["test"].oa > 0.9
    assert read_result(folder).scores["test"].oa == result.scores["test"].oa
    assert yaml.safe_load((folder / "config.yaml").read_text())["seed"] == 0
    assert set(json.loads((folder / "provenance.json").read_text())["data"]) == {"image.npy", "labels.npy"}


def test_weights_and_preprocessing_give_the_map_again(configure, scene):
    config = configure()
    train(config)
    folder = run_folder(config)
    model = LolaSpecViT.from_pretrained(folder / "model").eval()
    scaling = load_file(folder / "preprocessing.safetensors")
    image = torch.from_numpy(np.load(scene.parent / "image.npy")).permute(2, 0, 1)
    scaled = torch.einsum("kc,chw->khw", scaling["projection"], (image - scaling["mean"][:, None, None])
                          * scaling["gain"][:, None, None])  # fmt: skip
    padded = torch.nn.functional.pad(scaled[None], (2, 2, 2, 2), mode="reflect")[0]
    patches = padded.unfold(1, 5, 1).unfold(2, 5, 1).permute(1, 2, 0, 3, 4).reshape(-1, 4, 5, 5)
    with torch.inference_mode():
        logits = model(patches)
    clear = logits.topk(2).values.diff().abs().squeeze() > 1e-3
    predicted = torch.from_numpy(np.load(folder / "prediction.npy").reshape(-1).astype(int))
    assert torch.equal(logits.argmax(1)[clear], predicted[clear])
    assert clear.float().mean() > 0.9


def test_same_seed_same_result_and_another_seed_another_split(configure):
    first, again, other = (train(configure(f"seed={seed}"))[0] for seed in (1, 1, 2))
    assert first.split == again.split != other.split
    assert np.array_equal(first.scores["test"].confusion, again.scores["test"].confusion)


def test_several_seeds_give_one_table(configure, capsys):
    config = configure("seeds=[1,2]")
    results = train(config)
    assert [result.seed for result in results] == [1, 2]
    (table,) = (Path(config.runs_root) / "own_scene").glob("*-table/table.md")
    values = [100 * result.scores["test"].oa for result in results]
    assert f"{np.mean(values):.2f} ± {np.std(values, ddof=1):.2f}" in table.read_text()
    assert f"{np.mean(values):.2f}" in capsys.readouterr().out


def test_baselines_see_training_pixels_only_and_share_the_split(configure, scene, tmp_path):
    svm, forest, network = train(configure("baselines.random_forest.trees=20", baselines=True))
    assert [svm.method, forest.method, network.method] == ["svm", "random_forest", "lola_specvit_small full"]
    assert svm.split == forest.split == network.split
    image, labels = np.load(scene.parent / "image.npy"), np.load(scene.parent / "labels.npy").reshape(-1)
    config = configure()
    split = Split.load(run_folder(config) / "split.npz")
    spectra = image.reshape(-1, BANDS)
    mean, deviation = spectra[split.train].mean(0), spectra[split.train].std(0)
    classifier = SVC(**svm.facts["chosen"]).fit((spectra[split.train] - mean) / deviation, labels[split.train])
    expected = classifier.score((spectra[split.test] - mean) / deviation, labels[split.test])
    assert svm.scores["test"].oa == pytest.approx(expected, abs=1e-6)
    assert read_result(run_folder(config) / "baselines" / "random_forest").method == "random_forest"


def test_a_baseline_alone(configure):
    (result,) = train(configure("model=svm", "~model.dim", "~model.num_heads", "~model.depths",
                                "~model.stem_channels", "~model.stem_depths"))  # fmt: skip
    assert result.method == "SpectralSVM"
    assert result.scores["test"].oa > 0.9


def test_random_walk_is_a_row_of_its_own(configure):
    plain, walked = train(configure("+random_walk={sharpness: 1, prior: 0.01, smoothing: 1}"))
    assert walked.method == f"{plain.method} + random walk"
    assert walked.facts["transductive"]
    assert not plain.facts["transductive"]


def test_adapters_train_on_a_frozen_base(configure):
    config = configure("regime=adapt", "pretraining.epochs=1", "trainer.max_epochs=4", "adapter.cycles.first_cycle=1")
    (result,) = train(config)
    folder = run_folder(config)
    base = load_file(folder / "model" / "model.safetensors")
    checkpoint = read_checkpoint(folder / "checkpoints" / "last.ckpt")["state_dict"]
    compared = 0
    for name, tensor in base.items():
        kept = checkpoint.get(f"model.{name}", checkpoint.get(f"model.{name.rpartition('.')[0]}.base."
                                                              f"{name.rpartition('.')[2]}"))  # fmt: skip
        if not name.startswith("head"):
            assert torch.equal(kept, tensor), name
            compared += 1
    assert compared > 20
    assert all(value == 1 for name, value in checkpoint.items() if name.endswith("strength"))
    model = LolaSpecViT.from_pretrained(folder / "model")
    load_adapter(model, folder / "adapter")
    assert result.facts["transductive"]
    assert result.facts["parameters"]["trainable"] == sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert not torch.equal(model.head.weight, base["head.weight"])

    again = configure("regime=adapt", f"base={folder / 'model'}", "trainer.max_epochs=1")
    train(again)
    assert torch.equal(load_file(run_folder(again) / "model" / "model.safetensors")["pos_embed"], base["pos_embed"])


def test_a_base_that_learned_test_labels_is_refused(configure):
    config = configure("trainer.max_epochs=1")
    train(config)
    folder = run_folder(config)
    base = f"base={folder / 'model'}"
    with pytest.raises(ConfigError, match=r"trained on the labels of \d+ pixels that are test pixels here"):
        train(configure("regime=adapt", base, "seed=1"))
    (result,) = train(configure("regime=adapt", base, "trainer.max_epochs=1"))
    assert not result.facts["transductive"]

    # pixels of equal numbers on another scene are others
    (folder / "provenance.json").write_text(json.dumps({"data": {"image.npy": "of another scene"}}))
    train(configure("regime=adapt", base, "seed=1", "trainer.max_epochs=1"))


@pytest.fixture
def configure_windows(scene, tmp_path, repository):
    """Function that composes the configuration of a short run of LESS ViT on windows, with further overrides."""

    def make(*overrides):
        with initialize_config_dir(str(repository / "configs"), version_base="1.3"):
            return compose(
                "train",
                [
                    "experiment=less_vit_indian_pines",
                    "name=own_scene",
                    f"data.card={scene}",
                    f"data.root={scene.parent}",
                    f"runs_root={tmp_path / 'runs'}",
                    "data/split=random",
                    "data.split.train=0.2",
                    "data.split.validation=0.1",
                    "data.size=4",
                    "data.stride=2",
                    "model.encoder.embed_dim=32",
                    "model.encoder.depth=1",
                    "model.encoder.num_heads=2",
                    "model.pool_heads=2",
                    "task.channel_sampling=[0.5,1]",
                    "task.learning_rate=0.01",
                    "trainer.max_epochs=6",
                    "trainer.precision=32-true",
                    "baselines=null",
                    *overrides,
                ],
            )

    return make


def test_a_network_labels_windows_and_bands_that_training_lacked(configure_windows):
    config = configure_windows("data.bands=[400,800]", "data.other_bands={long: [600, 960]}")
    own, other = train(config)
    folder = run_folder(config)
    split = Split.load(folder / "split.npz")
    scene = np.load(Path(config.data.root) / "labels.npy").astype(int) - 1
    for result, place in ((own, folder), (other, folder / "other_bands" / "long")):
        predicted = np.load(place / "prediction.npy").reshape(-1)
        right = predicted[split.test] == scene.reshape(-1)[split.test]
        assert result.scores["test"].oa == pytest.approx(right.mean())
    # stripes are easy with the bands of training
    assert own.scores["test"].oa > 0.9


def test_a_probe_trains_nothing_but_the_head_on_its_base(configure_windows):
    base = configure_windows("trainer.max_epochs=1")
    train(base)
    folder = run_folder(base) / "model"
    probed = configure_windows("trainer.max_epochs=1", "regime=probe", f"base={folder}")
    (result,) = train(probed)
    before, after = load_file(folder / "model.safetensors"), load_file(run_folder(probed) / "model/model.safetensors")
    assert before.keys() == after.keys()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    trained = {name for name in before if name.startswith(("head.", "channel_pools."))}
    assert changed == trained
    assert result.facts["parameters"]["trainable"] == sum(before[name].numel() for name in trained)
    model = LessSegmentation.from_pretrained(run_folder(probed) / "model")
    assert all(torch.equal(value, after[name]) for name, value in model.state_dict().items())


def test_an_encoder_alone_is_a_base_if_its_settings_match(configure_windows, tmp_path):
    settings = {"patch_size": 2, "embed_dim": 32, "depth": 1, "num_heads": 2, "field_radius": 60}
    encoder = LessViT(**(settings | {"channel_dim_per_head": 4, "radar": False}))
    encoder.save_pretrained(tmp_path / "run" / "encoder")
    config = configure_windows("trainer.max_epochs=1", "regime=probe", f"base={tmp_path / 'run' / 'encoder'}")
    hashes = {"stripes": "of another scene"}
    (tmp_path / "run" / "provenance.json").write_text(json.dumps({"data": hashes}))
    (result,) = train(config)
    assert not result.facts["transductive"]
    kept = load_file(run_folder(config) / "model/model.safetensors")
    for name, value in encoder.state_dict().items():
        if not name.startswith("head"):
            assert torch.equal(kept[f"encoder.{name}"], value), name

    seen = json.loads((run_folder(config) / "provenance.json").read_text())["data"]
    # its own record comes before that of a run around it
    (tmp_path / "run" / "encoder" / "provenance.json").write_text(json.dumps({"data": seen}))
    (result,) = train(config)
    assert result.facts["transductive"]

    # dropout is the fine-tuning's own matter
    # and its head is of no use
    encoder.reset_classifier(7)
    encoder.save_pretrained(tmp_path / "run" / "encoder")
    base = f"base={tmp_path / 'run' / 'encoder'}"
    train(configure_windows("trainer.max_epochs=1", "regime=probe", base, "+model.encoder.drop_rate=0.5"))
    own = LessSegmentation.from_pretrained(run_folder(config) / "model").encoder
    assert own.settings["drop_rate"] == 0.5
    assert own.blocks[0].drop.p == 0.5
    for name, value in own.state_dict().items():
        if not name.startswith("head"):
            assert torch.equal(encoder.state_dict()[name], value), name

    with pytest.raises(ConfigError, match=r"rank is 1, model\.encoder has 2; add \+\+model\.encoder\.rank=1$"):
        train(configure_windows(base, "model.encoder.rank=2"))


def weights(folder):
    return read_checkpoint(folder / "checkpoints" / "last.ckpt")["state_dict"]


@pytest.mark.parametrize("regime", ["full", "adapt"])
def test_resumed_training_ends_where_the_uninterrupted_one_does(configure, regime, monkeypatch):
    options = [f"regime={regime}", "pretraining.epochs=1", "trainer.max_epochs=4", "adapter.cycles.first_cycle=1"]
    whole = configure(*options)
    train(whole)
    whole_folder = run_folder(whole)
    expected = weights(whole_folder)

    class Stop(Exception):
        pass

    step = SceneClassification.training_step

    def stop(task, batch, index):
        if task.current_epoch == 2:
            raise Stop
        return step(task, batch, index)

    with monkeypatch.context() as patch:
        patch.setattr(SceneClassification, "training_step", stop)
        with pytest.raises(Stop):
            train(configure(*options))
    folder = run_folder(whole)
    assert not (folder / "metrics.json").exists()
    (result,) = train(configure(*options, f"ckpt_path={folder / 'checkpoints' / 'last.ckpt'}"))
    assert (folder / "metrics.json").exists()
    resumed = weights(folder)
    assert resumed.keys() == expected.keys()
    assert [name for name in expected if not torch.equal(resumed[name], expected[name])] == []
    assert result.facts["epochs"] == 4
    models = [load_file(path / "model" / "model.safetensors") for path in (folder, whole_folder)]
    assert all(torch.equal(models[0][name], models[1][name]) for name in models[1])
    assert len((folder / "history.csv").read_text().splitlines()) == 5


def test_resumed_pretraining_ends_where_the_uninterrupted_one_does(configure, monkeypatch):
    options = ["regime=adapt", "pretraining.epochs=2", "trainer.max_epochs=1", "adapter.cycles.first_cycle=1"]
    whole = configure(*options)
    train(whole)
    whole_folder = run_folder(whole)
    expected = weights(whole_folder)
    base = load_file(whole_folder / "model" / "model.safetensors")
    steps = read_checkpoint(whole_folder / "pretraining" / "last.ckpt")["global_step"] // 2
    monkeypatch.setattr(checkpoints, "SAVE_EVERY", timedelta(0))

    class Stop(Exception):
        pass

    step = MaskedPretraining.training_step
    # at the beginning of an epoch, within one, and after the last
    for stop in (steps, steps + 3, 2 * steps):

        def stopped(task, content, index, stop=stop):
            if task.global_step == stop:
                raise Stop
            return step(task, content, index)

        def at_the_end(path, rows):
            raise Stop

        with monkeypatch.context() as patch:
            patch.setattr(MaskedPretraining, "training_step", stopped)
            if stop == 2 * steps:
                patch.setattr(fitting, "write_csv", at_the_end)
            with pytest.raises(Stop):
                train(configure(*options))
        folder = run_folder(whole)
        path = folder / "pretraining" / "last.ckpt"
        assert not (folder / "model").exists()
        assert read_checkpoint(path)["global_step"] == stop
        train(configure(*options, f"ckpt_path={path}"))
        assert (folder / "metrics.json").exists()
        found = load_file(folder / "model" / "model.safetensors")
        assert [name for name in base if not torch.equal(found[name], base[name])] == []
        assert (folder / "pretraining.csv").read_text() == (whole_folder / "pretraining.csv").read_text()
        resumed = weights(folder)
        assert [name for name in expected if not torch.equal(resumed[name], expected[name])] == []


def test_checkpoints_of_pretraining_are_of_their_regime(configure):
    options = ["pretraining.epochs=1", "trainer.max_epochs=1", "adapter.cycles.first_cycle=1"]
    config = configure("regime=adapt", *options)
    train(config)
    folder = run_folder(config)
    path = folder / "pretraining" / "last.ckpt"
    for other in ([], ["regime=adapt", f"base={folder / 'model'}"]):
        with pytest.raises(CheckpointError, match=r"last\.ckpt: of the pretraining in regime=adapt without base"):
            train(configure(*other, f"ckpt_path={path}"))
    moved = path.rename(folder / "checkpoints" / "other.ckpt")
    with pytest.raises(CheckpointError, match=r"other\.ckpt: not of this task"):
        train(configure("regime=adapt", *options, f"ckpt_path={moved}"))


class Canary:
    """Writes a file when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (open, (str(self.path), "w"))


@pytest.mark.parametrize("kind", ["missing", "truncated", "text", "code", "other"])
def test_bad_checkpoints_are_refused_before_work_starts(configure, tmp_path, kind):
    path = tmp_path / "bad.ckpt"
    if kind == "truncated":
        torch.save({"state_dict": {"a": torch.zeros(1000)}}, path)
        path.write_bytes(path.read_bytes()[:2000])
    elif kind == "text":
        path.write_text("not a checkpoint")
    elif kind == "code":
        torch.save({"state_dict": Canary(tmp_path / "canary")}, path)
    elif kind == "other":
        torch.save({"state_dict": {}}, path)
    with pytest.raises(CheckpointError, match=r"bad\.ckpt") as error:
        train(configure(f"ckpt_path={path}"))
    assert "\n" not in str(error.value)
    assert not (tmp_path / "canary").exists()
    assert not (tmp_path / "runs").exists()


def test_a_checkpoint_of_another_split_is_refused(configure):
    config = configure()
    train(config)
    with pytest.raises(CheckpointError, match="another split"):
        train(configure(f"ckpt_path={run_folder(config) / 'checkpoints' / 'last.ckpt'}", "seed=5"))


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["regime=both"], "can be full, probe or adapt"),
        (["+colour=red"], "unknown key colour"),
        (["+model.dims=3"], "dims"),
        (["data.patch_size=27"], "larger than the scene"),
        (["trainer.precision=half"], "trainer.precision='half'"),
        (["regime=adapt", "base=nowhere"], "no config.json"),
        (["adapter.targets=[attn.kqv]", "regime=adapt", "pretraining.epochs=1"], r"'attn\.kqv' matches no layer"),
        (["seeds=[1,2]", "trainer.devices=2"], "one device"),
        (["trainer.accelerator=tpu"], "trainer.accelerator=tpu: PyTorch sees none"),
        (["+random_walk={sharpness: -1, prior: 0, smoothing: 1}"], "sharpness=-1"),
        (["trainer.max_epochs=0"], "trainer.max_epochs=0: give a whole number from 1 up"),
        (["pretraining.epochs=1.5"], "pretraining.epochs=1.5: give a whole number"),
        (["patience=null"], "patience=None: give a whole number"),
        (["trainer.limit_train_batches=1.5"], "trainer.limit_train_batches=1.5"),
        (["trainer.gradient_clip_val=soft"], "trainer.gradient_clip_val=soft"),
        (["baselines=svm"], "baselines=svm is not a mapping or null"),
        (["compile=often"], "compile=often is not true or false"),
        (["base=2024"], "base=2024 is not a text or null; for a name of digits write \"base='2024'\""),
        (["data.batch_size=0"], "batch_size is 0; give at least 1"),
        (["data.num_workers=-1"], "num_workers is -1; give at least 0"),
        (["data.patch_size=five"], "patch_size='five' is not a whole number"),
        (["task.mixup=soft"], "mixup='soft' is not a number"),
        (["task.learning_rate=-1"], "task.learning_rate is -1; give a number from 0 up"),
        (["model.dim=0"], "dim is 0; give at least 1"),
        (["task.label_smoothing=1"], "task.label_smoothing=1, mixup="),
        (["regime=adapt", "pretraining.task.masked_pixels=-0.1"], "masked_pixels=-0.1, masked_values=0.3: give shares"),
        (["regime=adapt", "task.weight_decay=-1"], "task.weight_decay is -1; give a number from 0 up"),
        (["regime=adapt", "adapter.targets=qkv"], "adapter: targets is 'qkv', which is not a list"),
        (["regime=adapt", "adapter.cycles.growth=0"], "adapter.cycles: first_cycle=10.0, growth=0"),
        (["regime=adapt", "adapter.learning_rate=nan"], "adapter.learning_rate is nan"),
        (["regime=adapt", "adapter.samples=0"], "adapter.samples is 0"),
    ],
)
def test_wrong_options(configure, overrides, message, monkeypatch):
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: False)
    # nothing is trained before what is wrong is told
    monkeypatch.delattr(L.Trainer, "fit")
    with pytest.raises(VisionLowRankError, match=message):
        train(configure(*overrides))


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["+model.dims=3"], "dims"),
        (["base=nowhere"], "no config.json"),
        (["regime=probe", "adapter.train=[tail]"], "tail"),
        (["+task.rate=3"], "no argument 'rate'"),
        (["+trainer.epochs=3"], "epochs"),
    ],
)
def test_what_a_network_does_not_fit_is_told_before_baselines(configure, overrides, message, monkeypatch):
    monkeypatch.setattr(scene_run, "fit_baseline", lambda *_: pytest.fail("a baseline was fitted"))
    config = configure(*overrides, baselines=True)
    with pytest.raises(VisionLowRankError, match=message):
        train(config)
    assert not Path(config.runs_root).exists()


def test_error_of_the_command_is_one_line(scene, tmp_path, repository):
    command = [sys.executable, "train.py", "experiment=own_scene", f"data.card={scene}", "data.root=nowhere"]
    done = subprocess.run(command, cwd=repository, capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr.startswith("error: scene stripes: 2 files not found")
    assert done.stderr.count("\n") == 1


EXPERIMENTS = sorted(path.stem for path in (REPOSITORY / "configs/experiment").iterdir())


@pytest.mark.parametrize("experiment", [name for name in EXPERIMENTS if not name.startswith(("hyper_mae", "sprites"))])
@pytest.mark.parametrize("split", ["random", "blocks", "from_file"])
def test_every_experiment_composes_with_every_split(repository, experiment, split):
    with initialize_config_dir(str(repository / "configs"), version_base="1.3"):
        config = compose("train", [f"experiment={experiment}", f"data/split={split}"])
    assert config.data.split.kind == split
    if experiment not in ("own_scene", "indian_pines_blocks", "less_vit_indian_pines", "adapter_comparison"):
        assert config.data.card == config.name == load_card(experiment).name


@pytest.mark.slow
def test_two_processes_classify_as_well_as_one(scene, tmp_path, repository):
    options = [
        "experiment=own_scene", f"data.card={scene}", f"data.root={scene.parent}", f"runs_root={tmp_path}",
        "data.patch_size=5", "data.components=4", "baselines=null", "trainer.max_epochs=10",
        "data.split.train=0.2", "data.split.validation=0.1",
    ]  # fmt: skip
    command = [sys.executable, "train.py", *options, "trainer=ddp", "trainer.accelerator=cpu"]
    subprocess.run(command, cwd=repository, check=True)
    (folder,) = (tmp_path / "own_scene").iterdir()
    assert read_result(folder).scores["test"].oa > 0.9


@pytest.mark.parametrize("seeds", ["[]", "3", "[a]", "[0.5]", "[-1]", "[1,1]"])
def test_seeds_that_are_no_list_of_different_numbers_are_refused(configure, seeds):
    with pytest.raises(ConfigError, match=r"seeds=.*: (give a list|the same seed gives the same again)"):
        train(configure(f"seeds={seeds}"))
