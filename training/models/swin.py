"""
Swin transformers of torchvision's blocks, cut after their second stage.

Tensors have torchvision's names, so that its weights fit: features.0 to features.4 in the trunk; features.5 to
features.7 and norm in an expert.

Source: Liu et al., arXiv:2103.14030; cut and widths as in RIDE's public code. A stage ends with its patch merging, as
in the transformer's own public code, and all experts have the last layer norm in common.
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass
from functools import partial

from torch import nn
from torchvision.models.swin_transformer import PatchMerging, SwinTransformerBlock
from torchvision.ops import Permute

PATCH = 4
WINDOW = 7
HEADS = (3, 6, 12, 24)
INITIAL_DEVIATION = 0.02
LayerNorm = partial(nn.LayerNorm, eps=1e-5)


@dataclass(frozen=True)
class Swin:
    """
    One of the family. Features are (B, H, W, D') throughout.

    Attributes:
        blocks: of each of the four stages.
        width: of the first; each doubles the one before, but the third is 1.5 times the second when reduced.
    """

    blocks: tuple[int, int, int, int]
    width: int = 96

    def trunk(self, reduced: bool, drop_path: float) -> nn.Sequential:
        """
        (B, 3, H, W) -> (B, H/16, W/16, 4·width), 3·width when reduced: patches, two stages, each with its merging.

        Args:
            drop_path: share of images for which the net's last block is skipped in training; it grows from 0 at the
                first block.
        """
        widths = self._widths(reduced)
        embed = nn.Sequential(nn.Conv2d(3, widths[0], PATCH, stride=PATCH), Permute([0, 2, 3, 1]), LayerNorm(widths[0]))
        layers = nn.Sequential(
            embed,
            self._stage(0, reduced, drop_path), _merging(widths[0], widths[1]),
            self._stage(1, reduced, drop_path), _merging(widths[1], widths[2]),
        )  # fmt: skip
        return _initialised(nn.Sequential(OrderedDict(features=layers)))

    def expert(self, reduced: bool, drop_path: float) -> nn.Sequential:
        """Features of the trunk -> (B, D): stages three and four, layer norm, global average."""
        widths = self._widths(reduced)
        layers: OrderedDict[str, nn.Module] = OrderedDict()
        layers["5"] = self._stage(2, reduced, drop_path)
        layers["6"] = _merging(widths[2], widths[3])
        layers["7"] = self._stage(3, reduced, drop_path)
        return _initialised(
            nn.Sequential(
                OrderedDict(
                    features=nn.Sequential(layers), norm=LayerNorm(widths[3]), permute=Permute([0, 3, 1, 2]),
                    avgpool=nn.AdaptiveAvgPool2d(1), flatten=nn.Flatten(),
                )
            )
        )  # fmt: skip

    def n_features(self, reduced: bool) -> int:
        """D: 576 of 768."""
        return self._widths(reduced)[3]

    def _stage(self, index: int, reduced: bool, drop_path: float) -> nn.Sequential:
        before, last = sum(self.blocks[:index]), sum(self.blocks) - 1
        return nn.Sequential(*(
            SwinTransformerBlock(
                self._widths(reduced)[index], HEADS[index], window_size=[WINDOW, WINDOW],
                shift_size=[block % 2 * (WINDOW // 2)] * 2,
                stochastic_depth_prob=drop_path * (before + block) / last, norm_layer=LayerNorm,
            )
            for block in range(self.blocks[index])
        ))  # fmt: skip

    def _widths(self, reduced: bool) -> tuple[int, int, int, int]:
        third = 3 * self.width if reduced else 4 * self.width
        return self.width, 2 * self.width, third, 2 * third


def _merging(width: int, merged: int) -> PatchMerging:
    """Four neighbours, 4·`width` channels, to one position of `merged` channels: twice the width, or 1.5 times."""
    merging = PatchMerging(width, LayerNorm)
    merging.reduction = nn.Linear(4 * width, merged, bias=False)
    return merging


def _initialised(layers: nn.Sequential) -> nn.Sequential:
    """Linear layers from a truncated normal distribution of deviation 0.02, biases 0; layer norms are the identity."""
    for module in layers.modules():
        if isinstance(module, nn.Linear):
            nn.init.trunc_normal_(module.weight, std=INITIAL_DEVIATION)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
    return layers
