"""NOLA: two factors that are linear combinations of random bases, which a seed gives back and no file holds."""

import dataclasses
import hashlib
import math
import zlib
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from vision_lowrank.adapters.layers import Adapter, BaseLayer, apply_low_rank, weight_product
from vision_lowrank.adapters.methods import check_alpha, check_rank
from vision_lowrank.errors import AdapterError


@dataclasses.dataclass(frozen=True)
class NOLA:
    r"""Update in a random subspace :math:`y = W x + s\,B A x` (Koohpayegani et al. 2023, arXiv 2310.02556).

    .. math:: A = A_0 + \sum_{i=1}^{k} \alpha_i A_i, \qquad B = \sum_{j=1}^{k} \beta_j B_j, \qquad s = c / r .

    Only the coefficients are trained, 2 k numbers a layer, whatever its size and the rank. The entries of the bases
    are uniform between -1 and 1, those of :math:`A_0` spread as `nn.Linear` starts; the coefficients start at zero,
    and so does the update. Of the paper's published variants this is the one that starts at the base. While in use the
    bases take the memory of k factors A and k factors B. A step of size :math:`\delta` in all coefficients, as of Adam,
    moves the entries of A and B by about :math:`\delta \sqrt{k / 3}`: the more terms, the smaller the learning rate.

    The bases of a layer come from `seed` and the layer's weight (see `layer_seed`), so they differ between layers; a
    file holds the resulting seed and a checksum, which is compared when the state is loaded.

    Args:
        rank: inner dimension r, at least 1.
        alpha: numerator c of the scale.
        terms: number k of bases of each factor, at least 1.
        seed: a whole number of at least 0.

    Raises:
        AdapterError: a value is out of range.
    """

    rank: int
    alpha: float
    terms: int
    seed: int = 0

    def __post_init__(self) -> None:
        check_rank("rank", self.rank)
        check_alpha(self.alpha)
        check_rank("terms", self.terms)
        check_seed(self.seed)

    @property
    def scaling(self) -> float:
        """The factor s of the low-rank branch."""
        return self.alpha / self.rank

    def build(self, base: BaseLayer) -> Adapter:
        """Draws the bases of this layer, without touching torch's global generator."""
        return NOLAAdapter(base, self.rank, self.scaling, self.terms, layer_seed(base, self.seed))

    def blank(self, base: BaseLayer) -> Adapter:
        """Makes the adapter without bases, which it draws when it is given a state.

        Raises:
            AdapterError: the rank, of which a state tells nothing, is above both sides of the weight.
        """
        most = max(len(base.weight), base.weight[0].numel())
        if self.rank > most:
            raise AdapterError(
                f"NOLA rank={self.rank} on {base}: a file may ask for {most}, the larger side of the weight, at most; "
                "inject the adapter if that is meant, and load a checkpoint of the model"
            )
        return NOLAAdapter(base, self.rank, self.scaling, self.terms, None)


class NOLAAdapter(Adapter):
    r"""Adds :math:`f s\,B A x` with the strength f; settings as in `NOLA`, `seed` as of `layer_seed` or None.

    Without a seed it has no bases until it loads a state.

    Attributes:
        nola_alpha: coefficients of A, (terms,).
        nola_beta: coefficients of B, (terms,).
        nola_start: the frozen :math:`A_0`, (rank, in / groups, *kernel); not in the state.
        nola_down: bases of A, (terms, rank, in / groups, *kernel); not in the state.
        nola_up: bases of B, (terms, out, rank, 1, ...); not in the state.
        nola_seed: what the bases are drawn from.
        nola_checksum: CRC-32 of the numbers drawn.
    """

    nola_start: Tensor
    nola_down: Tensor
    nola_up: Tensor
    nola_seed: Tensor
    nola_checksum: Tensor

    def __init__(self, base: BaseLayer, rank: int, scaling: float, terms: int, seed: int | None) -> None:
        super().__init__(base)
        self.scaling = scaling
        out, *rest = base.weight.shape
        self.shapes = (rank, *rest), (out, rank, *(1 for _ in rest[1:]))
        self.nola_alpha = nn.Parameter(base.weight.new_zeros(terms))
        self.nola_beta = nn.Parameter(base.weight.new_zeros(terms))
        self.register_buffer("nola_seed", torch.tensor(0, device=base.weight.device))
        self.register_buffer("nola_checksum", torch.tensor(0, device=base.weight.device))
        if seed is not None:
            bases = self._draw(seed)
            self._hold(bases)
            self.nola_seed.fill_(seed)
            self.nola_checksum.fill_(bases.checksum)

    def forward(self, x: Tensor, y: Tensor, base: BaseLayer) -> Tensor:
        """Adds the contribution for the layer's input `x` to `y`, the output so far."""
        down, up = self.factors()
        return y + apply_low_rank(base, x, down * self.strength, up) * self.scaling

    def delta_weight(self) -> Tensor:
        """Returns f s B A in the shape of the base weight."""
        dtype = torch.promote_types(self.nola_alpha.dtype, torch.float32)
        return weight_product(*self.factors(dtype)) * (self.scaling * self.strength.to(dtype))

    def lora_factors(self) -> tuple[Tensor, Tensor, float]:
        """Returns A, B and s."""
        return *self.factors(), self.scaling

    def factors(self, dtype: torch.dtype | None = None) -> tuple[Tensor, Tensor]:
        """Returns A and B, summed in `dtype` or in the coefficients' own."""
        down = self.nola_alpha.to(dtype) @ self.nola_down.flatten(1).to(dtype)
        up = self.nola_beta.to(dtype) @ self.nola_up.flatten(1).to(dtype)
        return self.nola_start.to(dtype) + down.view_as(self.nola_start), up.view(self.nola_up.shape[1:])

    def _draw(self, seed: int) -> "_Bases":
        return _draw_bases(*self.shapes, len(self.nola_alpha), seed)

    def _hold(self, bases: "_Bases") -> None:
        for key in ("start", "down", "up"):
            self.register_buffer(f"nola_{key}", getattr(bases, key).to(self.nola_alpha), persistent=False)

    def _load_from_state_dict(self, state_dict: Mapping[str, Any], prefix: str, *args: Any, **kwargs: Any) -> None:
        # what is missing is reported by torch
        if {f"{prefix}nola_seed", f"{prefix}nola_checksum"} <= state_dict.keys():
            self._restore(int(state_dict[f"{prefix}nola_seed"]), int(state_dict[f"{prefix}nola_checksum"]))
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)

    def _restore(self, seed: int, checksum: int) -> None:
        """Draws the bases that a state belongs to, if they are not those at hand."""
        if hasattr(self, "nola_start") and (seed, checksum) == (int(self.nola_seed), int(self.nola_checksum)):
            return
        bases = self._draw(seed)
        if bases.checksum != checksum:
            raise AdapterError(
                f"NOLA bases drawn from seed {seed} have checksum {bases.checksum}, those of the state {checksum}: "
                "load it with the rank, the terms, the layers and the version of torch it was trained with"
            )
        self._hold(bases)


def layer_seed(base: BaseLayer, seed: int) -> int:
    """Derives from a model's seed the seed of one layer, a 32-bit number.

    The layer's weight goes into it, for layers of one shape must not get the same random numbers, while a pretrained
    model has to give them again in every process. Layers with equal weights get equal seeds.
    """
    weight = base.weight.detach().to("cpu", torch.float32).flatten()
    return int.from_bytes(
        hashlib.blake2b(weight.numpy().data, digest_size=4, key=str(seed).encode()).digest(), "little"
    )


def check_seed(seed: int) -> None:
    """Refuses what is no seed.

    Raises:
        AdapterError: not a whole number of at least 0.
    """
    if isinstance(seed, bool) or not isinstance(seed, int) or not 0 <= seed < 2**63:
        raise AdapterError(f"adapter seed={seed!r}: give a whole number from 0 up to 2**63 - 1")


class _Bases(NamedTuple):
    """Random numbers of one layer in float32, on the CPU."""

    start: Tensor
    down: Tensor
    up: Tensor
    checksum: int


def _draw_bases(down_shape: tuple[int, ...], up_shape: tuple[int, ...], terms: int, seed: int) -> _Bases:
    """Draws A_0, the bases of A and the bases of B, in this order, from a private generator."""
    generator = torch.Generator().manual_seed(seed)
    checksum = 0
    drawn = []
    for shape in (down_shape, (terms, *down_shape), (terms, *up_shape)):
        # whole numbers of 24 bits, for a floating-point draw may round differently on another processor
        whole = torch.randint(2**24, shape, generator=generator, dtype=torch.int32, device="cpu")
        checksum = zlib.crc32(whole.numpy().data, checksum)
        drawn.append(whole.float().mul_(2.0**-23).sub_(1.0))
    start, down, up = drawn
    return _Bases(start / math.sqrt(math.prod(down_shape[1:])), down, up, checksum)
