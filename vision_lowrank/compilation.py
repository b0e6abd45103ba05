"""torch.compile, in one place: what of a model is compiled, and how a training asks for it."""

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback
from torch import nn

from vision_lowrank.errors import ConfigError
from vision_lowrank.models import lola_specvit
from vision_lowrank.models.layers import grid_block
from vision_lowrank.models.layers.spectral_stem import SpectralStem

# most of the time goes into these, and what lies between them looks at values, which a graph cannot
COMPILED = (SpectralStem, lola_specvit.Block, grid_block.Block)
# widths, batch sizes, training and evaluation make a graph each; beyond the limit PyTorch falls back to eager
GRAPHS = 64


def compile_blocks(model: nn.Module) -> None:
    """Compiles the blocks of a model in place, each when it is first called; names of weights stay as they are.

    Raises:
        ConfigError: it has none.
    """
    blocks = [module for module in model.modules() if isinstance(module, COMPILED)]
    if not blocks:
        raise ConfigError("compile=true compiles blocks of LoLA-SpecViT, LESS ViT and Hyper-MAE: leave it out here")
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, GRAPHS)
    for block in blocks:
        block.compile()


class Compilation(Callback):
    """Compiles the blocks of what is trained, and so of what predicts after it."""

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Compiles.

        Raises:
            ConfigError: there is nothing to compile.
        """
        compile_blocks(pl_module)
