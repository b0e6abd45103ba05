"""Wrong values of each benchmark's options: refused before work starts, with their key."""

import math

import pytest
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

from vision_lowrank.errors import VisionLowRankError
from vision_lowrank.evaluate import run

COMMON = [
    ("seed", "abc", "seed=abc: give a whole number from 0 up"),
    ("seed", -1, "seed=-1: give a whole number from 0 up"),
    ("device", None, "device=None is not a text"),
    ("devices", 0, "devices=0: give a whole number from 1 up"),
    ("resume", 3, "resume=3 is not a text or null"),
    ("runs_root", ["a"], r"runs_root=\['a'\] is not a text"),
    ("benchmark.kind", "abc", r"benchmark\.kind=abc: it can be composition, few_labels, raster"),
]
OF_ONE = {
    "composition": [
        ("benchmark.world", 3, "world is 3, which is not a text"),
        ("benchmark.scenes", "abc", "scenes is 'abc', which is not a mapping"),
        ("benchmark.scenes", {"two": 18}, r"scenes is \{'two': 18\}, which is not a mapping by whole numbers"),
        ("benchmark.scenes", {2: 0}, r"benchmark\.scenes is .*give a number of scenes"),
        ("benchmark.scenes", {1: 2}, "no smallest and largest size of boxes for scenes of 1 concepts"),
        ("benchmark.sizes", {2: [28], 3: [26, 30], 4: [24, 28]}, "size of boxes for scenes of 2 concepts"),
        ("benchmark.gap", -1, r"benchmark\.gap=-1"),
        ("benchmark.gap", 40, "sprites of 28 to 36 pixels, 40 apart"),
        ("benchmark.sheet_scenes", 0, r"benchmark\.sheet_scenes=0"),
        ("benchmark.image_seeds", "abc", "image_seeds is 'abc', which is not a list"),
        ("benchmark.image_seeds", [0, 0], "the same seed gives the same again"),
        ("benchmark.steps", 0, "benchmark: steps=0: give a whole number"),
        ("benchmark.guidance_scale", math.nan, "benchmark: guidance_scale=nan: give a finite number"),
        ("benchmark.variants", {}, r"benchmark\.variants is empty"),
        ("benchmark.variants.LoRA_Switch", {}, "names that differ by more than spaces"),
        ("benchmark.variants", {"../up": {}}, "'../up' is no name of a folder"),
        ("benchmark.variants.merge.weight", 1, "unknown key variants.merge.weight; keys: method, settings"),
        ("benchmark.sheet_rows", 3, "unknown key sheet_rows, did you mean sheet"),
    ],
    "mini": [
        ("tasks", "eurosat", r"tasks=eurosat: give a list of cards, such as \[eurosat\]"),
        ("tasks", None, "tasks=None: give a list of cards"),
        ("tasks", [], "tasks is empty"),
        ("tasks", [1], r"tasks=\[1\]: give a list of cards"),
        ("tasks.segmentation", "abc", r"tasks\.segmentation is abc; give what makes the task"),
        ("benchmark.root", 3, "root is 3, which is not a text"),
        ("weights", 3, "weights=3 is not a text or null"),
        ("benchmark.split", "tiles", "split is 'tiles'; it can be published or grouped or blocks"),
        ("benchmark.sensors", ["lidar"], r"sensors=\['lidar'\]: give optical or radar, or both"),
        ("benchmark.encoders.less_vit.model.embed_dim", "wide", "embed_dim='wide' is not a whole number"),
        ("benchmark.encoders.less_vit.weights", "nowhere", "nowhere"),
        ("benchmark.seeds", "abc", "seeds is 'abc', which is not a list"),
        ("benchmark.seeds", [-1], "give a list of whole numbers from 0 up"),
        ("benchmark.num_workers", -1, r"benchmark\.num_workers is -1"),
        ("benchmark.fractions", [0], r"benchmark\.fractions=\[0\.0\]: give shares above 0"),
        ("benchmark.bands", 400, "bands is 400, which is not a mapping with the keys train, test"),
        ("benchmark.bands", {"train": [1000, 400], "test": []}, r"\[1000\.0, 400\.0\]; give nanometres from and to"),
        ("benchmark.encoders", ["less"], r"encoders is \['less'\], which is not a mapping"),
        ("benchmark.protocols", {"knn": None}, "benchmark.protocols and benchmark.seeds need at least one"),
        ("benchmark.encoders", None, "no encoder to measure"),
        ("benchmark.protocols", "knn", "protocols is 'knn', which is not a mapping"),
        ("benchmark.protocols.knn.neighbours", [0], r"protocols\.knn\.neighbours is 0; give at least 1"),
        ("benchmark.protocols.knn.neighbours", [], r"protocols\.knn\.neighbours is empty"),
        ("benchmark.protocols.linear.learning_rates", [math.nan], r"\[nan\]; give at least one, all above 0"),
        ("benchmark.protocols.linear.epochs", 0, "epochs is 0; give at least 1"),
        (
            "benchmark.protocols.finetune.batch_size",
            1.5,
            r"protocols\.finetune\.batch_size is 1\.5, which is not a whole",
        ),
        ("benchmark.protocols.adapter.rank", 0, r"protocols\.adapter\.rank is 0"),
        ("benchmark.protocols.adapter.targets", [], "targets is empty"),
        ("benchmark.protocols.adapter.ranks", [1], "unknown key protocols.adapter.ranks, did you mean rank"),
    ],
}


def _named(benchmark):
    return [
        pytest.param(benchmark, *case, id=f"{benchmark}-{case[0]}={case[1]}") for case in [*COMMON, *OF_ONE[benchmark]]
    ]


@pytest.mark.parametrize(("benchmark", "key", "value", "message"), [*_named("composition"), *_named("mini")])
def test_wrong_values_are_refused_before_work(tmp_path, repository, monkeypatch, benchmark, key, value, message):
    # nothing that takes time, should a value pass
    monkeypatch.setattr("vision_lowrank.raster_benchmark.Tasks", lambda *args: pytest.fail("work has started"))
    monkeypatch.setattr("vision_lowrank.composition_benchmark.load_base", lambda *args, **options: None)
    monkeypatch.setattr("vision_lowrank.composition_benchmark.load_classifier", lambda folder: None)
    folder = tmp_path / "runs"
    with initialize_config_dir(str(repository / "configs"), version_base="1.3"):
        config = compose("evaluate", [f"benchmark={benchmark}", f"runs_root={folder}"])
    OmegaConf.update(config, key, value, merge=False, force_add=True)
    with pytest.raises(VisionLowRankError, match=message):
        run(config)
    assert not folder.exists()
