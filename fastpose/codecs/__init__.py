"""Heatmap codecs: how keypoints become training targets and how network outputs become keypoints, side by side.

All positions are (x, y) in crop pixels, integer = pixel centre. Where heatmap cell k lies in a crop of w pixels and W
cells differs between codecs:

* `SoftmaxHeatmapCodec`: pixel ``stride * k + (stride - 1) / 2``, the centre of the pixels that the cell covers;
* `MSRAHeatmapCodec`, `DarkHeatmapCodec`: pixel ``stride * k``, as in HRNet, mmpose and most published weights;
* `UDPHeatmapCodec`: pixel ``k (w - 1) / (W - 1)``.

`AssociativeEmbeddingCodec` is for bottom-up networks, which see whole images.
"""

from __future__ import annotations

from fastpose.codecs.associative import AssociativeEmbeddingCodec
from fastpose.codecs.base import HeatmapCodec, heatmap_mse
from fastpose.codecs.dark import DarkHeatmapCodec
from fastpose.codecs.msra import MSRAHeatmapCodec
from fastpose.codecs.softmax import SoftmaxHeatmapCodec
from fastpose.codecs.udp import UDPHeatmapCodec

# for settings and weights files, which name a codec by its `type`; the first is meant where none is given
TopDownCodec = SoftmaxHeatmapCodec | MSRAHeatmapCodec | DarkHeatmapCodec | UDPHeatmapCodec
Codec = TopDownCodec | AssociativeEmbeddingCodec

CODECS: dict[str, type[Codec]] = {
    c.type: c
    for c in (SoftmaxHeatmapCodec, MSRAHeatmapCodec, DarkHeatmapCodec, UDPHeatmapCodec, AssociativeEmbeddingCodec)
}


def get_codec(name: str) -> Codec:
    """The codec called `name` with its defaults; raises ValueError with the known names otherwise."""
    if name not in CODECS:
        raise ValueError(f"unknown codec {name!r}; known: {', '.join(CODECS)}")
    return CODECS[name]()


__all__ = [
    "CODECS",
    "AssociativeEmbeddingCodec",
    "Codec",
    "DarkHeatmapCodec",
    "HeatmapCodec",
    "MSRAHeatmapCodec",
    "SoftmaxHeatmapCodec",
    "TopDownCodec",
    "UDPHeatmapCodec",
    "get_codec",
    "heatmap_mse",
]
