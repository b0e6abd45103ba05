"""Pages of TIFF files against what GDAL and Pillow read of them, and what is left to these."""

import io
import struct

import numpy as np
import pytest
import rasterio
from PIL import Image, ImageSequence
from rasterio.io import MemoryFile
from task_archives import pages_tiff, samples_tiff

from vision_lowrank.data.plain_tiff import read_plain_pages
from vision_lowrank.data.task_tiles import read_tiff
from vision_lowrank.errors import DataError

pytestmark = pytest.mark.filterwarnings("ignore::rasterio.errors.NotGeoreferencedWarning")


def values(dtype, shape=(5, 7, 6)):
    numbers = np.random.default_rng(2).integers(0, 250, shape)
    return (numbers / 7 if np.dtype(dtype).kind == "f" else numbers).astype(dtype)


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.int32, np.float32])
def test_pages_are_those_that_pillow_reads(dtype):
    content = pages_tiff(values(dtype))
    expected = np.stack([np.array(page) for page in ImageSequence.Iterator(Image.open(io.BytesIO(content)))])
    found = read_plain_pages(content)
    assert found.dtype == dtype
    np.testing.assert_array_equal(found, expected)


def test_pages_that_say_that_they_are_pages_are_read():
    """As tifffile marks them: 2 means a page of several, 1 a reduced copy."""
    image = values(np.uint16)
    for mark, expected in ((2, image), (1, None), (3, None)):
        buffer = io.BytesIO()
        first, *rest = [Image.fromarray(page) for page in image]
        first.save(buffer, "TIFF", save_all=True, append_images=rest, tiffinfo={254: mark})
        np.testing.assert_array_equal(read_plain_pages(buffer.getvalue()), expected)


@pytest.mark.parametrize("dtype", ["uint8", "int16", "uint32", "float32", "float64"])
@pytest.mark.parametrize("options", [{"ENDIANNESS": "BIG"}, {"ENDIANNESS": "LITTLE"}, {"BLOCKYSIZE": 2}])
def test_single_pages_are_those_that_gdal_reads(dtype, options):
    """Of either order of bytes, in one strip or several."""
    with MemoryFile() as memory:
        profile = {"count": 1, "height": 7, "width": 6, "dtype": dtype, **options}
        with memory.open(driver="GTiff", **profile) as file:
            file.write(values(dtype, (1, 7, 6)))
        content = memory.read()
    assert content[:2] == (b"MM" if options.get("ENDIANNESS") == "BIG" else b"II")
    found = read_plain_pages(content)
    assert (found.dtype, found.dtype.isnative) == (np.dtype(dtype), True)
    with MemoryFile(content) as memory, memory.open() as file:
        np.testing.assert_array_equal(found, file.read())


def test_files_of_many_pages_do_not_go_through_gdal(monkeypatch):
    image = values(np.uint16, (5, 9, 9))
    monkeypatch.setattr(rasterio, "open", None)
    for content in (pages_tiff(image), pages_tiff(image.transpose(1, 2, 0))):
        np.testing.assert_array_equal(read_tiff(content, 5, "tile.tif"), image)


def compressed(image):
    buffer = io.BytesIO()
    first, *rest = [Image.fromarray(page) for page in image]
    first.save(buffer, "TIFF", save_all=True, append_images=rest, compression="tiff_lzw")
    return buffer.getvalue()


def with_overview(image):
    with MemoryFile() as memory:
        with memory.open(driver="GTiff", count=1, height=64, width=64, dtype="uint16") as file:
            file.write(np.arange(64 * 64, dtype=np.uint16).reshape(1, 64, 64))
            file.build_overviews([2])
        return memory.read()


def unlike(image):
    buffer = io.BytesIO()
    pages = [Image.fromarray(values(np.uint16, shape)) for shape in ((7, 6), (6, 7))]
    pages[0].save(buffer, "TIFF", save_all=True, append_images=pages[1:])
    return buffer.getvalue()


@pytest.mark.parametrize(
    "write",
    [
        *(compressed, with_overview, unlike, samples_tiff, lambda image: samples_tiff(image, "band")),
        lambda image: samples_tiff(image[:1], nodata=7),
    ],
)
def test_other_files_are_left_to_gdal(write):
    assert read_plain_pages(write(values(np.uint16))) is None


def test_damage_is_left_to_gdal_and_told_by_the_name_of_the_file():
    image = values(np.uint16, (5, 9, 9))
    content = pages_tiff(image)
    (start,) = struct.unpack_from("<I", content, 4)
    (number,) = struct.unpack_from("<H", content, start)
    link = start + 2 + 12 * number
    in_a_circle = content[:link] + struct.pack("<I", start) + content[link + 4 :]
    beyond = content[:link] + struct.pack("<I", len(content)) + content[link + 4 :]
    # a hundred pages out of the same pixels
    bomb = pages_tiff(np.zeros((1, 300, 300), np.uint8))
    (start,) = struct.unpack_from("<I", bomb, 4)
    (number,) = struct.unpack_from("<H", bomb, start)
    directory = bomb[start : start + 2 + 12 * number]
    for index in range(100):
        bomb += directory + struct.pack("<I", len(bomb) + len(directory) + 4 if index < 99 else 0)
    bomb = bomb[:4] + struct.pack("<I", len(bomb) - 100 * (len(directory) + 4)) + bomb[8:]
    for damaged in (content[:-40], content[: len(content) // 2], in_a_circle, beyond, bomb, b"II*\0", content[:7]):
        assert read_plain_pages(damaged) is None
    with pytest.raises(DataError, match=r"tile\.tif: no TIFF, or damaged"):
        read_tiff(content[:12], 5, "tile.tif")
    # any byte changed leads to pages or to None, not to another error
    generator = np.random.default_rng(4)
    for place in generator.integers(0, len(content), 300).tolist():
        changed = bytearray(content)
        changed[place] ^= int(generator.integers(1, 256))
        found = read_plain_pages(bytes(changed))
        assert found is None or found.ndim == 3
