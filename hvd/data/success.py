"""Whether an episode succeeded, as datasets say it: true or false, 1 or 0, or a word. All else is refused."""

from typing import Any

import numpy as np
import pyarrow as pa
from jaxtyping import Bool

from hvd.errors import UserError

_YES = ("true", "t", "yes", "y", "1", "1.0", "success", "successful", "succeeded")
_NO = ("false", "f", "no", "n", "0", "0.0", "failure", "fail", "failed", "unsuccessful")
_WORDS: dict[str, bool] = {**dict.fromkeys(_YES, True), **dict.fromkeys(_NO, False)}


def truth(value: Any, where: str) -> bool | None:
    """What `value` says; None when it says nothing (null, NaN). UserError, named by `where`, for anything else."""
    while isinstance(value, list) and len(value) == 1:
        value = value[0]
    if value is None or (isinstance(value, float) and value != value):
        return None
    if isinstance(value, bool | int | float) and value in (0, 1):
        return bool(value)
    known = _WORDS.get(value.strip().lower()) if isinstance(value, str) else None
    if known is None:
        raise UserError(f"{where}: success is {str(value)[:60]!r}; write true or false")
    return known


def of_rows(column: pa.ChunkedArray, where: str) -> Bool[np.ndarray, " n"]:
    """What each row of a per-frame column says; `where` names the file and the column."""
    said = column.to_pylist()
    if said and not isinstance(said[0], list):  # many equal values: each is looked at once
        each = {value: truth(value, where) for value in dict.fromkeys(said)}
        found = [each[value] for value in said]
    else:
        found = [truth(value, where) for value in said]
    if None in found:
        raise UserError(f"{where}: row {found.index(None)} says nothing (null or NaN); write true or false")
    return np.asarray(found, bool)
