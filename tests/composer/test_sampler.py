"""The sampler against a slow one written from the formulas, and what must not change a composition.

The slow one merges weights, recomputes every prompt in every layer and step, sees the whole image for every region,
masks by a dense matrix filled in loops, and runs the whole UNet for its gradients.
"""

import copy
import functools
import math
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from composer_zoo import TOKENS, WIDTH, build_unet, lora, noise, scene
from diffusers import (
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    DPMSolverSinglestepScheduler,
    EulerDiscreteScheduler,
    HeunDiscreteScheduler,
    KDPM2DiscreteScheduler,
    LMSDiscreteScheduler,
    PNDMScheduler,
    SASolverScheduler,
    UniPCMultistepScheduler,
)

from vision_lowrank.composer import sampler
from vision_lowrank.composer.attention import Maps
from vision_lowrank.composer.losses import CONSTANTS, Constants
from vision_lowrank.composer.sampler import Settings, _change, compose, goes_on, reinitialise
from vision_lowrank.errors import ConfigError

LAYERS = [
    "down_blocks.0.attentions.0.transformer_blocks.0.attn2",
    "down_blocks.1.attentions.0.transformer_blocks.0.attn2",
    "mid_block.attentions.0.transformer_blocks.0.attn2",
    "up_blocks.0.attentions.0.transformer_blocks.0.attn2",
    "up_blocks.0.attentions.1.transformer_blocks.0.attn2",
    "up_blocks.1.attentions.0.transformer_blocks.0.attn2",
    "up_blocks.1.attentions.1.transformer_blocks.0.attn2",
]
# factor 2: the second of two levels, without the middle block
MAP_LAYERS = [LAYERS[1], LAYERS[3], LAYERS[4]]
MAP_SIZE = (6, 8)


@pytest.fixture(scope="module")
def unet():
    return build_unet()


# the slow method


def changed(weight, loras, name):
    for changes, strength in loras:
        if name in changes:
            change = changes[name]
            delta = strength * change.scale * change.up @ change.down
            weight = weight + delta.reshape(weight.shape)
    return weight


def slow_cells(box, height, width, policy):
    if policy == "inner":
        cells = [math.ceil(box.top * height), math.ceil(box.left * width)]
        cells += [math.floor(box.bottom * height), math.floor(box.right * width)]
    else:
        cells = [
            min(range(size + 1), key=lambda border, edge=edge, size=size: abs(border - edge * size))
            for edge, size in ((box.top, height), (box.left, width), (box.bottom, height), (box.right, width))
        ]
    return cells if cells[2] > cells[0] and cells[3] > cells[1] else None


def slow_masks(boxes, size, policy):
    masks = torch.zeros(len(boxes), *size, dtype=torch.bool)
    for mask, box in zip(masks, boxes, strict=True):
        cells = slow_cells(box, *size, policy)
        if cells:
            mask[cells[0] : cells[2], cells[1] : cells[3]] = True
    return masks


def penalties(flat, overlaps):
    owners = (frozenset(index for index, inside in enumerate(column) if inside) for column in flat.T.tolist())
    return penalties_of(tuple(owners), overlaps)


@functools.cache
def penalties_of(owners, overlaps):
    def penalty(of_query, of_key):
        if overlaps == "official":
            return -1e6 * sum(one != other for one in of_query for other in of_key)
        return -1e6 if of_query and of_key and not of_query & of_key else 0.0

    return torch.tensor([[penalty(query, key) for key in owners] for query in owners], dtype=torch.float64)


class SlowNorm(torch.nn.Module):
    def __init__(self, norm, boxes, settings):
        super().__init__()
        self.norm, self.boxes, self.settings = norm, boxes, settings

    def forward(self, x):
        grouped = x.flatten(2).unflatten(1, (self.norm.num_groups, -1))
        flat = slow_masks(self.boxes, x.shape[2:], self.settings.cells).flatten(1)
        table, normed = penalties(flat, self.settings.overlaps), torch.zeros_like(grouped)
        for row in table.unique(dim=0):
            seen = grouped[..., row == row.max()]
            mean, variance = seen.mean((2, 3), keepdim=True), seen.var((2, 3), correction=0, keepdim=True)
            here = (table == row).all(1)
            normed = torch.where(here, (grouped - mean) / (variance + self.norm.eps).sqrt(), normed)
        normed = normed.flatten(1, 2).unflatten(2, x.shape[2:])
        return normed * self.norm.weight[:, None, None] + self.norm.bias[:, None, None]


class SlowAttention:
    def __init__(self, name, base, scene, settings, log):
        self.name, self.base, self.scene, self.settings, self.log = name, base, scene, settings, log

    def __call__(self, attn, hidden_states, encoder_hidden_states=None, attention_mask=None):
        positions = hidden_states.shape[1]
        halves = {12 * 16: (12, 16), 6 * 8: (6, 8)}
        masks = slow_masks([region.box for region in self.scene.regions], halves[positions], self.settings.cells)
        flat = masks.flatten(1)
        query = self.heads(attn.to_q(hidden_states), attn)
        if self.name.endswith("attn1"):
            key, value = (self.heads(layer(hidden_states), attn) for layer in (attn.to_k, attn.to_v))
            scores = query @ key.transpose(-1, -2) / math.sqrt(query.shape[-1])
            if self.settings.self_mask:
                scores = scores + penalties(flat, self.settings.overlaps)
            probabilities = scores.softmax(-1)
            self.log.setdefault(self.name, probabilities[-1:].mean(1))
            return self.project(probabilities @ value, attn.to_out[0].weight, attn.to_out[0].bias)
        out, _ = self.prompted(query, self.scene.text, attn.to_k.weight, attn.to_v.weight, attn.to_out[0].weight, attn)
        base = self.base.get_submodule(self.name)
        total, count = torch.zeros_like(out), flat.sum(0)
        for index, region in enumerate(self.scene.regions):
            weights = [
                changed(module.weight, region.loras, f"{self.name}.{layer}")
                for layer, module in (("to_k", base.to_k), ("to_v", base.to_v), ("to_out.0", base.to_out[0]))
            ]
            own, probabilities = self.prompted(query, region.text, *weights, attn)
            self.log.setdefault(f"{self.name}/{index}", probabilities[-1:].mean(1))
            total = total + own * flat[index][:, None]
        if not self.settings.injection:
            return out
        return torch.where((count > 0)[:, None], total / count.clamp(min=1)[:, None], out)

    def prompted(self, query, prompt, to_k, to_v, to_out, attn):
        index = LAYERS.index(self.name) if len(prompt.positive) > 1 else 0
        states = torch.stack([prompt.negative[index], prompt.positive[index]])[-len(query) :]
        key, value = (self.heads(states @ weight.T, attn) for weight in (to_k, to_v))
        probabilities = (query @ key.transpose(-1, -2) / math.sqrt(query.shape[-1])).softmax(-1)
        return self.project(probabilities @ value, to_out, attn.to_out[0].bias), probabilities

    @staticmethod
    def heads(x, attn):
        return x.reshape(*x.shape[:2], attn.heads, -1).permute(0, 2, 1, 3)

    @staticmethod
    def project(x, weight, bias):
        return x.permute(0, 2, 1, 3).flatten(2) @ weight.T + bias


def slow_total(log, scene, settings):
    constants = settings.constants
    height, width = MAP_SIZE
    masks = slow_masks([region.box for region in scene.regions], MAP_SIZE, settings.cells)
    own = sum(log[name.replace("attn2", "attn1")] for name in MAP_LAYERS)[0] / len(MAP_LAYERS)
    total = torch.zeros((), dtype=torch.float64)
    axis = torch.tensor([math.exp(-1), 1.0, math.exp(-1)], dtype=torch.float64)
    kernel = torch.outer(axis, axis) / axis.sum() ** 2
    for index, region in enumerate(scene.regions):
        mask = masks[index]
        area = int(mask.sum())
        if not area:
            continue
        rows, columns = mask.any(1).nonzero().flatten(), mask.any(0).nonzero().flatten()
        u, v = (
            torch.linspace(-1, 1, len(found), dtype=torch.float64) if len(found) > 1 else torch.zeros(1)
            for found in (rows, columns)
        )
        bell = torch.exp(-(u[:, None] ** 2 + v**2) / 2)
        centre = torch.zeros(MAP_SIZE, dtype=torch.float64)
        centre[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1] = bell / bell.max()
        cross = sum(log[f"{name}/{index}"] for name in MAP_LAYERS)[0] / len(MAP_LAYERS)
        count = max(int(area * constants.top), constants.least)
        for token in region.tokens:
            padded = F.pad(cross[:, token].reshape(1, 1, *MAP_SIZE), (1, 1, 1, 1), mode="reflect")
            attention = F.conv2d(padded, kernel[None, None])[0, 0] * mask
            strongest = (attention * centre).flatten().sort(descending=True).values[:count].mean()
            if settings.enhancement:
                total = total + constants.enhancement * (1 - strongest).clamp(min=0)
            missing_x = (attention.max(0).values - mask.any(0).double()).abs().sum()
            missing_y = (attention.max(1).values - mask.any(1).double()).abs().sum()
            if settings.fill and constants.fill_mean == "joint":
                total = total + constants.fill * (missing_x + missing_y) / (height + width)
            elif settings.fill:
                total = total + constants.fill * (missing_x / width + missing_y / height)
        flat = mask.flatten()
        leaving = own[flat][:, ~flat].flatten()
        if settings.region:
            total = total + constants.region * leaving.sort(descending=True).values[:count].mean()
    return total


def slow_windows(latents, log, scene, settings, standard):
    """Lays the latents out anew; a position of the maps is 2 by 2 latents."""
    out, patches = latents.clone(), {}
    for index, region in enumerate(scene.regions):
        cells = slow_cells(region.box, *MAP_SIZE, settings.cells)
        if not cells:
            continue
        tall, wide = cells[2] - cells[0], cells[3] - cells[1]
        cross = sum(log[f"{name}/{index}"] for name in MAP_LAYERS)[0]
        score = cross[:, list(region.tokens)].sum(1).reshape(MAP_SIZE)
        places = [(row, column) for row in range(7 - tall) for column in range(9 - wide)]
        row, column = max(places, key=lambda p: float(score[p[0] : p[0] + tall, p[1] : p[1] + wide].sum()))
        for y in range(2 * tall):
            for x in range(2 * wide):
                to = (2 * cells[0] + y, 2 * cells[1] + x)
                patches.setdefault(to, []).append((2 * row + y, 2 * column + x))
    for (y, x), found in patches.items():
        # of the original the last one; else each latent that comes here, once, in the order of regions
        sources = list(dict.fromkeys(found)) if settings.overlaps == "own" else found[-1:]
        out[:, :, y, x] = sum(latents[:, :, *source] for source in sources) / math.sqrt(len(sources))
    mean, deviation = (0, standard) if settings.constants.moments == "normal" else (latents.mean(), latents.std())
    return (out - out.mean()) / out.std() * deviation + mean


def slow_compose(base, scheduler, scene, start, steps, guidance_scale, settings):
    """Composes one image; returns its latents and the losses."""
    unet = copy.deepcopy(base)
    with torch.no_grad():
        for name, module in unet.named_modules():
            if hasattr(module, "weight") and module.weight is not None:
                module.weight.copy_(changed(module.weight, scene.background, name))
    for name, module in list(unet.named_modules()):
        if settings.norm_mask and isinstance(module, torch.nn.GroupNorm):
            unet.set_submodule(name, SlowNorm(module, [region.box for region in scene.regions], settings))

    def run(latents, timestep, rows):
        log = {}
        unet.set_attn_processor(
            {
                name: SlowAttention(name.removesuffix(".processor"), base, scene, settings, log)
                for name in unet.attn_processors
            }
        )
        sample = scheduler.scale_model_input(torch.cat([latents] * rows), timestep)
        return unet(sample, timestep, torch.zeros(rows, TOKENS, WIDTH, dtype=torch.float64)).sample, log

    def gradient(latents, timestep):
        leaf = latents.clone().requires_grad_()
        loss = slow_total(run(leaf, timestep, 1)[1], scene, settings)
        return loss.item(), torch.autograd.grad(loss, leaf)[0] if loss.requires_grad else torch.zeros_like(leaf)

    def down(latents, size, slope):
        longest = math.inf if constants.largest_step is None else constants.largest_step * latents.norm()
        change = size * slope
        return latents - change * longest / change.norm() if change.norm() > longest else latents - change

    constants = settings.constants
    scheduler.set_timesteps(steps)
    sigmas = isinstance(scheduler, HeunDiscreteScheduler)

    def stretch(step):
        """By how much a step of latents x = z sqrt(1 + sigma^2) is longer than one of z along the slope at z."""
        # the scheduler takes the root in float32
        return float((scheduler.sigmas[step] ** 2 + 1) ** 0.5) ** 2 if sigmas else 1

    latents = start * scheduler.init_noise_sigma
    first = scheduler.timesteps[0]
    if settings.reinitialisation:
        if constants.start_step:
            latents = down(latents, 20 * stretch(0), gradient(latents, first)[1])
        with torch.no_grad():
            latents = slow_windows(
                latents, run(latents, first, 1)[1], scene, settings, float(scheduler.init_noise_sigma)
            )
    losses, seen, going, count = [], [], True, len(scheduler.timesteps)
    for step, timestep in enumerate(scheduler.timesteps):
        losses.append(math.nan)
        # Heun's second evaluation of a step is forgotten, but for its slope
        if going and not (sigmas and step % 2):
            losses[-1], slope = gradient(latents, timestep)
            seen.append(losses[-1])
            share = 1 - 0.5 * step / (count - 1)
            size = 20 * (math.sqrt(share) if constants.decay == "root" else share)
            latents = down(latents, size * stretch(step), slope)
            last = len(seen) - 1
            going = not (last >= constants.patience and last and seen[-1] > seen[-2])
            going = going and (constants.last is None or last < constants.last)
        with torch.no_grad():
            negative, positive = run(latents, timestep, 2)[0].chunk(2)
            latents = scheduler.step(negative + guidance_scale * (positive - negative), timestep, latents).prev_sample
    return latents, losses


@pytest.mark.parametrize("kind", [EulerDiscreteScheduler, HeunDiscreteScheduler])
def test_guidance_is_as_strong_where_latents_are_scaled_up(unet, kind):
    # DDIM's latents have variance 1 throughout; those of the others are sqrt(1 + sigma^2) times as long
    composed_scene = scene(unet, 2)
    settings = Settings(map_factor=2, reinitialisation=False, constants=Constants(last=0))
    unguided = replace(settings, enhancement=False, fill=False, region=False)
    betas = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012, "timestep_spacing": "linspace"}
    moved = []
    for scheduler in (DDIMScheduler(**betas, clip_sample=False, set_alpha_to_one=False), kind(**betas)):
        found = [
            compose(unet, scheduler, composed_scene, noise(), 40, 3.0, one).latents for one in (settings, unguided)
        ]
        moved.append(found[0] - found[1])
    assert moved[0].norm() > 1
    # schedulers differ in what follows; without the scale the others would hardly move
    assert (moved[0] - moved[1]).norm() < 0.4 * moved[0].norm()


# at which of the evaluations for eight steps a scheduler goes on from other latents than those it is given
FORGETS = {
    "DDIM": (DDIMScheduler, {"clip_sample": False}, ()),
    "DPM++": (DPMSolverMultistepScheduler, {}, ()),
    "DPM++, single steps": (DPMSolverSinglestepScheduler, {"lower_order_final": True}, (1, 3, 5)),
    "Heun": (HeunDiscreteScheduler, {}, range(1, 15, 2)),
    "KDPM2": (KDPM2DiscreteScheduler, {}, range(1, 15, 2)),
    "LMS": (LMSDiscreteScheduler, {}, ()),
    "PNDM": (PNDMScheduler, {}, (1, 2, 3, 5, 6, 7, 9, 10, 11)),
    "PNDM, as of Stable Diffusion 1": (PNDMScheduler, {"skip_prk_steps": True}, (1,)),
    "SA": (SASolverScheduler, {}, ()),
    "UniPC": (UniPCMultistepScheduler, {}, ()),
}


@pytest.mark.parametrize("name", FORGETS)
def test_latents_are_moved_where_the_scheduler_goes_on_from_them(name, monkeypatch):
    kind, options, forgotten = FORGETS[name]
    scheduler = kind(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012, **options)
    constants = Constants(patience=99, last=None, decay="linear", step_size=1)
    model = SimpleNamespace(scene=SimpleNamespace(regions=[0]), unet=SimpleNamespace(device="cpu"))

    def after(moved):
        """The latents after the step that follows evaluation `moved`, and whether the evaluations had losses."""
        scheduler.set_timesteps(8)
        guidance = sampler._Guidance(model, scheduler, constants, 1)
        latents = noise() * scheduler.init_noise_sigma
        for index, timestep in enumerate(scheduler.timesteps):
            slope = noise(seed=9) if index == moved else torch.zeros_like(latents)
            monkeypatch.setattr(sampler, "guide", lambda *_, slope=slope: (torch.zeros(1), slope))
            latents = guidance.move(latents, timestep, index)
            # a network that sees no noise
            draws = torch.Generator().manual_seed(index)
            named = {"generator": draws} if isinstance(scheduler, SASolverScheduler) else {}
            latents = scheduler.step(torch.zeros_like(latents), timestep, latents, return_dict=False, **named)[0]
        return latents, [bool(loss.isfinite()) for loss in guidance.losses]

    still, evaluated = after(None)
    assert evaluated == [index not in forgotten for index in range(len(evaluated))]
    for index, kept in enumerate(evaluated):
        change = after(index)[0] - still
        # where the network sees no noise, latents never shrink: a move that is kept does not either
        step = constants.step_at(index, len(evaluated)) * noise(seed=9)
        assert (-(change * step).sum() > 0.99 * step.square().sum()) == kept


@pytest.mark.parametrize(("kind", "steps"), [(DDIMScheduler, 1001), (PNDMScheduler, 2)])
def test_steps_that_a_scheduler_does_not_take(unet, kind, steps):
    with pytest.raises(ConfigError, match=f"steps={steps}: not for a {kind.__name__} with its settings"):
        compose(unet, kind(), scene(unet), noise(), steps, settings=Settings(map_factor=2))


@pytest.mark.parametrize("strength", [1e30, 1e300])
def test_latents_that_overflow_end_the_composition_at_once(unet, strength):
    class Counted(DDIMScheduler):
        steps = 0

        def step(self, *args, **named):
            self.steps += 1
            return super().step(*args, **named)

    scheduler, region = Counted(clip_sample=False), scene(unet).regions[0]
    what = replace(scene(unet), regions=[replace(region, loras=[(lora(unet, 1), strength)])])
    small = copy.deepcopy(unet).float()
    with pytest.raises(ConfigError, match=r"not finite; .* LoRAs of a smaller strength"):
        compose(small, scheduler, what, noise().float(), 20, 3.0, Settings(map_factor=2, reinitialisation=False))
    assert scheduler.steps == 1


def test_boxes_that_are_moved_alike_bring_their_noise_once():
    # positions of the maps are latents; what is strongest is one row below each box, for the last one two
    boxes = {(0, 0, 2, 4): (1, 0), (1, 1, 3, 5): (2, 1), (1, 2, 3, 4): (3, 2)}
    cross = []
    for (top, left, bottom, right), (row, column) in boxes.items():
        attention = torch.zeros(2, 6, 8, 1)
        attention[:, row : row + bottom - top, column : column + right - left] = 1
        cross.append(attention)
    places = SimpleNamespace(cells=list(boxes), overlaps="own")
    regions = [SimpleNamespace(tokens=[0])] * 3
    model = SimpleNamespace(map_factor=1, places=lambda size: places, scene=SimpleNamespace(regions=regions))
    latents = torch.randn(2, 4, 6, 8, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    one, two = latents.roll(-1, 2), latents.roll(-2, 2)
    expected = latents.clone()
    expected[..., 0:2, 0:4] = one[..., 0:2, 0:4]
    expected[..., 1:3, 1:5] = one[..., 1:3, 1:5]
    expected[..., 1:3, 2:4] = (one + two)[..., 1:3, 2:4] / math.sqrt(2)
    found = reinitialise(latents, Maps(cross, None), model, None)
    for image, old, laid in zip(found, latents, expected, strict=True):
        torch.testing.assert_close(image, (laid - laid.mean()) / laid.std() * old.std() + old.mean())


CASES = {
    "code, two concepts": (2, {}, {}, DPMSolverMultistepScheduler),
    "paper, two concepts": (2, {"constants": CONSTANTS["paper"]}, {}, DPMSolverMultistepScheduler),
    "code, three that overlap, layered text": (3, {}, {"layers": 7}, HeunDiscreteScheduler),
    "paper, three that overlap, noise scaled up": (3, {"constants": CONSTANTS["paper"]}, {}, HeunDiscreteScheduler),
    "the original's overlaps and cells": (
        3,
        {"overlaps": "official", "cells": "inner"},
        {},
        DPMSolverMultistepScheduler,
    ),
    "the same concept twice in one box": (3, {}, {"twice": True}, DPMSolverMultistepScheduler),
    "background": (2, {}, {"background": True}, DPMSolverMultistepScheduler),
    "without injection": (2, {"injection": False}, {}, DPMSolverMultistepScheduler),
    "without mask and fill": (2, {"self_mask": False, "fill": False}, {}, DPMSolverMultistepScheduler),
    "normalisation mask": (2, {"norm_mask": True}, {}, DPMSolverMultistepScheduler),
    "normalisation mask, the original's overlaps": (
        3,
        {"norm_mask": True, "overlaps": "official"},
        {},
        HeunDiscreteScheduler,
    ),
    "without enhancement and layout": (2, {"enhancement": False, "reinitialisation": False}, {}, HeunDiscreteScheduler),
    "short steps": (2, {"constants": replace(CONSTANTS["paper"], largest_step=0.02)}, {}, DPMSolverMultistepScheduler),
    "stops early": (2, {"constants": Constants(patience=1, last=2)}, {}, HeunDiscreteScheduler),
}


@pytest.mark.parametrize("case", CASES)
def test_composition_is_that_of_the_slow_method(unet, case):
    count, options, extra, kind = copy.deepcopy(CASES[case])
    if extra.pop("background", False):
        endings = ("to_q", "to_k", "to_v", "to_out.0", "proj_in", "ff.net.2")
        extra["background"] = [(lora(unet, 9, endings), 0.6)]
    settings = Settings(map_factor=2, **options)
    twice = extra.pop("twice", False)
    composed_scene = scene(unet, count, **extra)
    if twice:
        composed_scene = replace(composed_scene, regions=[*composed_scene.regions, composed_scene.regions[0]])
    # the second scheduler, which scales its latents in float64, takes two timesteps a step but the first
    steps = 5 if kind is DPMSolverMultistepScheduler else 3
    found = compose(unet, kind(), composed_scene, noise(), steps, 3.0, settings)
    latents, losses = slow_compose(unet, kind(), composed_scene, noise(), steps, 3.0, settings)
    expected = torch.tensor(losses, dtype=torch.float64)[:, None]
    torch.testing.assert_close(found.losses, expected, rtol=1e-8, atol=0, equal_nan=True)
    torch.testing.assert_close(found.latents, latents, rtol=1e-7, atol=1e-7)


def test_steps_along_the_gradient_end_when_the_loss_grows_or_they_are_many():
    constants = Constants(patience=2, last=3)
    losses = [torch.tensor(row) for row in ([1.0, 1.0, 1.0], [2.0, 2.0, 2.0], [2.0, 2.1, math.nan], [1.0, 2.0, 1.0])]
    assert goes_on(losses[:1], constants).tolist() == [True] * 3
    # before the patience is over a loss may grow; after that one that stays does not end it
    assert goes_on(losses[:2], constants).tolist() == [True] * 3
    assert goes_on(losses[:3], constants).tolist() == [True, False, False]
    assert goes_on(losses, constants).tolist() == [False] * 3
    assert goes_on(losses, replace(constants, last=None)).tolist() == [True, True, False]


def test_steps_are_shortened_to_the_longest_and_never_lengthened():
    scheduler = SimpleNamespace(timesteps=torch.arange(3), scale_model_input=lambda sample, timestep: sample)
    generator = torch.Generator().manual_seed(0)
    latents, gradient = (torch.randn(2, 4, 8, 8, generator=generator) for _ in range(2))
    gradient[1] *= 1e-3
    found = _change(gradient, latents, Constants(step_size=5, largest_step=0.1), 0, scheduler)
    assert found[0].norm() == pytest.approx(0.1 * latents[0].norm())
    torch.testing.assert_close(found[0] / found[0].norm(), gradient[0] / gradient[0].norm())
    torch.testing.assert_close(found[1], 5 * gradient[1])
