"""TIFF files of uncompressed single-sample pages, read at once.

An array of height x width x channels is often written with a page for each row. GDAL opens pages one by one, and walks
through all before the one that it opens, which takes far longer than the reading.
"""

import struct
from collections.abc import Mapping

import numpy as np

_ORDERS = {b"II*\0": "<", b"MM\0*": ">"}
# types that a number in a directory may have, by their codes
_LETTERS = {3: "H", 4: "I"}
# unsigned, signed, floating
_KINDS = {1: "u", 2: "i", 3: "f"}
_SUBFILE, _WIDTH, _HEIGHT, _BITS, _COMPRESSION, _OFFSETS, _SAMPLES, _COUNTS, _FORMAT, _NODATA = (
    *(254, 256, 257, 258, 259, 273, 277, 279),
    *(339, 42113),
)

Entry = tuple[int, int, int]


def read_plain_pages(content: bytes) -> np.ndarray | None:
    """Returns the pages of a file as (pages, height, width).

    Returns:
        None for any other TIFF, damaged ones among them: compressed, tiled, several samples a pixel, pages that are
        unlike, reduced copies or masks, with a value that means none, larger than 4 GB.
    """
    order = _ORDERS.get(content[:4])
    if order is None:
        return None
    pages: list[np.ndarray] = []
    held = 0
    try:
        (position,) = struct.unpack_from(f"{order}I", content, 4)
        while position:
            (number,) = struct.unpack_from(f"{order}H", content, position)
            end = position + 2 + 12 * number
            entries = struct.iter_unpack(f"{order}HHII", content[position + 2 : end])
            pages.append(_read_page(content, order, {tag: (kind, count, value) for tag, kind, count, value in entries}))
            held += pages[-1].nbytes + end - position
            # directories that lead back to each other, or to the same pixels, would fill the memory
            if held > len(content):
                return None
            (position,) = struct.unpack_from(f"{order}I", content, end)
        return np.stack(pages) if len({page.dtype for page in pages}) == 1 else None
    except (struct.error, ValueError, TypeError, LookupError):
        return None


def _read_page(content: bytes, order: str, entries: Mapping[int, Entry]) -> np.ndarray:
    """Returns one page (height, width), or raises ValueError, TypeError or LookupError where it is not plain."""

    def one(tag: int, default: int | None = None) -> int:
        if default is not None and tag not in entries:
            return default
        (value,) = _numbers(content, order, entries[tag])
        return value

    if _NODATA in entries or (one(_COMPRESSION, 1), one(_SAMPLES, 1), one(_SUBFILE, 0) & ~2) != (1, 1, 0):
        raise ValueError("not a plain page")
    shape = (one(_HEIGHT), one(_WIDTH))
    dtype = np.dtype(f"{order}{_KINDS[one(_FORMAT, 1)]}{one(_BITS) // 8}")
    if dtype.itemsize * 8 != one(_BITS):
        raise ValueError("not whole bytes")
    strips = zip(*(_numbers(content, order, entries[tag]) for tag in (_OFFSETS, _COUNTS)), strict=True)
    pixels = b"".join(content[start : start + size] for start, size in strips)
    # another number of bytes than the shape needs is a ValueError
    return np.frombuffer(pixels, dtype).reshape(shape).astype(dtype.newbyteorder("="), copy=False)


def _numbers(content: bytes, order: str, entry: Entry) -> tuple[int, ...]:
    kind, count, value = entry
    letters = f"{order}{count}{_LETTERS[kind]}"
    if struct.calcsize(letters) > 4:
        return struct.unpack_from(letters, content, value)
    return struct.unpack_from(letters, struct.pack(f"{order}I", value))
