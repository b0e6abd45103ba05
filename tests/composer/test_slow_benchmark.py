"""The benchmark's slow reference agrees with the composer, and the benchmark writes its tables."""

import math
import re

import pytest
import torch
from diffusers import UNet2DConditionModel

from benchmarks import composer
from benchmarks.slow_composer import MASKED, cells, centre_weight, check, compare, penalties, smooth
from vision_lowrank.composer.layout import Box, Region, Scene, Text
from vision_lowrank.composer.lora_files import LowRank

WIDTH, TOKENS = 8, 6


def build_unet(seed=0):
    torch.manual_seed(seed)
    unet = UNet2DConditionModel(
        block_out_channels=(8, 8, 16, 16),
        layers_per_block=1,
        norm_num_groups=4,
        cross_attention_dim=WIDTH,
        attention_head_dim=2,
    )
    with torch.no_grad():
        for name, parameter in unet.named_parameters():
            # attention that has preferences, else all maps are flat; at 5, rounding grows ten-thousandfold in gradients
            if "to_q" in name or "to_k" in name:
                parameter.mul_(3)
    return unet.double().eval()


def build_scene(unet):
    generator = torch.Generator().manual_seed(3)

    def draw(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    def lora():
        ends = ("attn2.to_k", "attn2.to_v", "attn2.to_out.0")
        shapes = {name: module.weight.shape for name, module in unet.named_modules() if name.endswith(ends)}
        return {name: LowRank(draw(2, width), 0.3 * draw(out, 2), 0.7) for name, (out, width) in shapes.items()}

    texts = [Text(*draw(2, 1, TOKENS, WIDTH)) for _ in range(3)]
    loras = [[(lora(), 1.0)], [(lora(), 0.5), (lora(), 1.0)]]
    # on maps of 6 x 8 they share 2 x 2 positions
    boxes = [Box(0, 0, 0.7, 0.5), Box(0.4, 0.25, 1, 0.9)]
    tokens = [(1, 2), (4,)]
    return Scene(texts[0], [Region(*parts) for parts in zip(boxes, texts[1:], tokens, loras, strict=True)])


@pytest.fixture(scope="module")
def case():
    unet = build_unet()
    latents = torch.randn(1, 4, 24, 32, generator=torch.Generator().manual_seed(7), dtype=torch.float64)
    return unet, build_scene(unet), latents, torch.tensor(700)


def test_slow_reference_agrees_with_the_composer(case):
    unet, scene, latents, timestep = case
    before = dict(unet.attn_processors)
    found = compare(unet, build_unet(), scene, latents, timestep)
    kinds = ["prediction", "gradient", "enhancement", "fill_x", "fill_y", "region", "map 0", "map 1"]
    assert list(found) == kinds
    assert unet.attn_processors == before
    for name, (ours, slow) in found.items():
        assert ours.shape == slow.shape, name
        assert slow.abs().max() > 0, name
        torch.testing.assert_close(ours, slow, rtol=1e-9, atol=1e-12, msg=lambda text, name=name: f"{name}: {text}")


def test_check_refuses_what_differs(case):
    unet, scene, latents, timestep = case
    other = build_unet()
    check(unet, other, scene, latents, timestep, 1e-9)
    with torch.no_grad():
        # the last projection changes the prediction, and no map
        other.up_blocks[3].attentions[1].transformer_blocks[0].attn2.to_out[0].bias += 0.01
    with pytest.raises(AssertionError, match="prediction"):
        check(unet, other, scene, latents, timestep, 1e-4)


def test_slow_gradient_is_the_slope_of_the_slow_loss(case):
    _, scene, latents, timestep = case
    slow = composer.SlowComposer(build_unet(), scene)
    direction = torch.randn(latents.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    total = [sum(slow.guide(latents + step * direction, timestep)[0].values()) for step in (-1e-6, 1e-6)]
    slope = (slow.guide(latents, timestep)[1] * direction).sum()
    torch.testing.assert_close((total[1] - total[0]) / 2e-6, slope, rtol=1e-4, atol=0)


def test_parts_of_the_slow_reference():
    assert cells(Box(0, 0.26, 0.5, 0.74), (4, 8)) == (0, 2, 2, 6)
    # smaller than a cell: the one in which its middle lies
    assert cells(Box(0.3, 0.3, 0.4, 0.4), (4, 4)) == (1, 1, 2, 2)
    # background, both boxes, first, second
    masks = torch.tensor([[False, True, True, False], [False, True, False, True]])
    expected = torch.zeros(4, 4)
    expected[2, 3] = expected[3, 2] = MASKED
    assert torch.equal(penalties(masks), expected)
    mask = torch.zeros(4, 5, dtype=torch.bool)
    mask[1:4, 1:3] = True
    # u is -1, 0, 1 and v -1, 1, so the largest value is exp(-1/2)
    line = torch.tensor([math.exp(-0.5), 1, math.exp(-0.5)], dtype=torch.float64)
    expected = torch.zeros(4, 5, dtype=torch.float64)
    expected[1:4, 1:3] = line[:, None]
    torch.testing.assert_close(centre_weight(mask), expected)
    image = torch.zeros(5, 5, dtype=torch.float64)
    image[2, 2] = 1
    side = math.exp(-1)
    torch.testing.assert_close(smooth(image)[2, 1:3].tolist(), [side / (1 + 2 * side) ** 2, 1 / (1 + 2 * side) ** 2])


@pytest.mark.parametrize("count", [2, 4, 8])
def test_boxes_have_the_same_area_for_any_number(count):
    found = composer.boxes(count)
    assert len(set(found)) == count
    area = sum((box.bottom - box.top) * (box.right - box.left) for box in found)
    assert area == pytest.approx(composer.SIDE**2)
    masks = torch.zeros(64, 64, dtype=torch.long)
    for box in found:
        top, left, bottom, right = cells(box, (64, 64))
        masks[top:bottom, left:right] += 1
    assert masks.max() == 1


def test_seconds_of_an_image_are_those_of_its_passes():
    times = {"plain denoising": 10.0, "ours denoising": 12.0, "ours guidance": 20.0, "ours layout": 5.0}
    times |= {"ours once": 7.0, "slow denoising": 50.0, "slow guidance": 70.0, "slow layout": 30.0}
    found = composer.of_image(times, 26)
    assert found == pytest.approx({"plain": 0.5, "ours": 0.6 + 0.52 + 0.005 + 0.007, "slow": 2.5 + 1.82 + 0.03})
    # the original optimises in at least 6 and at most 26 steps
    assert composer.guidance_passes() == (26, 6)


def test_quick_run_fills_every_cell(tmp_path, monkeypatch):
    path = tmp_path / "benchmarks.md"
    monkeypatch.setattr("sys.argv", ["composer", "--quick", "--output", str(path)])
    composer.main()
    text = path.read_text()
    assert text.startswith("# LoRA-Composer")
    tables = re.findall(r"(?:^\|.*\|\n)+", text, re.MULTILINE)
    assert len(tables) == 4
    for found in tables:
        columns, _, *rows = ([cell.strip() for cell in line.strip("|\n").split("|")] for line in found.splitlines())
        assert rows
        for row in rows:
            assert len(row) == len(columns)
            # the first names the row, and of the bounds also the last
            numbers = row[1:-1] if columns[-1] == "bound" else row[1:]
            assert all(math.isfinite(float(cell)) for cell in numbers), row
    keys = dict(zip(*([cell.strip() for cell in line.split("|")] for line in tables[3].splitlines()[::2]), strict=True))
    # 16 layers of 32 features, two rows, keys and values of two concepts in float32
    assert float(keys["K, V of the concepts"]) == round(16 * 32 * 77 * 2 * 2 * 2 * 4 / 1e6)
