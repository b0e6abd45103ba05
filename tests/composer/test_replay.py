"""The original code's stored numbers, reproduced from their inputs."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from vision_lowrank.composer import losses, official
from vision_lowrank.composer.lora_files import LowRank
from vision_lowrank.composer.official import replay
from vision_lowrank.errors import CheckpointError

# of these the original's float32 run is further from its float64 run than the legend's tolerances
NOISY = {
    "a": {f"iter0_grad_{name}" for name in ("total", "L_ce", "L_fill", "L_region")}
    | {"iter2_grad_total", "iter2_noise_pred"},
    "b": set(),
}
INPUTS = {"latents_initial", "embeds_global", "embeds_region0", "embeds_region1"}


def tolerance(name, absmax):
    """What the fixtures' legend grants; `iter` tensors other than gradients as latents."""
    if name.startswith(("plain", "noregion")):
        return 1e-5
    if name.startswith(("region_noise", "reinit_pass")):
        return 3e-5
    if "_map" in name or name == "smoothing_kernel":
        return 2e-6
    if "grad" in name:
        return absmax * (2e-5 if name.startswith("iter0") else 3e-4)
    return absmax * 2e-4


@pytest.fixture(scope="module", params=["a", "b"])
def case(request):
    return request.param


@pytest.fixture(scope="module")
def replayed(case, repository):
    folder = repository.parent / "shared" / "golden" / "composer"
    if not folder.exists():
        pytest.skip("../shared/golden/composer is not beside this checkout")
    return folder, replay(folder, case)


def merged_in_float32(weight, change):
    """The factors of float32(weight + up @ down) - weight; products are summed as processors do, rounded once each."""
    total = torch.zeros_like(weight, dtype=torch.float32)
    for up, down in zip(change.up.T, change.down, strict=True):
        total = (total.double() + torch.outer(change.scale * up, down)).float()
    merged = weight.float() + total
    return LowRank(torch.eye(weight.shape[1], dtype=torch.float64), merged.double() - weight, 1.0)


def centre_weight_in_float32(height, width):
    y, x = torch.meshgrid(torch.linspace(-1, 1, height), torch.linspace(-1, 1, width), indexing="ij")
    weight = torch.exp((-(x**2 + y**2) / 2).double()).float()
    return weight / weight.max()


@pytest.fixture(scope="module")
def exact(replayed, case):
    """The same in float64, but for what the original keeps in float32 there too: merged weights, kernel, bell."""
    folder, _ = replayed
    build, read = official._unet, official._loras
    weights = doubled(folder / "unet.safetensors")
    kernel = doubled(folder / f"case_{case}.safetensors")["smoothing_kernel"]

    def merged(*parts):
        return {
            concept: {name: merged_in_float32(weights[f"{name}.weight"], change) for name, change in lora.items()}
            for concept, lora in read(*parts).items()
        }

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(official, "load_file", doubled)
        patch.setattr(official, "_unet", lambda *parts: build(*parts).double())
        patch.setattr(official, "_loras", merged)
        patch.setattr(losses, "smoothing_kernel", lambda width: kernel)
        patch.setattr(losses, "centre_weight", centre_weight_in_float32)
        return replay(folder, case)


def doubled(path):
    return {name: value.double() if value.is_floating_point() else value for name, value in load_file(path).items()}


@pytest.fixture(scope="module")
def rounding(replayed, case):
    """What the original's own float32 run is off its float64 run, and the largest value of that one."""
    facts = json.loads((replayed[0] / f"case_{case}.json").read_text())
    return facts["fp32_vs_fp64_same_official_code"]


def test_tensors_agree_with_the_original(replayed, exact, case, rounding):
    folder, found = replayed
    stored = load_file(folder / f"case_{case}.safetensors")
    assert stored.keys() - INPUTS <= found.keys()
    errors = {name: float((found[name] - stored[name]).abs().max()) for name in stored.keys() - INPUTS}
    shapes = {name: found[name].shape == stored[name].shape for name in errors}
    assert all(shapes.values()), shapes
    bounds = {name: tolerance(name, float(stored[name].abs().max())) for name in errors}
    noisy = {name for name in errors if rounding[name]["max_abs_err"] > bounds[name]}
    assert noisy == NOISY[case]
    for name in noisy:
        # no further from what lies between the original's two runs; that these are its runs, the next test tells
        value, ends = found[name].double(), torch.stack([exact[name], stored[name].double()])
        errors[name] = float((value - value.clamp(ends.amin(0), ends.amax(0))).abs().max())
    assert not {name: error for name, error in errors.items() if not error <= bounds[name]}


def test_float64_tensors_are_those_of_the_original(replayed, exact, case, rounding):
    stored = load_file(replayed[0] / f"case_{case}.safetensors")
    for name in stored.keys() - INPUTS - {"smoothing_kernel"}:
        largest, error = float(exact[name].abs().max()), float((exact[name] - stored[name]).abs().max())
        # the first step of the scheduler, whose constants are float32, ends exactness
        later = name.startswith(("iter1", "iter2")) or name == "iter0_latents_out"
        assert largest == pytest.approx(rounding[name]["absmax"], rel=1e-5 if later else 1e-11, abs=0), name
        assert error == pytest.approx(rounding[name]["max_abs_err"], rel=0.05 if later else 1e-6, abs=0), name


def test_float64_losses_are_those_of_the_original(replayed, exact, case):
    facts = json.loads((replayed[0] / f"case_{case}.json").read_text())
    compared = 0
    for index, iteration in enumerate(facts["iterations_fp64"]):
        for name, value in iteration.items():
            if name == "total" or name.startswith("L_"):
                expected, rtol = torch.tensor(value, dtype=torch.float64), 1e-6 if index else 1e-12
                torch.testing.assert_close(exact[f"iter{index}_{name}"], expected, rtol=rtol, atol=0)
                compared += 1
    assert compared == 3 * 8


def test_losses_agree_with_the_original(replayed, case):
    folder, found = replayed
    compared = 0
    for index, iteration in enumerate(json.loads((folder / f"case_{case}.json").read_text())["iterations"]):
        for name, value in iteration.items():
            if name == "total" or name.startswith("L_"):
                torch.testing.assert_close(found[f"iter{index}_{name}"], torch.tensor(value), rtol=1e-5, atol=1e-6)
                compared += 1
    assert compared == 3 * 8


@pytest.fixture
def small(shared_path, tmp_path):
    """Makes case q of case b: maps of 4 x 6 cells of the same UNet and texts, other boxes, concepts 1 and 2."""
    folder = tmp_path / "fixture"
    shutil.copytree(shared_path("golden", "composer"), folder, copy_function=shutil.copyfile)
    tensors = load_file(folder / "case_b.safetensors")
    facts = json.loads((folder / "case_b.json").read_text())
    loras = load_file(folder / "lora_b.safetensors")
    kept = {name: tensor for name, tensor in tensors.items() if name.startswith("embeds_")}
    kept["latents_initial"] = tensors["latents_initial"][:, :, :16, :24].contiguous()
    save_file(kept, folder / "case_q.safetensors")
    renamed = {name.replace("concept1", "concept2").replace("concept0", "concept1"): t for name, t in loras.items()}
    save_file(renamed, folder / "lora_q.safetensors")

    def make(boxes, iterations):
        changes = {"boxes_fraction": boxes, "iterations_run": iterations, "region_to_concept": [2, 1]}
        (folder / "case_q.json").write_text(json.dumps(facts | changes))
        return replay(folder, "q")

    return make


def test_boxes_too_small_for_the_strongest_positions_have_zeros(small):
    # 2 x 1 and 1 x 2 cells of the maps of 4 x 6, of which the share that counts is no whole cell
    found = small([[0.0, 0.0, 0.5, 0.17], [0.5, 0.5, 0.75, 0.84]], 1)
    for name, count in (("L_ce_terms", 4), ("L_region_terms", 2)):
        assert found[f"iter0_{name}"].tolist() == [0.0] * count
    assert not found["iter0_grad_L_ce"].any()
    assert not found["iter0_grad_L_region"].any()
    assert found["iter0_grad_total"].any()
    assert torch.equal(found["iter0_grad_total"], found["iter0_grad_L_fill"])
    assert found["iter0_total"] == found["iter0_L_fill"]


def test_refinement_stops_for_good_when_the_loss_grows(small):
    found = small([[0.0, 0.0, 1.0, 0.5], [0.0, 0.5, 1.0, 1.0]], 28)
    totals = [found[f"iter{index}_total"].item() for index in range(int(found["refinements_done"]))]
    assert 6 <= len(totals) <= 26
    assert len(totals) == 26 or totals[-1] > totals[-2]
    assert all(totals[index] <= totals[index - 1] for index in range(5, len(totals) - 1))
    after = f"iter{len(totals)}"
    assert f"{after}_grad_total" not in found
    assert torch.equal(found[f"{after}_latents_in"], found[f"iter{len(totals) - 1}_latents_out"])
    assert found["iter27_latents_out"].isfinite().all()


def test_a_folder_that_lacks_a_case_is_named(tmp_path):
    with pytest.raises(CheckpointError, match="case q cannot be read"):
        replay(tmp_path, "q")


def test_a_case_without_boxes_is_named(shared_path, tmp_path):
    folder = tmp_path / "fixture"
    shutil.copytree(shared_path("golden", "composer"), folder)
    facts = json.loads((folder / "case_b.json").read_text())
    del facts["boxes_fraction"]
    path = folder / "case_b.json"
    path.chmod(0o644)
    path.write_text(json.dumps(facts))
    with pytest.raises(CheckpointError, match="boxes_fraction"):
        replay(folder, "b")
