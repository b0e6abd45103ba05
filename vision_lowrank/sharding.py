"""Weights, gradients and optimizer states shared out among processes (PyTorch's fully_shard), for pretraining."""

from lightning.pytorch.strategies import ModelParallelStrategy
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, fully_shard, register_fsdp_forward_method

from vision_lowrank.models.hyper_mae import HyperMAE
from vision_lowrank.models.layers.grid_block import Block


def shard(model: HyperMAE, mesh: DeviceMesh) -> None:
    """Shares out the weights of a model, in place and once; a block's are gathered while it is at work.

    Args:
        model: with the same weights on all processes.
        mesh: of the processes, one axis.
    """
    if isinstance(model, FSDPModule):
        return
    for part in model.modules():
        if isinstance(part, Block):
            fully_shard(part, mesh=mesh)
    fully_shard(model, mesh=mesh)
    # what training calls instead of `forward`
    register_fsdp_forward_method(model, HyperMAE.reconstruct.__name__)


class ShardedStrategy(ModelParallelStrategy):
    """Shards over all processes of all machines; checkpoints are single files, as those of any other training."""

    def __init__(self) -> None:
        super().__init__(tensor_parallel_size=1, save_distributed_checkpoint=False)

    def setup_environment(self) -> None:
        """Sets the size of the mesh, which Lightning would make the number of machines."""
        self._data_parallel_size = self.num_nodes * self.num_processes
        super().setup_environment()
