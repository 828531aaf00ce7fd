"""SimpleBaseline: B. Xiao et al., "Simple Baselines for Human Pose Estimation and Tracking", ECCV 2018.

A ResNet down to 1/32 resolution (K. He et al., CVPR 2016; the stride of a block is in its 3x3 convolution), three
transposed convolutions back to 1/4 and a 1x1 heatmap layer.

Attribute names are those of the published OpenMMLab checkpoints without their ``backbone.``.

The printed costs count a transposed convolution by its *output* positions, four times the arithmetic it needs, in units
of 2^30. By that rule ResNet-50 at 256x192 has 8.99 (printed: 8.90) and ResNet-152 15.77 (15.7); by ours, which counts
input positions, they have 5.426 and 12.699 G.
"""

# no `from __future__ import annotations` here: TorchScript must see Final[...] itself, not its text

from dataclasses import dataclass, replace
from typing import Any, Final

import torch.nn.functional as F
from torch import Tensor, nn

from fastpose.layers import check_images, check_num_keypoints
from fastpose.models._deconv_head import DeconvHead
from fastpose.models._registry import Published, register_model
from fastpose.models.hrnet import Bottleneck


@dataclass(frozen=True)
class SimpleBaselineConfig:
    """Shape of a SimpleBaseline: bottleneck blocks per ResNet layer, width of the transposed convolutions."""

    num_keypoints: int = 17
    blocks: tuple[int, int, int, int] = (3, 4, 6, 3)
    deconv_width: int = 256

    def __post_init__(self) -> None:
        check_num_keypoints(self.num_keypoints)
        if len(self.blocks) != 4 or min(self.blocks) < 1:
            raise ValueError(f"blocks must have 4 positive entries, one per ResNet layer, got {self.blocks}")


def resnet_layer(in_channels: int, width: int, blocks: int, stride: int) -> nn.Sequential:
    """`blocks` bottlenecks, the first one strided: [B, I, H, W] -> [B, 4 width, H / stride, W / stride]."""
    first = Bottleneck(in_channels, width, stride)
    return nn.Sequential(first, *[Bottleneck(4 * width, width) for _ in range(blocks - 1)])


class SimpleBaseline(nn.Module):
    """Images [B, 3, H, W] with H, W multiples of 32 -> heatmaps [B, K, H/4, W/4]."""

    input_multiple: Final[int]

    def __init__(self, config: SimpleBaselineConfig) -> None:
        super().__init__()
        self.config = config
        self.conv1 = nn.Conv2d(3, 64, 7, 2, 3, bias=False)
        self.bn1 = nn.BatchNorm2d(64)
        self.layer1 = resnet_layer(64, 64, config.blocks[0], 1)
        self.layer2 = resnet_layer(256, 128, config.blocks[1], 2)
        self.layer3 = resnet_layer(512, 256, config.blocks[2], 2)
        self.layer4 = resnet_layer(1024, 512, config.blocks[3], 2)
        self.head = DeconvHead(2048, config.num_keypoints, config.deconv_width)
        self.input_multiple = 32

    def forward(self, x: Tensor) -> Tensor:
        check_images(x, self.input_multiple, "SimpleBaseline")
        x = F.max_pool2d(F.relu(self.bn1(self.conv1(x))), 3, 2, 1)
        return self.head(self.layer4(self.layer3(self.layer2(self.layer1(x)))))


# the paper itself prints no sizes and costs; those of the HRNet paper and repository are quoted everywhere
SOURCE = "Sun et al. 2019 (HRNet)"


@register_model(
    published=(
        Published(SOURCE, (256, 192), 34.0, 8.90, "2^30", "AP 70.4 COCO val"),
        Published(SOURCE, (384, 288), 34.0, 20.0, "2^30", "AP 72.2 COCO val"),
    )
)
def simplebaseline_resnet50(**changes: Any) -> SimpleBaseline:
    """With ResNet-50: 33,999,697 parameters, 5.426 G multiply-accumulates at 256x192, 17 keypoints."""
    return SimpleBaseline(replace(SimpleBaselineConfig(), **changes))


@register_model(
    published=(
        Published(SOURCE, (256, 192), 68.6, 15.7, "2^30", "AP 72.0 COCO val"),
        Published(SOURCE, (384, 288), 68.6, 35.3, "2^30", "AP 74.3 COCO val"),
        Published(SOURCE, (384, 288), 68.6, 35.6, "2^30", "AP 73.7 COCO test-dev"),
    )
)
def simplebaseline_resnet152(**changes: Any) -> SimpleBaseline:
    """With ResNet-152: 68,635,473 parameters, 12.699 G multiply-accumulates at 256x192, 17 keypoints."""
    return SimpleBaseline(replace(SimpleBaselineConfig(blocks=(3, 8, 36, 3)), **changes))
