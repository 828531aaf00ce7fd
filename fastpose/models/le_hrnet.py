"""LE-HRNet: J. Liu et al., "Lightweight and Efficient High-Resolution Network for Human Pose Estimation".

HRNet (same stem, transitions, stages and heatmap layer) with ghost modules and a multi-scale coordinate attention
(MCAM) in its blocks, and a cross-resolution feature fusion (CMFFM) in place of its exchange.

The paper published no code. Open points were settled by the four parameter counts it prints (in M): full 5.4, without
CMFFM 6.7, without MCAM and CMFFM 5.3, HRNet 28.5. Our full network has 5.270 M and 1.603 G multiply-accumulates at
256x192, which is 1.493 times 2^30 (printed: 1.51).

* Ghost modules: 1x1 primary convolution, 3x3 depthwise cheap one. A 3x3 primary one, as Eq. 2 has it, makes 15.8 M.
* Outputs of the last fusion: four, of which the heatmaps need one. With four, the network without MCAM and CMFFM has
  5.302 M (5.3 printed), with one 4.532. The three others are dead weight, so they are left out: 4,745,695 parameters.
  ``published_size=True`` builds them, 5,270,405 parameters, as `unused_outputs`, which nothing evaluates: they get no
  gradient, and their 1,706,976 multiply-accumulates are in the 1.603 G above only.
* MCAM: four groups (`mcam_groups`), each with its own weights; the channels of a group are split among the three kernel
  sizes. It adds 0.996 M (1.4 printed); two groups would add 1.716.
* Eq. 10: the spatial mean of the coordinate features becomes a softmax over the group's channels, whose *matrix
  product* with the multi-scale features is one map per group. Multiplied element by element, numbers of the order of
  one over the number of channels would leave the sigmoid near 0.5 everywhere.
* Eq. 11 and 13: the gate is sigmoid(ReLU(FC(.))), which never falls below 0.5. We put a second fully connected layer
  between ReLU and sigmoid; ``fc_layers=1`` follows the equation (4.304 M in the published size).
* Attention stands before the residual addition. Stage 1 keeps HRNet's bottleneck, its 3x3 convolution a ghost module
  with MCAM. Initialisation is not stated; PyTorch's default is kept.

The MPII table prints 1.44 G at 256x256, less than for the smaller 256x192. It must be a slip; ours is 2.135 G.
"""

# no `from __future__ import annotations` here: TorchScript must see Final[...] itself, not its text

from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Final

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastpose.layers import ConvBNAct, GhostModule, SpatialAttention
from fastpose.models._registry import Published, register_model
from fastpose.models.hrnet import Exchange, HRNet, HRNetConfig


@dataclass(frozen=True)
class LEHRNetConfig(HRNetConfig):
    """Shape of an LE-HRNet; the options are explained at the top of the file.

    `mcam` and `cmffm`: whether the network has them (the ablations of Tables III and IV).
    """

    mcam: bool = True
    cmffm: bool = True
    mcam_groups: int = 4
    fc_layers: int = 2
    published_size: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        for width in (*self.widths, self.stage1_width):
            # three kernel sizes need three channels per group
            if self.mcam_groups < 1 or width % self.mcam_groups != 0 or width < 3 * self.mcam_groups:
                raise ValueError(
                    "mcam_groups must divide all widths into groups of at least 3 channels, "
                    f"got {self.mcam_groups} for width {width}"
                )
        if self.fc_layers not in (1, 2):
            raise ValueError(f"fc_layers must be 1 or 2, got {self.fc_layers}")


class MCAM(nn.Module):
    """Multi-scale coordinate attention (Section II.C): [B, C, H, W] -> the same shape.

    Everything happens per group of c = C / groups channels; the groups are those of grouped convolutions.
    """

    groups: Final[int]

    def __init__(self, channels: int, groups: int = 4) -> None:
        super().__init__()
        c = channels // groups
        self.groups = groups
        self.coordinate = nn.Conv2d(channels, channels, 1, groups=groups)
        self.split = [c - 2 * (c // 3), c // 3, c // 3]
        convs: list[nn.Module] = []
        for n, k in zip((n * groups for n in self.split), (3, 5, 7), strict=True):
            convs.append(nn.Conv2d(n, n, k, 1, k // 2, groups=n, bias=False))
        self.scales = nn.ModuleList(convs)
        self.mix = nn.Conv2d(channels, channels, 1, groups=groups)

    def forward(self, x: Tensor) -> Tensor:
        b, channels, h, w = x.shape
        g = self.groups
        # Eq. 5 to 8; a 1x1 convolution of the two means side by side is that of each. Only the spatial mean of the
        # coordinate features x * g_h * g_w is needed
        g_h = torch.sigmoid(self.coordinate(x.mean(3, keepdim=True)))
        g_w = torch.sigmoid(self.coordinate(x.mean(2, keepdim=True)))
        coord = ((x * g_w).mean(3, keepdim=True) * g_h).mean(2)
        # Eq. 9
        grouped = x.reshape(b, g, channels // g, h, w)
        parts = torch.split(grouped, self.split, 2)
        scales: list[Tensor] = []
        for j, conv in enumerate(self.scales):
            c = parts[j].shape[2]
            scales.append(conv(parts[j].reshape(b, g * c, h, w)).reshape(b, g, c, h, w))
        multi = self.mix(torch.cat(scales, 2).reshape(b, channels, h, w))
        # Eq. 10
        query = torch.softmax(coord.reshape(b, g, 1, channels // g), 3)
        weight = torch.sigmoid(torch.matmul(query, multi.reshape(b, g, channels // g, h * w)))
        return (grouped * weight.reshape(b, g, 1, h, w)).reshape(b, channels, h, w)


class GhostBottleneck(nn.Module):
    """Block of stage 1, HRNet's bottleneck with a ghost module and MCAM: [B, I, H, W] -> [B, 4 width, H, W]."""

    def __init__(self, in_channels: int, width: int, config: LEHRNetConfig) -> None:
        super().__init__()
        self.reduce = ConvBNAct(in_channels, width, act="relu")
        self.ghost = GhostModule(width, width)
        self.mcam: nn.Module = MCAM(width, config.mcam_groups) if config.mcam else nn.Identity()
        self.expand = ConvBNAct(width, 4 * width)
        self.shortcut: nn.Module = nn.Identity()
        if in_channels != 4 * width:
            self.shortcut = ConvBNAct(in_channels, 4 * width)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.expand(self.mcam(self.ghost(self.reduce(x)))) + self.shortcut(x))


class ELBlock(nn.Module):
    """ELblock (Figure 2), HRNet's basic block with two ghost modules and MCAM: [B, C, H, W] -> the same shape."""

    def __init__(self, channels: int, config: LEHRNetConfig) -> None:
        super().__init__()
        self.ghost1 = GhostModule(channels, channels)
        self.ghost2 = GhostModule(channels, channels, act="none")
        self.mcam: nn.Module = MCAM(channels, config.mcam_groups) if config.mcam else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.mcam(self.ghost2(self.ghost1(x))) + x)


class FusionLink(nn.Module):
    """What branch j gives to branch i (Eq. 11 and 13): its channel mean, times a gate per channel of branch i.

    `steps` is j - i. Branch j is brought to the grid of branch i by depthwise strided convolutions before the mean
    (down, `steps` negative), or by nearest-neighbour upsampling after it (up).
    """

    def __init__(self, in_channels: int, out_channels: int, steps: int, fc_layers: int) -> None:
        super().__init__()
        gate: list[nn.Module] = [nn.Conv2d(out_channels, out_channels, 1), nn.ReLU()]
        if fc_layers == 2:
            gate.append(nn.Conv2d(out_channels, out_channels, 1))
        self.gate = nn.Sequential(*gate, nn.Sigmoid())
        down: list[nn.Module] = []
        for n in range(-steps):
            act = "none" if n == -steps - 1 else "relu"
            down.append(ConvBNAct(in_channels, in_channels, 3, 2, groups=in_channels, act=act))
        self.down = nn.Sequential(*down)
        self.up: nn.Module = nn.Upsample(scale_factor=float(2**steps), mode="nearest") if steps > 0 else nn.Identity()

    def forward(self, target_mean: Tensor, source: Tensor) -> Tensor:
        """Spatial mean of branch i [B, N, 1, 1] and branch j [B, M, h, w] -> [B, N, H, W]."""
        return self.gate(target_mean) * self.up(self.down(source).mean(1, keepdim=True))


class FusedBranch(nn.Module):
    """One output of the fusion: branch i plus what the others give it, spatial attention, ReLU; [B, N, H, W]."""

    target: Final[int]

    def __init__(self, widths: tuple[int, ...], target: int, fc_layers: int) -> None:
        super().__init__()
        others = [j for j in range(len(widths)) if j != target]
        self.links = nn.ModuleList([FusionLink(widths[j], widths[target], j - target, fc_layers) for j in others])
        self.attention = SpatialAttention()
        self.target = target

    def forward(self, x: list[Tensor]) -> Tensor:
        y = x[self.target]
        mean = y.mean((2, 3), keepdim=True)
        others = x[: self.target] + x[self.target + 1 :]
        for j, link in enumerate(self.links):
            y = y + link(mean, others[j])
        return F.relu(y * self.attention(y))


class CMFFM(nn.ModuleList):
    """Cross-resolution multi-scale feature fusion (Section II.D, Figure 5): the first `outputs` branches, fused."""

    def __init__(self, widths: tuple[int, ...], outputs: int, fc_layers: int = 2) -> None:
        super().__init__([FusedBranch(widths, i, fc_layers) for i in range(outputs)])

    def forward(self, x: list[Tensor]) -> list[Tensor]:
        outputs: list[Tensor] = []
        for branch in self:
            outputs.append(branch(x))
        return outputs


class LEHRNet(HRNet):
    """Images [B, 3, H, W] with H, W multiples of 32 -> heatmaps [B, K, H/4, W/4]."""

    def __init__(self, config: LEHRNetConfig) -> None:
        fuse = partial(CMFFM, fc_layers=config.fc_layers) if config.cmffm else Exchange
        super().__init__(
            config,
            "LEHRNet",
            first=partial(GhostBottleneck, config=config),
            block=partial(ELBlock, config=config),
            fuse=fuse,
        )
        if config.published_size:
            self.unused_outputs = nn.ModuleList(list(fuse(config.widths, 4))[1:])


@register_model(
    published=(
        Published("Liu et al.", (256, 192), 5.4, 1.51, "2^30", "AP 69.3 COCO val"),
        Published("Liu et al.", (256, 256), 5.4, 1.44, "?", "PCKh 88.7 MPII val"),
    )
)
def le_hrnet(**changes: Any) -> LEHRNet:
    """LE-HRNet: 4,745,695 parameters, 1.602 G multiply-accumulates at 256x192, 17 keypoints.

    Without the dead outputs of the last fusion; ``published_size=True`` has 5,270,405 parameters.
    """
    return LEHRNet(replace(LEHRNetConfig(), **changes))
