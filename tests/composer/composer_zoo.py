"""A small random UNet in float64, random scenes for it, and small random text encoders."""

import string

import torch
from diffusers import UNet2DConditionModel
from transformers import CLIPTextConfig, CLIPTokenizer

from vision_lowrank.composer.layout import Box, Region, Scene, Text
from vision_lowrank.composer.lora_files import LowRank

WIDTH, TOKENS, HEIGHT_OF_LATENT, WIDTH_OF_LATENT = 8, 7, 12, 16
# of a prompt of the text encoders
LENGTH = 20


def build_unet(sharpness=5, **options):
    torch.manual_seed(0)
    unet = UNet2DConditionModel(
        **{
            "sample_size": (HEIGHT_OF_LATENT, WIDTH_OF_LATENT),
            "block_out_channels": (8, 16),
            "down_block_types": ("CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
            "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
            "layers_per_block": 1,
            "norm_num_groups": 4,
            "cross_attention_dim": WIDTH,
            "attention_head_dim": 2,
        }
        | options
    )
    with torch.no_grad():
        for name, parameter in unet.named_parameters():
            # attention that has preferences, else all maps are flat
            if "to_q" in name or "to_k" in name:
                parameter.mul_(sharpness)
    return unet.double().eval()


def text(seed, layers=1):
    generator = torch.Generator().manual_seed(seed)
    positive, negative = torch.randn(2, layers, TOKENS, WIDTH, generator=generator, dtype=torch.float64)
    return Text(positive, negative)


def lora(unet, seed, endings=("attn2.to_k", "attn2.to_v", "attn2.to_out.0"), scale=0.7, rank=2):
    generator = torch.Generator().manual_seed(seed)
    changes = {}
    for name, module in unet.named_modules():
        if name.endswith(endings):
            out, *inputs = module.weight.shape
            down = torch.randn(rank, *inputs, generator=generator, dtype=torch.float64)
            # some files have no kernel for a single position
            down = down.flatten(1) if name.endswith("proj_in") else down
            changes[name] = LowRank(down, 0.3 * torch.randn(out, rank, generator=generator, dtype=torch.float64), scale)
    return changes


def delta(module, loras, name):
    """What LoRAs, with their strengths, change in the weight of a module."""
    total = torch.zeros_like(module.weight)
    for changes, strength in loras:
        if name in changes:
            change = changes[name]
            product = torch.einsum("or,r...->o...", change.up, change.down)
            total += strength * change.scale * product.reshape(total.shape)
    return total


def scene(unet, count=2, layers=1, background=()):
    """Two disjoint boxes, or three that overlap; the second has two LoRAs, one of them at half strength."""
    boxes = [Box(0, 0, 0.5, 0.5), Box(0.4, 0.55, 1, 1)]
    if count == 3:
        boxes = [Box(0, 0, 0.7, 0.5), Box(0.3, 0.3, 1, 0.8), Box(0.5, 0.1, 0.8, 0.6)]
    loras = [[(lora(unet, 1), 1.0)], [(lora(unet, 2), 0.5), (lora(unet, 3), 1.0)], [(lora(unet, 1), 0.8)]]
    tokens = [[1, 2], [4], [2, 3, 5]]
    regions = [Region(box, text(10 + index, layers), tokens[index], loras[index]) for index, box in enumerate(boxes)]
    return Scene(text(5, layers), regions, background)


def noise(images=1, seed=7):
    shape = (images, 4, HEIGHT_OF_LATENT, WIDTH_OF_LATENT)
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def make_tokenizer():
    characters = string.ascii_lowercase + ",.!<>0123456789"
    symbols = [*characters, *(f"{character}</w>" for character in characters)]
    merges = [("c", "a"), ("ca", "t</w>"), ("o", "n</w>")]
    symbols += ["".join(pair) for pair in merges] + ["<|startoftext|>", "<|endoftext|>"]
    vocabulary = {symbol: index for index, symbol in enumerate(symbols)}
    return CLIPTokenizer(vocab=vocabulary, merges=merges, model_max_length=LENGTH)


def make_encoder(tokenizer, width, kind):
    torch.manual_seed(width)
    config = CLIPTextConfig(
        vocab_size=len(tokenizer), hidden_size=width, intermediate_size=32, num_hidden_layers=3, num_attention_heads=2,
        max_position_embeddings=LENGTH, projection_dim=12, bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    model = kind(config).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return model
