"""
ResNets and ResNeXts for large images, of torchvision's blocks, cut after their second or third stage.

Tensors have torchvision's names, so that its weights fit: conv1, bn1, layer1, layer2 in the trunk; layer3, layer4 in
an expert.

Source: He et al., arXiv:1512.03385; Xie et al., arXiv:1611.05431; cut and widths as in RIDE's public code.
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass

from torch import nn
from torchvision.models.resnet import BasicBlock, Bottleneck

STEM_WIDTH = 64
PLANES = (64, 128, 256, 512)
REDUCED_PLANES = (64, 128, 192, 384)


@dataclass(frozen=True)
class ResNet:
    """
    One of the family; its stages halve the resolution from the second on.

    Attributes:
        block: torchvision's; a bottleneck strides in its 3x3 convolution and is four times as wide at its end.
        blocks: of each of the four stages.
        groups, group_width: of the 3x3 convolutions; the inner width is ⌊planes · group_width/64⌋ · groups.
    """

    block: type[BasicBlock | Bottleneck]
    blocks: tuple[int, int, int, int]
    groups: int = 1
    group_width: int = 64

    def trunk(self, reduced: bool, share_stage3: bool) -> nn.Sequential:
        """
        (B, 3, H, W) -> (B, D', H/8, W/8): stem, stages one and two; (B, D', H/16, W/16) with stage three.

        Args:
            reduced: matters to stage three alone.
        """
        layers: OrderedDict[str, nn.Module] = OrderedDict(
            conv1=nn.Conv2d(3, STEM_WIDTH, 7, stride=2, padding=3, bias=False), bn1=nn.BatchNorm2d(STEM_WIDTH),
            relu=nn.ReLU(inplace=True), maxpool=nn.MaxPool2d(3, stride=2, padding=1),
            layer1=self._stage(0, reduced), layer2=self._stage(1, reduced),
        )  # fmt: skip
        if share_stage3:
            layers["layer3"] = self._stage(2, reduced)
        return _fresh(layers)

    def expert(self, reduced: bool, share_stage3: bool) -> nn.Sequential:
        """Features of the trunk -> (B, D): the stages that are left and the global average."""
        layers: OrderedDict[str, nn.Module] = OrderedDict()
        if not share_stage3:
            layers["layer3"] = self._stage(2, reduced)
        layers |= {"layer4": self._stage(3, reduced), "avgpool": nn.AdaptiveAvgPool2d(1), "flatten": nn.Flatten()}
        return _fresh(layers)

    def n_features(self, reduced: bool) -> int:
        """D: 1536 of 2048 with bottlenecks, 384 of 512 with basic blocks."""
        return _planes(reduced)[3] * int(self.block.expansion)

    def _stage(self, index: int, reduced: bool) -> nn.Sequential:
        planes, stride = _planes(reduced)[index], 2 if index else 1
        width_in = _planes(reduced)[index - 1] * self.block.expansion if index else STEM_WIDTH
        width = planes * self.block.expansion
        shortcut = None
        if stride != 1 or width_in != width:
            shortcut = nn.Sequential(nn.Conv2d(width_in, width, 1, stride, bias=False), nn.BatchNorm2d(width))
        shape = {"groups": self.groups, "base_width": self.group_width}
        return nn.Sequential(
            self.block(width_in, planes, stride, shortcut, **shape),
            *(self.block(width, planes, **shape) for _ in range(self.blocks[index] - 1)),
        )


def _planes(reduced: bool) -> tuple[int, int, int, int]:
    return REDUCED_PLANES if reduced else PLANES


def _fresh(layers: OrderedDict[str, nn.Module]) -> nn.Sequential:
    sequence = nn.Sequential(layers)
    initialise(sequence)
    return sequence


def initialise(layers: nn.Module) -> None:
    """Draw convolutions from a normal distribution of variance 2/(k²·width); batch norms are the identity already."""
    for module in layers.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
