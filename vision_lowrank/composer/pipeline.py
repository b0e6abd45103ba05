"""A small Stable Diffusion of our own: diffusers' pipeline, pixel unshuffle as the autoencoder, a vocabulary of words.

Its folder is read by `render.load_base(folder)`, or, once this module is imported, as any other of diffusers:
`StableDiffusionPipeline.from_pretrained(folder)`.
"""

from collections.abc import Sequence
from typing import Any, cast

import torch
import torch.nn.functional as F
from diffusers import DPMSolverMultistepScheduler, ModelMixin, StableDiffusionPipeline, UNet2DConditionModel
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.autoencoders.vae import DecoderOutput
from torch import Tensor
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from vision_lowrank.argument_types import check_least
from vision_lowrank.errors import ConfigError

START, END = "<|startoftext|>", "<|endoftext|>"


class PixelUnshuffle(ModelMixin, ConfigMixin):
    """Exact stand-in for an autoencoder: pixels of 2 x 2 squares become channels, nothing is lost or learned.

    Args:
        block_out_channels: what pipelines compute the factor between image and latent from; one entry more than there
            are halvings.
        latent_channels: channels of the latent.
        scaling_factor: pipelines divide latents by it.
    """

    config_name: Any = "config.json"

    @register_to_config
    def __init__(
        self, block_out_channels: Sequence[int] = (3, 12), latent_channels: int = 12, scaling_factor: float = 1.0
    ) -> None:
        super().__init__()
        self.factor = 2 ** (len(block_out_channels) - 1)
        # pipelines ask a model's weights for precision and device
        self.register_buffer("anchor", torch.zeros(1))

    def encode(self, image: Tensor) -> Tensor:
        """Takes (B, 3, H, W) to (B, 12, H / 2, W / 2)."""
        return F.pixel_unshuffle(image, self.factor)

    def decode(
        self, latent: Tensor, return_dict: bool = True, generator: torch.Generator | None = None
    ) -> DecoderOutput | tuple[Tensor]:
        """Takes (B, 12, H / 2, W / 2) back to (B, 3, H, W), in the form that pipelines expect."""
        image = F.pixel_shuffle(latent, self.factor)
        return DecoderOutput(sample=image) if return_dict else (image,)


def build_tokenizer(words: Sequence[str], length: int) -> CLIPTokenizer:
    """Returns CLIP's tokenizer with a vocabulary in which each word is one token; others fall into their letters.

    A word is put together from its end, letter by letter. Since each merge has the end of the word on its right, no
    merge of one word can disturb another.

    Args:
        words: lower-case words and punctuation marks.
        length: tokens of a prompt, start and end included; shorter ones are filled up.
    """
    letters = sorted(set("".join(words)) | set("abcdefghijklmnopqrstuvwxyz0123456789<>,."))
    vocabulary: dict[str, None] = dict.fromkeys((START, END, *letters, *(f"{letter}</w>" for letter in letters)))
    merges: dict[tuple[str, str], None] = {}
    for word in words:
        for start in range(len(word) - 2, -1, -1):
            merges[word[start], f"{word[start + 1 :]}</w>"] = None
            vocabulary[f"{word[start:]}</w>"] = None
    ids = {token: index for index, token in enumerate(vocabulary)}
    return CLIPTokenizer(vocab=ids, merges=cast(Any, list(merges)), model_max_length=length)


def build_pipeline(
    words: Sequence[str],
    length: int = 32,
    side: int = 64,
    channels: Sequence[int] = (64, 128, 192),
    layers: int = 1,
    heads: int = 4,
    groups: int = 32,
    text_width: int = 128,
    text_layers: int = 3,
    text_heads: int = 4,
) -> Any:
    """Returns a pipeline with random weights, to be trained on the velocity of a cosine schedule.

    Args:
        words: what its text encoder knows.
        length: tokens of a prompt, start and end included.
        side: height and width of the images; the latent has half of it.
        channels: of the UNet by resolution, finest first; all but the finest have cross-attention.
        layers: residual blocks a resolution.
        heads: of the UNet's attention.
        groups: of its group norms.
        text_width: width of the text encoder.
        text_layers: its depth.
        text_heads: of its attention.

    Raises:
        ConfigError: a size is too small, or does not divide into heads or groups.
    """
    # a prompt is a word between start and end
    check_least(3, length=length)
    check_least(1, layers=layers, heads=heads, groups=groups)
    check_least(1, text_width=text_width, text_layers=text_layers, text_heads=text_heads)
    if not channels or any(width < 1 or width % groups or width % heads for width in channels):
        raise ConfigError(f"channels={list(channels)}: give numbers that groups={groups} and heads={heads} divide")
    if text_width % text_heads:
        raise ConfigError(f"text_width={text_width}: give a number that text_heads={text_heads} divides")
    tokenizer = build_tokenizer(words, length)
    text_encoder = CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=text_width,
            intermediate_size=4 * text_width,
            projection_dim=text_width,
            num_hidden_layers=text_layers,
            num_attention_heads=text_heads,
            max_position_embeddings=length,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )
    coarser = len(channels) - 1
    unet: Any = UNet2DConditionModel(
        sample_size=side // 2,
        in_channels=12,
        out_channels=12,
        down_block_types=("DownBlock2D", *("CrossAttnDownBlock2D",) * coarser),
        up_block_types=(*("CrossAttnUpBlock2D",) * coarser, "UpBlock2D"),
        block_out_channels=tuple(channels),
        layers_per_block=layers,
        cross_attention_dim=text_width,
        # diffusers' name for the number of heads
        attention_head_dim=heads,
        norm_num_groups=groups,
    )
    scheduler = DPMSolverMultistepScheduler(
        beta_schedule="squaredcos_cap_v2",
        prediction_type="v_prediction",
        timestep_spacing="linspace",
        steps_offset=1,
        # log of signal over noise falls without end in the cosine schedule
        lambda_min_clipped=-5.1,
    )
    make: Any = StableDiffusionPipeline
    parts = (PixelUnshuffle(), text_encoder.eval(), tokenizer, unet.eval(), scheduler, None, None)
    pipeline = make(*parts, requires_safety_checker=False)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline
