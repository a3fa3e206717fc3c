"""llama.cpp's type for signs."""

import numpy as np
from numpy.typing import NDArray


def decode_q1_0(data: NDArray[np.uint8]) -> NDArray[np.float32]:
    """By the letter of llama.cpp: a float16, then 128 bits, least significant first, 1 for plus."""
    blocks = data.reshape(len(data), -1, 18)
    scales = blocks[..., :2].copy().view(np.float16).astype(np.float32)
    bits = np.unpackbits(blocks[..., 2:], axis=-1, bitorder="little").astype(np.float32)
    return (scales * (2 * bits - 1)).reshape(len(data), -1)
