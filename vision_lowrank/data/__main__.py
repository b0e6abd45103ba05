"""Command line: python -m vision_lowrank.data list | show NAME | fetch NAME | check NAME [--root data].

Names and paths of scene cards and of task cards are both understood; `list tasks` lists the latter.
"""

import argparse
import logging
import sys
from collections.abc import Sequence

import numpy as np
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from vision_lowrank.data.cards import DatasetCard, list_cards, load_card
from vision_lowrank.data.download import fetch
from vision_lowrank.data.image_tasks import open_task
from vision_lowrank.data.scene import class_counts, open_scene
from vision_lowrank.data.task_cards import TaskCard, is_task_card, list_task_cards, load_task_card
from vision_lowrank.data.task_index import SUBSETS
from vision_lowrank.errors import DataError, VisionLowRankError

# tiles of each split that `check` reads
CHECKED_SAMPLES = 5


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command; returns the exit status, 2 after an error that the user can mend."""
    parser = argparse.ArgumentParser(
        prog="python -m vision_lowrank.data", description="Scenes, benchmark tasks and their cards."
    )
    commands = parser.add_subparsers(dest="command", required=True)
    helps = {
        "list": "the cards that come with the project",
        "show": "what a card says",
        "fetch": "download the files of a card",
        "check": "open a scene or a task and compare it with its card",
    }
    for name, text in helps.items():
        command = commands.add_parser(name, help=text, description=text)
        if name == "list":
            command.add_argument(
                "what", nargs="?", choices=("scenes", "tasks"), default="scenes", help="default: scenes"
            )
        else:
            command.add_argument("card", help="name of a card, or path of a .yaml file")
        command.add_argument("--root", default="data", help="data folder (default: data)")
    options = parser.parse_args(arguments)
    logging.basicConfig(format="%(levelname)s: %(message)s", level=logging.INFO)
    console = Console(soft_wrap=True, highlight=False)
    try:
        if options.command == "list":
            {"scenes": _list, "tasks": _list_tasks}[options.what](console, options.root)
        elif is_task_card(options.card):
            task = load_task_card(options.card)
            {"show": _show_task, "fetch": _fetch, "check": _check_task}[options.command](console, task, options.root)
        else:
            card = _load_scene(options.card)
            {"show": _show, "fetch": _fetch, "check": _check}[options.command](console, card, options.root)
    except (VisionLowRankError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def _load_scene(name: str) -> DatasetCard:
    try:
        return load_card(name)
    except DataError as error:
        if "not found" in str(error):
            raise DataError(f"{error}; tasks: {', '.join(list_task_cards())}") from error
        raise


def _list(console: Console, root: str) -> None:
    table = Table("name", "title", "rows x columns x bands", "classes", "files", box=None)
    for name in list_cards():
        card = load_card(name)
        shape = f"{card.shape.height} x {card.shape.width} x {card.shape.channels}"
        table.add_row(
            name, escape(card.title), shape, str(len(card.classes)), "missing" if card.missing(root) else "on disk"
        )
    console.print(table)


def _list_tasks(console: Console, root: str) -> None:
    table = Table("name", "title", "kind", "bands", "classes", "disk", "files", box=None)
    for name in list_task_cards():
        card = load_task_card(name)
        there = "missing" if card.missing(root) else "on disk"
        counts = (str(len(card.bands)), str(len(card.classes)), f"{card.disk / 1e9:.1f} GB")
        table.add_row(name, escape(card.title), card.kind, *counts, there)
    console.print(table)


def _show(console: Console, card: DatasetCard, root: str) -> None:
    missing = card.missing(root)
    bands = card.bands.on_card(card.name)
    spectrum = "wavelengths from the file"
    if bands is not None:
        spectrum = f"{bands.wavelengths.min():g} to {bands.wavelengths.max():g} nm"
        if card.bands.from_file:
            spectrum += " unless the file has wavelengths"
    rows = {
        "title": f"{card.title} ({card.name}), {card.task}",
        "sensor": f"{card.sensor}; pixels of {card.gsd:g} m; {card.shape.channels} bands, {spectrum}",
        "size": f"{card.shape.height} rows x {card.shape.width} columns",
        "source": card.source.hub or card.source.package or card.source.page or "your own files",
        "files": "\n".join(f"{entry.path}{'  (missing)' if entry in missing else ''}" for entry in card.files.all()),
        "licence": card.licence,
        "citation": card.citation,
        "notes": card.notes,
    }
    table = Table(show_header=False, box=None)
    for name, text in rows.items():
        table.add_row(name, escape(text))
    console.print(table)
    console.print(_class_table(card, None))
    if missing:
        action = "repeat the command with fetch in place of show" if card.source.hub else card.how_to_get(missing, root)
        console.print(f"{len(missing)} files missing: {escape(action)}")


def _show_task(console: Console, card: TaskCard, root: str) -> None:
    sizes = ((name, getattr(card.splits, name)) for name in SUBSETS)
    protocol = card.protocol
    rows = {
        "title": f"{card.title} ({card.name}), {card.kind}, measured by {card.metric}",
        "sensor": f"{card.sensor}; pixels of {card.gsd:g} m; values: {card.values}",
        "size": f"{card.side or 'unknown'} pixels a side; "
        + ", ".join(f"{n or 'unknown'} {name}" for name, n in sizes),
        "protocol": f"crops of {protocol.crop} pixels, enlarged {protocol.scale} times; "
        f"{protocol.train_fraction:.0%} of train, {protocol.validation_fraction:.0%} of validation",
        "source": f"{card.source.hub or card.source.page or 'your own files'}, {card.disk / 1e9:.1f} GB on disk",
        "licence": card.licence,
        "citation": card.citation,
        "notes": card.notes,
    }
    if card.radar:
        rows["radar"] = ", ".join(band.name for band in card.radar) + " (read with benchmark.sensors=[optical,radar])"
    table = Table(show_header=False, box=None)
    for name, text in rows.items():
        table.add_row(name, escape(text))
    console.print(table)
    bands = Table("band", "nm", "mean", "std", box=None)
    for band in card.bands:
        numbers = ("measured" if number is None else f"{number:g}" for number in (band.mean, band.std))
        bands.add_row(band.name, f"{band.wavelength:g}", *numbers)
    console.print(bands)
    classes = Table("index", "", "class", "values", box=None)
    for index, entry in enumerate(card.classes):
        values = ", ".join(map(str, entry.values or (index,)))
        classes.add_row(
            str(index), f"[on {entry.colour}]   [/]" if entry.colour else "", escape(entry.name), escape(values)
        )
    console.print(classes)
    if missing := card.missing(root):
        action = "repeat the command with fetch in place of show" if card.source.hub else card.how_to_get(missing, root)
        console.print(f"{len(missing)} files missing: {escape(action)}")


def _fetch(console: Console, card: DatasetCard | TaskCard, root: str) -> None:
    fetched = fetch(card, root)
    for path in fetched:
        console.print(f"fetched {escape(str(path))}")
    if not fetched:
        console.print(f"{card.name}: every file is on disk")


def _check(console: Console, card: DatasetCard, root: str) -> None:
    scene = open_scene(card, root)
    channels, height, width = scene.image.shape
    waves = scene.bands.wavelengths
    console.print(
        f"{card.title}: {height} rows x {width} columns x {channels} bands, {waves.min():g} to {waves.max():g} nm"
    )
    console.print(f"{scene.valid.sum()} of {scene.valid.size} pixels have values in every band")
    if scene.dropped_bands:
        console.print(f"{len(scene.dropped_bands)} bands left out, indices {', '.join(map(str, scene.dropped_bands))}")
    if scene.georeference is not None:
        west, north = scene.georeference.transform[2], scene.georeference.transform[5]
        console.print(f"{escape(scene.georeference.crs)}, upper left corner at {west:.2f}, {north:.2f}")
    if card.classes:
        console.print(_class_table(card, class_counts(scene.labels, len(card.classes))))
    for name, digest in scene.hashes.items():
        console.print(f"{digest}  {escape(name)}")
    console.print(f"{card.name}: files and card agree")


def _check_task(console: Console, card: TaskCard, root: str) -> None:
    task = open_task(card, root)
    for name in SUBSETS:
        samples = getattr(task, name)
        chosen = np.unique(np.linspace(0, len(samples) - 1, CHECKED_SAMPLES).astype(int))
        images = [samples[int(index)]["image"].numpy() for index in chosen]
        values = np.concatenate([image.ravel() for image in images])
        console.print(
            f"{name}: {len(samples)} samples in {len(np.unique(samples.groups))} groups; {len(chosen)} read, "
            f"{' x '.join(map(str, images[0].shape))}, normalised mean {values.mean():.2f}, std {values.std():.2f}"
        )
    console.print(f"{task.fingerprint}  samples")
    console.print(f"{card.name}: files and card agree")


def _class_table(card: DatasetCard, counts: np.ndarray | None) -> Table:
    table = Table("value", "", "class", "pixels", box=None)
    for index, (value, entry) in enumerate(zip(card.class_values(), card.classes, strict=True)):
        pixels = entry.pixels if counts is None else counts[index]
        swatch = f"[on {entry.colour}]   [/]"
        table.add_row(str(value), swatch, escape(entry.name), "" if pixels is None else f"{pixels:,}")
    return table


if __name__ == "__main__":
    sys.exit(main())
