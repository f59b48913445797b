"""What a predictor has learnt, as bytes: npz, read without unpickling."""

import io
import zipfile

import numpy as np

from uellm.core.errors import InvalidArgumentError
from uellm.prediction.interface import State


def pack(state: State) -> bytes:
    """A state as bytes."""
    buffer = io.BytesIO()
    np.savez_compressed(buffer, allow_pickle=False, **state)
    return buffer.getvalue()


def unpack(packed: bytes) -> State:
    """The state behind bytes.

    Raises:
        InvalidArgumentError: if they are not a state, or hold objects.
    """
    try:
        with np.load(io.BytesIO(packed), allow_pickle=False) as arrays:
            return {name: arrays[name] for name in arrays.files}
    except (ValueError, OSError, EOFError, zipfile.BadZipFile, TypeError, AttributeError) as error:
        raise InvalidArgumentError(f"state: not npz of plain arrays ({error})") from error
