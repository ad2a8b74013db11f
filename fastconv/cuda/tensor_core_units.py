"""What tensor cores multiply: how numbers become the words of its tiles, and which products of planes are summed.

float16 and bfloat16 are multiplied as they are. A float32 is rounded, or split into planes, each the rounded rest of
those before:

    x = h + m + l        x*w = hh + (hm + mh) + (hl + mm + lh) + (terms left out)

tf32 has 11 bits, bfloat16 8: two planes of tf32 or three of bfloat16 hold a float32 but for its last bits (Henry, Tang
& Heinecke, "Leveraging the bfloat16 artificial intelligence datatype for higher-precision computations", 2019). Tensor
cores do not round their sums to nearest: products of planes of one step are summed there, and the steps outside, as in
Ootomo & Yokota, "Recovering single precision accuracy from tensor cores while surpassing the FP32 theoretical peak
performance", 2022.

Planes of bfloat16 are made before they are multiplied, by a launch of its own. Of tf32 there is one plane in memory,
the float32 itself: the units do not read the bits that tf32 lacks, so that pixels are cut off rather than rounded, and
the rest is a subtraction in registers.

What is multiplied lies in 32-bit words, four of which are a chunk: each is one number, or two, the first in the lower
half.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from . import toolchain
from .ptx import (
    bits_float,
    float_bits,
    mma_m16n8k8_tf32,
    mma_m16n8k16_bfloat16,
    mma_m16n8k16_float16,
    pack_bfloat16,
    pack_float16,
    tf32,
    wgmma_m64n128k16_bfloat16,
    wgmma_m64n128k16_float16,
    wgmma_m64n256k16_bfloat16,
    wgmma_m64n256k16_float16,
)

toolchain.import_cuda()

from numba.cuda.types import float32, uint32  # noqa: E402


class Units(NamedTuple):
    """How numbers are multiplied.

    Attributes
    ----------
    mma : instruction
        A product of two chunks of depth.
    chunk : int
        Numbers of a chunk.
    planes : int
        Of each factor, as multiplied; products are those of planes p and q with p + q < planes.
    encode, encode_pixels : function
        Of (values, words): a chunk of float32 numbers to 4 words for each plane, of the weight and of pixels.
    split : function or None
        Of (words, count, planes, at): makes planes of words in registers, from register `at` on.
    plain : bool
        Whether pixels are multiplied, or split, as they lie in memory.
    rate : str
        The peak that it is held to, see `roofline.Peak`.
    warpgroup : tuple of instructions
        Products of four warps with 128 and with 256 columns, if there are such on sm_90a.
    """

    name: str
    mma: Any
    chunk: int
    planes: int
    encode: Callable[..., None]
    encode_pixels: Callable[..., None]
    split: Callable[..., None] | None
    plain: bool
    rate: str
    warpgroup: tuple[Any, ...] = ()

    @property
    def pixel_planes(self) -> int:
        """Planes of pixels in memory."""
        return 1 if self.plain else self.planes

    @property
    def products(self) -> int:
        """Products of planes."""
        return self.planes * (self.planes + 1) // 2


def _encode_float16(values, words):
    for i in range(4):
        words[i] = pack_float16(values[2 * i], values[2 * i + 1])


def _encode_bfloat16(planes: int) -> Any:
    def encode_bfloat16(values, words):
        for i in range(4):
            low, high = values[2 * i], values[2 * i + 1]
            for p in range(planes):
                word = pack_bfloat16(low, high)
                words[4 * p + i] = word
                low = float32(low - bits_float(uint32(word << uint32(16))))
                high = float32(high - bits_float(uint32(word & uint32(0xFFFF0000))))

    return encode_bfloat16


def _encode_tf32(planes: int) -> Any:
    def encode_tf32(values, words):
        for i in range(4):
            rest = values[i]
            for p in range(planes):
                word = tf32(rest)
                words[4 * p + i] = word
                rest = float32(rest - bits_float(word))

    return encode_tf32


def _encode_bits(values, words):
    for i in range(4):
        words[i] = float_bits(values[i])


def _split_tf32(words, count, planes, at):
    for i in range(count):
        rest = float32(bits_float(words[i]) - bits_float(uint32(words[i] & uint32(0xFFFFE000))))
        planes[at + i], planes[at + count + i] = words[i], float_bits(rest)


def _bfloat16_units(planes: int, plain: bool = False) -> Units:
    encode, warpgroup = _encode_bfloat16(planes), (wgmma_m64n128k16_bfloat16, wgmma_m64n256k16_bfloat16)
    return Units(f"bfloat16_{planes}", mma_m16n8k16_bfloat16, 8, planes, encode, encode, None, plain, "half", warpgroup)


def _tf32_units(planes: int) -> Units:
    split = _split_tf32 if planes == 2 else None
    return Units(f"tf32_{planes}", mma_m16n8k8_tf32, 4, planes, _encode_tf32(planes), _encode_bits, split, True, "tf32")


FLOAT16 = Units(
    "float16", mma_m16n8k16_float16, 8, 1, _encode_float16, _encode_float16, None, True, "half",
    (wgmma_m64n128k16_float16, wgmma_m64n256k16_float16),
)  # fmt: skip
BFLOAT16 = _bfloat16_units(1, True)
BFLOAT16_PLANES = {planes: _bfloat16_units(planes) for planes in (1, 2, 3)}
TF32_PLANES = {planes: _tf32_units(planes) for planes in (1, 2)}
