"""HR-LiteNet: Z. Cai et al., "Lightweight high-performance pose recognition network: HR-LiteNet", 2024.

HRNet (same stem, stages, exchanges and heatmap layer) with L_block in stage 1, L_basic in stages 2 to 4 and depthwise
separable convolutions wherever HRNet changes width or resolution (Figures 3 to 5, Table 1).

The paper published no code and leaves these points open. What we chose, and why (parameters in M / multiply-accumulates
in G at 256x256 with 16 keypoints; printed: 1.92 / 1.46):

* Strided convolutions of exchanges and transitions: the text is silent, the theme is "depthwise separable". With dense
  exchanges 2.26 / 1.64, with dense transitions 2.39 / 1.90: both far off in parameters.
* The two sub-branches of the first L_block, "fused and stacked through Add and Concat": a full-width 1x1 convolution
  *added* to the ghost module's concatenation (``widening="add"``), 1.877 / 1.472. A half-width 1x1 convolution beside a
  half-width ghost module (``"concat"``) has 1.864 / 1.419, the ghost module alone (``"none"``) 1.860 / 1.405.
* Table 1 says L_block in all stages; the text says L_basic from stage 2 on, and L_block, which needs four times as many
  output as inner channels, fits nowhere else. L_basic's three branches are read as a sum.
* Attention comes "finally" in L_block: before the addition of the left branch or (`cbam_after_add`) after it. CBAM's
  reduction is its paper's 16; 8 would give 1.989 M.
* The last exchange makes only the first branch, as in HRNet and as the text says.
* Initialisation is not stated; PyTorch's default is kept.

If 1.46 is in units of 2^30, as the 9.5 printed for HRNet, it is 1.568 G, and no reading meets both figures.
"""

# no `from __future__ import annotations` here: TorchScript must see Final[...] itself, not its text

from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Final

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastpose.layers import CBAM, ConvBNAct, DepthwiseSeparable, GhostModule
from fastpose.models._registry import Published, register_model
from fastpose.models.hrnet import Exchange, HRNet, HRNetConfig, downsample_link, transition_conv


@dataclass(frozen=True)
class HRLiteNetConfig(HRNetConfig):
    """Shape of an HR-LiteNet; the options are explained at the top of the file."""

    num_keypoints: int = 16
    modules: tuple[int, ...] = (1, 3, 1)
    widening: str = "add"
    cbam_ratio: int = 16
    cbam_after_add: bool = False
    dense_exchange: bool = False
    dense_transitions: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.widening not in ("add", "concat", "none"):
            raise ValueError(f"widening must be 'add', 'concat' or 'none', got {self.widening!r}")
        if not 1 <= self.cbam_ratio <= min(self.widths):
            raise ValueError(
                f"cbam_ratio must be between 1 and the smallest width {min(self.widths)}, got {self.cbam_ratio}"
            )


class AddedGhost(nn.Module):
    """1x1 convolution plus ghost module, [B, I, H, W] -> [B, O, H, W]."""

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        self.conv = ConvBNAct(in_channels, out_channels)
        self.ghost = GhostModule(in_channels, out_channels)

    def forward(self, x: Tensor) -> Tensor:
        return self.ghost(x) + self.conv(x)


class StackedGhost(nn.Module):
    """1x1 convolution for the first half of the channels, ghost module for the second: [B, I, H, W] -> [B, O, H, W]."""

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        self.conv = ConvBNAct(in_channels, out_channels // 2)
        self.ghost = GhostModule(in_channels, out_channels // 2)

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([self.conv(x), self.ghost(x)], 1)


WIDENING: dict[str, type[nn.Module]] = {"add": AddedGhost, "concat": StackedGhost, "none": GhostModule}


class LBlock(nn.Module):
    """L_block (Figure 4): [B, I, H, W] -> [B, 4 width, H, W].

    Right branch: 1x1 to `width`, separable 3x3, ghost module to 4 * `width`, CBAM. Left branch: the input, if it has
    that many channels (form b); otherwise a 1x1 convolution, and the ghost module is widened (form a).
    """

    cbam_after_add: Final[bool]

    def __init__(self, in_channels: int, width: int, config: HRLiteNetConfig) -> None:
        super().__init__()
        out_channels = 4 * width
        self.reduce = ConvBNAct(in_channels, width, act="relu")
        self.separable = DepthwiseSeparable(width, width)
        if in_channels == out_channels:
            self.features: nn.Module = GhostModule(width, out_channels)
            self.left: nn.Module = nn.Identity()
        else:
            self.features = WIDENING[config.widening](width, out_channels)
            self.left = ConvBNAct(in_channels, out_channels)
        self.cbam = CBAM(out_channels, config.cbam_ratio)
        self.cbam_after_add = config.cbam_after_add

    def forward(self, x: Tensor) -> Tensor:
        y = self.features(self.separable(self.reduce(x)))
        if self.cbam_after_add:
            return F.relu(self.cbam(y + self.left(x)))
        return F.relu(self.cbam(y) + self.left(x))


class LBasic(nn.Module):
    """L_basic (Figure 5): ``relu(x + separable(separable(x)) + cbam(x))``, [B, C, H, W] -> the same shape."""

    def __init__(self, channels: int, cbam_ratio: int) -> None:
        super().__init__()
        self.separable1 = DepthwiseSeparable(channels, channels)
        self.separable2 = DepthwiseSeparable(channels, channels, act="none")
        self.cbam = CBAM(channels, cbam_ratio)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(x + self.separable2(self.separable1(x)) + self.cbam(x))


def separable_link(in_channels: int, out_channels: int, steps: int) -> nn.Sequential:
    """To a lower resolution: a chain of strided separable convolutions, the last to the new width and without ReLU."""
    chain = [DepthwiseSeparable(in_channels, in_channels, 2) for _ in range(steps - 1)]
    return nn.Sequential(*chain, DepthwiseSeparable(in_channels, out_channels, 2, act="none"))


class HRLiteNet(HRNet):
    """Images [B, 3, H, W] with H, W multiples of 32 -> heatmaps [B, K, H/4, W/4]."""

    def __init__(self, config: HRLiteNetConfig) -> None:
        super().__init__(
            config,
            "HRLiteNet",
            first=partial(LBlock, config=config),
            transition=transition_conv if config.dense_transitions else DepthwiseSeparable,
            block=partial(LBasic, cbam_ratio=config.cbam_ratio),
            fuse=partial(Exchange, down=downsample_link if config.dense_exchange else separable_link),
        )


@register_model(
    input_size=(256, 256),
    num_keypoints=16,
    published=(Published("Cai et al. 2024", (256, 256), 1.92, 1.46, "?", "PCK 83.643 MPII val"),),
)
def hr_litenet(**changes: Any) -> HRLiteNet:
    """HR-LiteNet: 1,877,264 parameters, 1,472,103,936 multiply-accumulates at 256x256, 16 keypoints."""
    return HRLiteNet(replace(HRLiteNetConfig(), **changes))
