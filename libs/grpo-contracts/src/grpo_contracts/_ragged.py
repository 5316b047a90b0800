"""Ragged rows of numbers, as one array padded on the right."""

from __future__ import annotations

from typing import Any

import numpy as np

from ._arrays import describe, is_array
from ._errors import broken
from ._reader import read


def pad_ragged(
    ragged: Any, name: str, dtype: type, *, rows: int | None = None, width: int | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Ragged rows as one array, padded with zeros on the right, and a mask of what is not padding.

    Args:
        ragged: a list of rows.
        name: the argument it was given as, for errors.
        dtype: `np.int32` for token ids, otherwise a floating type.
        rows: how many rows it must have; None for any number but 0.
        width: columns of the result; those of the longest row if None.

    Returns:
        (array, mask).

    Raises:
        ContractError: wrong number of rows, or a row that is empty, too long or not of numbers.
    """
    listed = isinstance(ragged, list | tuple) or (is_array(ragged) and ragged.ndim > 0)
    if not listed or len(ragged) != (rows or len(ragged) or 1):
        expected = "a list of rows, at least one" if rows is None else f"a list of {rows} rows"
        raise broken("argument", name, "rows", expected, f"{len(ragged)} rows" if listed else describe(ragged))
    arrays = [_read_row(row, name, i, dtype, width) for i, row in enumerate(ragged)]
    padded = np.zeros((len(arrays), max(map(len, arrays)) if width is None else width), dtype)
    mask = np.zeros(padded.shape, bool)
    for i, array in enumerate(arrays):
        padded[i, : len(array)] = array
        mask[i, : len(array)] = True
    return padded, mask


def _read_row(row: Any, name: str, index: int, dtype: type, width: int | None) -> np.ndarray:
    array = read(row, "argument", name)
    ids = dtype is np.int32
    if array.ndim != 1 or not len(array) or array.dtype.kind not in ("iu" if ids else "iuf"):
        expected = "at least one token id" if ids else "at least one number"
        came = f"{array.dtype}{list(array.shape)}" if array.size else "an empty row"
        raise broken("argument", name, "row", expected, came, index=(index,))
    if ids and not ((array >= 0) & (array < 2**31)).all():
        came = f"{array.min()}..{array.max()}"
        raise broken("argument", name, "range", "token ids in [0, 2**31)", came, index=(index,))
    if width is not None and len(array) > width:
        raise broken("argument", name, "length", f"at most {width} tokens long", len(array), index=(index,))
    return array
