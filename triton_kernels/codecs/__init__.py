"""The table of storage formats.  A new codec is one file and one name in it."""

from .base import Codec, Plane, Tile
from .exact import EXACT
from .integer import INT4_CHANNEL, INT4_HADAMARD, INT8_AFFINE, INT8_CHANNEL
from .lmdeploy_token import INT4_TOKEN, INT8_TOKEN
from .octet import OCTET2, OCTET3
from .ranked import INT2_RANKED, INT3_RANKED, INT4_RANKED
from .small_float import FP8, NVFP4
from .static import INT8_STATIC
from .three_bit import LLOYD3, LLOYD3_CHANNEL
from .turboquant import LLOYD2, LLOYD4_CENTRED
from .turboquant_qjl import LLOYD2_PLAIN, LLOYD3_SIGN

__all__ = ["CODECS", "Codec", "Plane", "Tile", "likeness"]

CODECS: dict[str, Codec] = {
    codec.name: codec
    for codec in (
        EXACT,
        INT8_CHANNEL,
        INT8_AFFINE,
        INT4_CHANNEL,
        INT4_HADAMARD,
        INT4_RANKED,
        INT3_RANKED,
        INT2_RANKED,
        LLOYD3_CHANNEL,
        LLOYD4_CENTRED,
        LLOYD3,
        LLOYD2,
        OCTET3,
        OCTET2,
        # LMDeploy's formulae, for comparison.
        INT8_TOKEN,
        INT4_TOKEN,
        LLOYD3_SIGN,
        LLOYD2_PLAIN,
        INT8_STATIC,
        # What other engines ship.
        FP8,
        NVFP4,
    )
}


def likeness(codec: Codec) -> Codec:
    """The codec of the table that is like ``codec`` but for planes per layer, or ``codec`` where there is none.

    Kernels are the same for both, and the one of the table stands for all layers.
    """
    known = CODECS.get(codec.name)
    return known if known is not None and codec.calibrated and known.calibrated else codec
