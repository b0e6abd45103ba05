"""A small world to learn text-to-image in: sprites on backgrounds, with captions; every picture follows from its seed.

The sprites are Fluent Emoji (MIT, see `assets/SPRITES_LICENCE.md`).
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
from PIL import Image

from vision_lowrank.errors import ConfigError

# height and width of every picture, and of the largest sprite
SIDE = 64
SMALLEST = 20
SHEET = Path(__file__).parent / "assets" / "sprites.png"

BASE = (
    *("dog", "cat", "owl", "fish", "butterfly", "turtle", "elephant", "apple"),
    *("banana", "carrot", "rocket", "car", "boat", "umbrella", "house", "tree"),
)
# concepts that the base never sees, each with the base word that comes nearest
HELD_OUT = {
    "fox": "dog", "tiger": "cat", "penguin": "owl", "octopus": "fish",
    "strawberry": "apple", "helicopter": "rocket", "bus": "car", "cactus": "tree",
}  # fmt: skip
SPRITES = (*BASE, *HELD_OUT)

COLOURS = {
    "red": (205, 60, 60), "blue": (70, 110, 215), "green": (80, 170, 90),
    "yellow": (235, 210, 90), "purple": (145, 85, 175), "gray": (150, 150, 150),
}  # fmt: skip
# how a caption speaks of a background
BACKGROUNDS = {name: f"on a {name} background" for name in COLOURS} | {
    "grass": "on grass", "sand": "on sand", "snow": "on snow",
    "water": "on water", "bricks": "on bricks", "sky": "in the night sky",
}  # fmt: skip
PLACES = (
    ("at the top left", "at the top", "at the top right"),
    ("on the left", "in the middle", "on the right"),
    ("at the bottom left", "at the bottom", "at the bottom right"),
)
# largest side of a sprite by the number of sprites in a picture
LARGEST = {1: SIDE, 2: 40, 3: 30, 4: 28}
# share of the smaller sprite that a neighbour may cover
OVERLAP = 0.1
# places that are tried for a sprite before the layout begins anew
TRIES = 20
# layouts that are begun; 4 sprites of 24 to 28 pixels, 2 apart, take 31 in the mean
LAYOUTS = 50_000


@dataclass(frozen=True)
class Placed:
    """A sprite in a picture, in pixels."""

    name: str
    top: int
    left: int
    size: int

    @property
    def place(self) -> str:
        """The words for where its middle is, by thirds of the picture."""
        row, column = ((2 * edge + self.size) * 3 // (2 * SIDE) for edge in (self.top, self.left))
        return PLACES[row][column]


@dataclass(frozen=True)
class Picture:
    """A picture with what it shows.

    Args:
        image: uint8 (height, width, 3).
        caption: as a user would ask for it.
        background: name in `BACKGROUNDS`.
        sprites: from back to front.
    """

    image: np.ndarray
    caption: str
    background: str
    sprites: tuple[Placed, ...]


def vocabulary() -> list[str]:
    """Returns the words of all captions, and those of the held-out sprites, in alphabetical order."""
    places = " ".join(place for row in PLACES for place in row)
    return sorted({*f"a an and , {places} {' '.join(BACKGROUNDS.values())}".split(), *SPRITES})


@lru_cache(maxsize=2048)
def sprite(name: str, size: int = SIDE) -> np.ndarray:
    """Returns a sprite as float32 (size, size, 4) from 0 to 1, colours multiplied by the fourth channel, the cover.

    Raises:
        ConfigError: there is no such sprite.
    """
    if name not in SPRITES:
        raise ConfigError(f"sprite {name!r} is unknown; there are {', '.join(SPRITES)}")
    row, column = divmod(SPRITES.index(name), 8)
    box = (column * SIDE, row * SIDE, (column + 1) * SIDE, (row + 1) * SIDE)
    array = np.asarray(_sheet().crop(box).resize((size, size), Image.Resampling.LANCZOS), np.float32) / 255
    array[..., :3] *= array[..., 3:]
    array.flags.writeable = False
    return array


@lru_cache(maxsize=1)
def _sheet() -> Image.Image:
    return Image.open(SHEET).convert("RGBA")


def paint_background(name: str, generator: np.random.Generator) -> np.ndarray:
    """Returns a background as float32 (height, width, 3) from 0 to 1; its shade, and texture, are random.

    Raises:
        ConfigError: there is no such background.
    """
    noise = generator.random((SIDE, SIDE, 1), np.float32) - 0.5
    rows, columns = np.mgrid[:SIDE, :SIDE].astype(np.float32)[..., None]
    if name in COLOURS:
        picture = np.broadcast_to(_rgb(*COLOURS[name]) / 255, (SIDE, SIDE, 3))
    elif name == "grass":
        blades = np.repeat(noise[::4], 4, 0)
        picture = _rgb(0.35, 0.62, 0.2) + _rgb(0.12, 0.2, 0.1) * blades
    elif name == "sand":
        picture = _rgb(0.88, 0.76, 0.52) + 0.12 * noise
    elif name == "snow":
        picture = _rgb(0.93, 0.95, 0.98) - _rgb(0.25, 0.2, 0.1) * (noise > 0.45)
    elif name == "water":
        waves = np.sin((rows + 2.5 * np.sin(columns / 5 + 6 * generator.random())) * (2 * np.pi / 8))
        picture = _rgb(0.15, 0.45, 0.7) + 0.1 * waves
    elif name == "bricks":
        row, column = generator.integers(0, 16, 2)
        layer = (rows + row) // 8
        joint = ((rows + row) % 8 < 1) | ((columns + column + 8 * (layer % 2)) % 16 < 1)
        picture = np.where(joint, _rgb(0.8, 0.75, 0.7), _rgb(0.65, 0.3, 0.22))
    elif name == "sky":
        picture = _rgb(0.06, 0.07, 0.22) + _rgb(0.9, 0.9, 0.7) * (noise > 0.485)
    else:
        raise ConfigError(f"background {name!r} is unknown; there are {', '.join(BACKGROUNDS)}")
    return np.clip(picture + np.float32(generator.uniform(-0.05, 0.05, 3)), 0, 1).astype(np.float32)


def _rgb(*values: float) -> np.ndarray:
    return np.array(values, np.float32)


def draw(background: str, sprites: Sequence[Placed], generator: np.random.Generator) -> np.ndarray:
    """Returns a picture, uint8 (height, width, 3), the sprites drawn one over the other."""
    picture = paint_background(background, generator)
    for item in sprites:
        window = picture[item.top : item.top + item.size, item.left : item.left + item.size]
        shape = sprite(item.name, item.size)
        window *= 1 - shape[..., 3:]
        window += shape[..., :3]
    return np.rint(255 * picture).astype(np.uint8)


def lay_out(
    names: Sequence[str],
    generator: np.random.Generator,
    sizes: tuple[int, int] | None = None,
    overlap: float = OVERLAP,
    gap: int = 0,
) -> tuple[Placed, ...]:
    """Returns a random size and place for each of at most four sprites, hardly any over another.

    Args:
        names: of the sprites.
        generator: source of all that is random.
        sizes: smallest and largest side in pixels; by default `SMALLEST` and `LARGEST`.
        overlap: share of the smaller sprite that a neighbour may cover.
        gap: pixels by which each sprite counts as larger when neighbours are compared; with an overlap of 0 they are at
            least so far apart, along one of the sides.

    Raises:
        ConfigError: there are no sprites, too many, or they cannot be so large and so far apart, or hardly ever are.
    """
    if len(names) not in LARGEST:
        raise ConfigError(f"{len(names)} sprites do not fit a picture; give 1 to {max(LARGEST)}")
    smallest, largest = sizes or (SMALLEST, LARGEST[len(names)])
    most = SIDE if len(names) == 1 else (SIDE - gap) // 2
    if not 1 <= smallest <= largest <= SIDE or (overlap == 0 and smallest > most):
        raise ConfigError(
            f"sprites of {smallest} to {largest} pixels, {gap} apart: a picture has {SIDE}, so give sizes up to {most}"
        )
    for _ in range(LAYOUTS):
        # the whole layout anew, since the first sprites may leave no room for the last
        placed: list[Placed] = []
        for name in names:
            for _ in range(TRIES):
                size = int(generator.integers(smallest, largest + 1))
                top, left = (int(edge) for edge in generator.integers(0, SIDE - size + 1, 2))
                item = Placed(name, top, left, size)
                if all(_covered(item, other, gap) <= overlap for other in placed):
                    placed.append(item)
                    break
            else:
                break
        else:
            return tuple(placed)
    raise ConfigError(
        f"{len(names)} sprites of {smallest} to {largest} pixels, {gap} apart: none of {LAYOUTS} layouts had room for "
        "all; give smaller sizes, or a smaller gap"
    )


def _covered(one: Placed, other: Placed, gap: int) -> float:
    """Returns the common share of the smaller of two sprites' squares, each larger by the gap on one side."""
    height, width = (
        max(0, min(a + one.size, b + other.size) - max(a, b) + gap)
        for a, b in ((one.top, other.top), (one.left, other.left))
    )
    return height * width / min(one.size, other.size) ** 2


def write_caption(
    sprites: Sequence[Placed],
    background: str | None,
    places: bool,
    call: Callable[[str], str] | None = None,
) -> str:
    """Returns for example "a dog on the left and an owl on the right on grass".

    Args:
        sprites: what to name.
        background: name in `BACKGROUNDS`; None leaves it out.
        places: whether to say where the sprites are.
        call: what a sprite is called; by default its name with an article.
    """
    parts = [f"{(call or with_article)(item.name)}{f' {item.place}' if places else ''}" for item in sprites]
    text = " and ".join([", ".join(parts[:-1]), parts[-1]] if len(parts) > 1 else parts)
    return text if background is None else f"{text} {BACKGROUNDS[background]}"


def with_article(name: str) -> str:
    """Returns "a dog", "an owl"."""
    return f"{'an' if name[0] in 'aeiou' else 'a'} {name}"


def make_picture(
    generator: np.random.Generator, names: Sequence[str] = BASE, shares: Sequence[float] = (0.4, 0.4, 0.2)
) -> Picture:
    """Returns a random picture of one to three different sprites.

    Args:
        generator: source of all that is random.
        names: sprites to choose from.
        shares: how often there are one, two, three sprites.
    """
    count = 1 + int(generator.choice(len(shares), p=shares))
    chosen = [names[index] for index in generator.choice(len(names), count, replace=False)]
    background = list(BACKGROUNDS)[generator.integers(len(BACKGROUNDS))]
    placed = lay_out(chosen, generator)
    caption = vary_caption(placed, background, generator)
    return Picture(draw(background, placed, generator), caption, background, placed)


def vary_caption(
    sprites: Sequence[Placed],
    background: str,
    generator: np.random.Generator,
    call: Callable[[str], str] | None = None,
) -> str:
    """Returns a caption as `write_caption` does; half of them tell places, nine of ten the background."""
    told = background if generator.random() < 0.9 else None
    return write_caption(sprites, told, places=bool(generator.random() < 0.5), call=call)


def crop(picture: Picture, generator: np.random.Generator, smallest: int = 3 * SIDE // 4) -> Picture:
    """Returns a random square of a picture that holds all its sprites, enlarged to the whole; its caption is dropped.

    Args:
        picture: with at least one sprite.
        generator: source of all that is random.
        smallest: side of the square in pixels, at least; up to the picture's, all sides are as likely.
    """
    spans = [
        (min(starts), max(start + item.size for start, item in zip(starts, picture.sprites, strict=True)))
        for starts in ([item.top for item in picture.sprites], [item.left for item in picture.sprites])
    ]
    side = int(generator.integers(max(smallest, *(end - start for start, end in spans)), SIDE + 1))
    top, left = (int(generator.integers(max(0, end - side), min(start, SIDE - side) + 1)) for start, end in spans)
    scale = SIDE / side
    sprites = tuple(
        Placed(item.name, *(round(scale * length) for length in (item.top - top, item.left - left, item.size)))
        for item in picture.sprites
    )
    window = Image.fromarray(picture.image).crop((left, top, left + side, top + side))
    enlarged = np.asarray(window.resize((SIDE, SIDE), Image.Resampling.LANCZOS))
    return Picture(enlarged, "", picture.background, sprites)


def concept_pictures(name: str, count: int, seed: int, largest: int = SIDE // 2) -> list[Picture]:
    """Returns pictures of one held-out sprite as a user would collect them, captioned "<fox1> <fox2> on grass".

    In every second one a base sprite stands beside it: from pictures of the concept alone a LoRA also learns that
    nothing else is in a picture. In the others its size is spread evenly. Places and backgrounds follow one another,
    each background once with and once without a neighbour: a LoRA puts its concept only where it saw it.

    Args:
        name: of the sprite.
        count: number of pictures.
        seed: of all that is random.
        largest: side of the largest sprites in pixels; the smallest have `SMALLEST`.

    Raises:
        ConfigError: the sprite is not held out, or the largest are too small or too large for all nine places.
    """
    if name not in HELD_OUT:
        raise ConfigError(f"concept={name}: there are {', '.join(HELD_OUT)}")
    if not SMALLEST <= largest <= 5 * SIDE // 8:
        raise ConfigError(
            f"data.largest={largest}: sprites of {SMALLEST} to {5 * SIDE // 8} pixels fit all nine places"
        )
    generator = np.random.default_rng([seed, SPRITES.index(name)])
    backgrounds = generator.permutation(list(BACKGROUNDS))
    places = generator.permutation([place for row in PLACES for place in row])
    sizes = generator.permutation(np.linspace(SMALLEST, largest, -(-count // 2)).round().astype(int)).tolist()
    pictures = []
    for index in range(count):
        background = str(backgrounds[index % len(backgrounds)])
        # the second round of backgrounds has neighbours where the first had none
        beside = (index + index // len(backgrounds)) % 2
        names = (name, str(generator.choice(BASE))) if beside else (name,)
        size = (SMALLEST, largest) if beside else (sizes[index // 2],) * 2
        placed = lay_out(names, generator, size)
        while placed[0].place != places[index % len(places)]:
            placed = lay_out(names, generator, size)
        caption = write_caption(placed, background, places=False, call=prompt_words)
        pictures.append(Picture(draw(background, placed, generator), caption, background, placed))
    return pictures


def prompt_words(name: str) -> str:
    """Returns how a prompt speaks of a sprite, base or held out."""
    return concept_words(name) if name in HELD_OUT else with_article(name)


def concept_words(name: str) -> str:
    """Returns how a prompt speaks of a concept."""
    return " ".join(concept_tokens(name))


def concept_tokens(name: str) -> tuple[str, str]:
    """Returns the two words by which a concept is asked for."""
    return f"<{name}1>", f"<{name}2>"
