"""What fine-tuning on the tasks of GFM-Bench costs, by calculation: python -m benchmarks.gfm_bench_cost.

Prints a Markdown table for LESS ViT base. The multiply-adds of one image as published (cropped, enlarged) are counted
in a forward pass; a training sample costs three of them, and the hours are those of one learning rate and one seed on a
GPU that sustains TERAFLOPS. Validation, test and reading are left out.
"""

import torch

from vision_lowrank.data.task_cards import TaskCard, list_task_cards, load_task_card
from vision_lowrank.models.encoders import LessEncoder
from vision_lowrank.models.less_vit import less_vit_base
from vision_lowrank.raster_features import count_gmacs

# sustained in bf16, an assumption: a tenth to a third of what GPUs of a data centre are sold with
TERAFLOPS = 100
# of the authors' fine-tuning script
EPOCHS = dict.fromkeys(list_task_cards(), 10) | {"eurosat": 20, "so2sat": 20}
# the cards have none; those of the originals: BigEarthNet without snow and clouds in 19 classes, which are 519,284 with
# validation and test, and nine tenths of So2Sat's 352,366 training tiles
TRAINING = {"bigearthnet": 269_695, "so2sat": 317_129}


def image_gmacs(card: TaskCard, encoder: LessEncoder) -> float:
    """Returns the 1e9 multiply-adds of one image of a task as published."""
    side = card.protocol.crop * card.protocol.scale
    sample = {
        "image": torch.zeros(len(card.bands), side, side),
        "wavelengths": torch.from_numpy(card.wavelengths),
        "gsd": torch.tensor(card.gsd / card.protocol.scale),
    }
    return count_gmacs(encoder, [sample], card.kind, "cpu")


def hours(gmacs: float, images: int, epochs: int) -> float:
    """Returns the hours of training, with two operations a multiply-add and the backward pass twice the forward."""
    return 3 * 2e9 * gmacs * images * epochs / (TERAFLOPS * 1e12) / 3600


def main() -> None:
    encoder = LessEncoder(less_vit_base(patch_size=16, radar=False)).eval()
    print("| task | training images | channels x side | GMACs an image | epochs | hours |")
    print("| :--- | ---: | ---: | ---: | ---: | ---: |")
    total = 0.0
    for name in list_task_cards():
        card = load_task_card(name)
        images = round(card.protocol.train_fraction * (card.splits.train or TRAINING[name]))
        gmacs, epochs = image_gmacs(card, encoder), EPOCHS[name]
        taken = hours(gmacs, images, epochs)
        total += taken
        shape = f"{len(card.bands)} x {card.protocol.crop * card.protocol.scale}"
        print(f"| {name} | {images:,} | {shape} | {gmacs:.1f} | {epochs} | {taken:.2f} |", flush=True)
    print(f"| all | | | | | {total:.2f} |")


if __name__ == "__main__":
    main()
