"""MobilePoseNet: S. Niu et al., "Designing Compact Convolutional Filters for Lightweight Human Pose Estimation", 2021.

A MobileNetV3 encoder that stops at 1/16 resolution (Table 1), two lightweight upsampling blocks (LPB, Section 3.1,
Figure 3b) and a 1x1 heatmap layer at 1/4 resolution.

The paper published no code and leaves these points open. What we chose, and why:

* Expansion of block 14. Table 1 prints 960; with 672 the parameter count is 1.505 M and the cost 557 M, the published
  1.5 M / 557 M. With 960 it would be 1.606 M / 576 M.
* Squeeze-and-excitation acts on the block *output* (after the 1x1 projection, before the identity), reduction 4. On the
  expanded features, as MobileNetV3 itself does, the network would have 2.73 M parameters. ``se_position="expand"``
  builds that variant.
* The table lists a ReLU after the heatmap layer. It would zero the gradient of every negative output, so it is left
  out.
* Ablations: V1 and V2 use dense 4x4 transposed convolutions instead of the LPB (that difference is exactly the
  published 2.1 M against 1.5 M). V1 has stride 2 in block 13 and three of them, V2 stride 1 and two.
* Initialisation is not stated; PyTorch's default is kept.

Multiply-accumulates at 256x192 and 17 keypoints: 557,328,992 (parameters 1,505,279).
"""

# no `from __future__ import annotations` here: TorchScript must see Final[...] itself, not its text

from dataclasses import dataclass, replace
from typing import Any, Final

from torch import Tensor, nn

from fastpose.layers import ConvBNAct, DWUpsampleBNAct, SqueezeExcite, check_images, check_num_keypoints
from fastpose.models._registry import Published, register_model

# One row of Table 1: kernel, expansion width, output width, squeeze-and-excitation, activation, stride.
Row = tuple[int, int, int, bool, str, int]

TABLE_1: tuple[Row, ...] = (
    (3, 16, 16, False, "relu", 1),
    (3, 64, 24, False, "relu", 2),
    (3, 72, 24, False, "relu", 1),
    (5, 72, 40, True, "relu", 2),
    (5, 120, 40, True, "relu", 1),
    (5, 120, 40, True, "relu", 1),
    (3, 240, 80, False, "hardswish", 2),
    (3, 200, 80, False, "hardswish", 1),
    (3, 184, 80, False, "hardswish", 1),
    (3, 184, 80, False, "hardswish", 1),
    (3, 480, 112, True, "hardswish", 1),
    (3, 672, 112, True, "hardswish", 1),
    (5, 672, 160, True, "hardswish", 1),
    (5, 672, 160, True, "hardswish", 1),
    (5, 960, 160, True, "hardswish", 1),
)


@dataclass(frozen=True)
class MobilePoseNetConfig:
    """Shape of a MobilePoseNet. `upsampling` is ``"lpb"`` (the paper's block) or ``"dense"`` (the ablations)."""

    num_keypoints: int = 17
    blocks: tuple[Row, ...] = TABLE_1
    se_position: str = "output"
    se_ratio: int = 4
    upsampling: str = "lpb"
    upsampling_blocks: int = 2
    upsampling_width: int = 160
    upsampling_expansion: int = 320

    def __post_init__(self) -> None:
        check_num_keypoints(self.num_keypoints)
        if self.se_position not in ("output", "expand"):
            raise ValueError(f"se_position must be 'output' or 'expand', got {self.se_position!r}")
        if self.upsampling not in ("lpb", "dense"):
            raise ValueError(f"upsampling must be 'lpb' or 'dense', got {self.upsampling!r}")


class InvertedResidual(nn.Module):
    """MobileNetV3 bottleneck: 1x1 expand, depthwise k x k, 1x1 project, squeeze-and-excitation, identity."""

    identity: Final[bool]

    def __init__(self, in_channels: int, row: Row, se_position: str, se_ratio: int) -> None:
        super().__init__()
        k, width, out_channels, se, act, stride = row
        self.expand = ConvBNAct(in_channels, width, act=act)
        self.depthwise = ConvBNAct(width, width, k, stride, groups=width, act=act)
        self.se_expand = SqueezeExcite(width, se_ratio) if se and se_position == "expand" else nn.Identity()
        self.project = ConvBNAct(width, out_channels)
        self.se_output = SqueezeExcite(out_channels, se_ratio) if se and se_position == "output" else nn.Identity()
        self.identity = stride == 1 and in_channels == out_channels

    def forward(self, x: Tensor) -> Tensor:
        y = self.se_output(self.project(self.se_expand(self.depthwise(self.expand(x)))))
        return x + y if self.identity else y


class LPB(nn.Module):
    """Lightweight upsampling block (Figure 3b): 1x1 expand, depthwise transposed 4x4, 1x1 project, Eq. 5."""

    def __init__(self, in_channels: int, width: int, out_channels: int, se_ratio: int) -> None:
        super().__init__()
        self.expand = ConvBNAct(in_channels, width, act="relu")
        self.upsample = DWUpsampleBNAct(width, act="relu")
        self.project = ConvBNAct(width, out_channels)
        self.attention = SqueezeExcite(out_channels, se_ratio, residual=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.attention(self.project(self.upsample(self.expand(x))))


class DenseUpsample(nn.Sequential):
    """The ablations' upsampling: dense transposed 4x4 convolution, batch norm, ReLU."""

    def __init__(self, in_channels: int, out_channels: int) -> None:
        conv = nn.ConvTranspose2d(in_channels, out_channels, 4, 2, 1, bias=False)
        super().__init__(conv, nn.BatchNorm2d(out_channels), nn.ReLU())


class MobilePoseNet(nn.Module):
    """Images [B, 3, H, W] with H, W multiples of `input_multiple` -> heatmaps [B, K, H/4, W/4]."""

    input_multiple: Final[int]

    def __init__(self, config: MobilePoseNetConfig) -> None:
        super().__init__()
        self.config = config
        self.stem = ConvBNAct(3, 16, 3, 2, act="hardswish")
        blocks: list[nn.Module] = []
        channels, multiple = 16, 2
        for row in config.blocks:
            blocks.append(InvertedResidual(channels, row, config.se_position, config.se_ratio))
            channels, multiple = row[2], multiple * row[5]
        self.blocks = nn.Sequential(*blocks)
        decoder: list[nn.Module] = []
        for _ in range(config.upsampling_blocks):
            width = config.upsampling_width
            if config.upsampling == "lpb":
                decoder.append(LPB(channels, config.upsampling_expansion, width, config.se_ratio))
            else:
                decoder.append(DenseUpsample(channels, width))
            channels = width
        self.decoder = nn.Sequential(*decoder)
        self.head = nn.Conv2d(channels, config.num_keypoints, 1)
        self.input_multiple = multiple

    def forward(self, x: Tensor) -> Tensor:
        check_images(x, self.input_multiple, "MobilePoseNet")
        return self.head(self.decoder(self.blocks(self.stem(x))))


PAPER = "Niu et al. 2021"


@register_model(
    published=(
        Published(PAPER, (256, 192), 1.5, 0.557, "1e9", "AP 66.2 COCO val"),
        Published(PAPER, (384, 288), 1.5, 1.23, "?", "AP 69.0 COCO val"),
        Published(PAPER, (256, 256), 1.5, 0.74, "1e9", "PCKh@0.5 87.3 MPII val"),
    )
)
def mobileposenet(**changes: Any) -> MobilePoseNet:
    """MobilePoseNet as in Table 1: 1,505,279 parameters, 557,328,992 multiply-accumulates at 256x192, 17 keypoints."""
    return MobilePoseNet(replace(MobilePoseNetConfig(), **changes))


@register_model(published=(Published(PAPER, (256, 192), 2.5, 0.604, "?", "AP 65.2 COCO val"),))
def mobileposenet_v1(**changes: Any) -> MobilePoseNet:
    """Ablation V1: block 13 has stride 2, three dense transposed convolutions. 2,490,799 parameters."""
    k, width, out, se, act, _ = TABLE_1[12]
    blocks = (*TABLE_1[:12], (k, width, out, se, act, 2), *TABLE_1[13:])
    config = MobilePoseNetConfig(blocks=blocks, upsampling="dense", upsampling_blocks=3)
    return MobilePoseNet(replace(config, **changes))


@register_model(published=(Published(PAPER, (256, 192), 2.1, 0.684, "?", "AP 66.2 COCO val"),))
def mobileposenet_v2(**changes: Any) -> MobilePoseNet:
    """Ablation V2: two dense transposed convolutions. 2,080,879 parameters."""
    config = MobilePoseNetConfig(upsampling="dense", upsampling_blocks=2)
    return MobilePoseNet(replace(config, **changes))
