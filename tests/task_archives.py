"""Benchmark tasks with a few random tiles, in archives of exactly the layout of their cards."""

import csv
import dataclasses
import io
import zipfile

import numpy as np
import yaml
from PIL import Image
from rasterio.io import MemoryFile

from vision_lowrank.data.cards import CARDS_FOLDER
from vision_lowrank.data.image_tasks import open_task
from vision_lowrank.data.task_cards import load_task_card

COUNTS = {"train": 4, "val": 3, "test": 3}
SPLITS = {"train": "train", "val": "validation", "test": "test"}
SIDE = 8


def samples_tiff(values, interleave="pixel", **profile):
    """One page with the bands as samples; `values` are (bands, rows, columns), `profile` is rasterio's."""
    bands, rows, columns = values.shape
    with MemoryFile() as memory:
        profile |= {"count": bands, "height": rows, "width": columns, "dtype": values.dtype, "interleave": interleave}
        with memory.open(driver="GTiff", **profile) as file:
            file.write(values)
        return memory.read()


def pages_tiff(values):
    """A page for each index of the first axis."""
    pages = [Image.fromarray(page) for page in np.ascontiguousarray(values)]
    buffer = io.BytesIO()
    pages[0].save(buffer, "TIFF", save_all=True, append_images=pages[1:])
    return buffer.getvalue()


WRITERS = (
    samples_tiff,
    lambda values: samples_tiff(values, "band"),
    pages_tiff,
    lambda values: pages_tiff(values.transpose(1, 2, 0)),
)


def csv_bytes(rows):
    buffer = io.StringIO()
    writer = csv.DictWriter(buffer, list(rows[0]))
    writer.writeheader()
    writer.writerows(rows)
    return buffer.getvalue().encode()


def zip_files(files):
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as archive:
        for name, content in files.items():
            archive.writestr(name, content)
    return buffer.getvalue()


class Miniature:
    """A task with a few tiles in the layout of its card; change `files`, `rows` or `card`, then `open()`.

    `writers` of TIFFs take turns.
    """

    def __init__(self, card, root, side, counts, writers=WRITERS):
        self.card, self.root = card, root
        self.raw = yaml.safe_load((CARDS_FOLDER / "gfm_bench" / f"{card.name}.yaml").read_text())
        generator = np.random.default_rng(3)
        self.files, self.rows = {}, []
        self.images, self.labels = {split: [] for split in counts}, {split: [] for split in counts}
        self.radar = {split: [] for split in counts}
        known = [value for value in card.class_values if isinstance(value, int)]
        number = 0
        for split, count in counts.items():
            for _ in range(count):
                image = generator.integers(1, 60_000, (len(card.bands), side, side)).astype(np.uint16)
                if card.values.startswith("reflectance from 0 to 1"):
                    image = (image / 60_000).astype(np.float32)
                row = {"optical_path": f"optical/tile{number // 3}_{number % 3}.tif", "radar_path": "", "split": split}
                self.files[row["optical_path"]] = writers[number % len(writers)](image)
                if card.radar:
                    row["radar_path"] = f"radar/tile{number}.tif"
                    decibels = np.random.default_rng(number).normal(-15, 5, (len(card.radar), side, side))
                    self.radar[split].append(decibels.astype(np.float32))
                    self.files[row["radar_path"]] = writers[number % len(writers)](self.radar[split][-1])
                if card.kind == "segmentation":
                    label = generator.choice(known, (side, side)).astype(np.uint8)
                    row["label_path"] = f"label/tile{number}.tif"
                    self.files[row["label_path"]] = writers[number % len(writers)](label[None])
                elif card.kind == "multilabel":
                    label = sorted(generator.choice(len(card.classes), 3, replace=False).tolist())
                    row["label"] = str([card.classes[index].name for index in label] if number % 2 else label)
                else:
                    label = number % len(card.classes)
                    row["label"] = card.classes[label].name if number % 2 else str(label)
                self.rows.append(row)
                self.images[split].append(image)
                self.labels[split].append(label)
                number += 1

    def members(self):
        """Every file of the archive by name."""
        files = {"metadata.csv": csv_bytes(self.rows), **self.files}
        return {f"{self.card.folder}/{name}": content for name, content in files.items()}

    def served(self):
        """The archive as the hub has it: content by path, in parts where the card has parts."""
        entries = self.card.archive.files()
        pieces = np.array_split(np.frombuffer(zip_files(self.members()), np.uint8), len(entries))
        return {entry.path: bytes(piece) for entry, piece in zip(entries, pieces, strict=True)}

    def write(self):
        path = self.root / self.card.name / self.card.archive.path
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(zip_files(self.members()))

    def open(self, **options):
        self.write()
        return open_task(self.card, self.root, **options)


def small(card, **changes):
    """The card with other sizes, so that tests write kilobytes."""
    return dataclasses.replace(card, side=SIDE, disk=1000, **changes)


def crops(name, root, images, held):
    """A task whose training and validation are nine crops of each image, mixed; `held` of them validate."""
    made = Miniature(small(load_task_card(name)), root, SIDE, {"train": images * 9 - held, "val": held, "test": 3})
    order = np.random.default_rng(0).permutation(images * 9)
    for number, row in zip(order, made.rows, strict=False):
        content = made.files.pop(row["optical_path"])
        row["optical_path"] = f"{row['split']}/scene_p{number // 9}_{number % 9}.tif"
        made.files[row["optical_path"]] = content
    return made


def expected_mask(name, raw):
    """Class indices by the specification's tables, written out independently of the cards."""
    tables = {
        "dfc2020": [255, 0, 0, 0, 0, 0, 1, 1, 255, 255, 2, 3, 4, 5, 4, 255, 6, 7],
        "marida": [255, 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 6, 6, 6, 6],
    }
    if name in tables:
        return np.asarray(tables[name])[raw]
    if name == "segmunich":
        moved = {21: 1, 22: 2, 23: 3, 31: 4, 32: 6, 33: 7, 41: 8, 13: 9, 14: 10}
        return np.vectorize(lambda value: moved.get(value, value))(raw)
    legend = [0, 11, 12, 21, 22, 23, 24, 31, 41, 42, 43, 51, 52, 71, 72, 73, 74, 81, 82, 90, 95]
    return np.vectorize(legend.index)(raw)
