"""Convolutional networks: the papers' own, and a small one."""

from collections.abc import Sequence
from itertools import pairwise

from torch import Tensor, nn
from torch.nn.functional import pad


class BasicBlock(nn.Module):
    """Two 3x3 convolutions with batch norm, beside a shortcut without parameters.

    The shortcut of a block that halves the picture takes every second pixel and adds channels of
    zeros, half of them on each side (He et al. 2016, option A).
    """

    def __init__(self, inward: int, outward: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inward, outward, 3, stride=stride, padding=1, bias=False)
        self.norm1 = nn.BatchNorm2d(outward)
        self.conv2 = nn.Conv2d(outward, outward, 3, padding=1, bias=False)
        self.norm2 = nn.BatchNorm2d(outward)
        self.relu = nn.ReLU()
        self.stride, self.extra = stride, outward - inward

    def forward(self, x: Tensor) -> Tensor:
        """Pictures [n, inward, h, w] -> [n, outward, h / stride, w / stride]."""
        h = self.relu(self.norm1(self.conv1(x)))
        h = self.norm2(self.conv2(h))
        if self.stride > 1 or self.extra:
            half = self.extra // 2
            x = pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, half, self.extra - half))
        return self.relu(h + x)


def resnet32(classes: int = 10) -> nn.Sequential:
    """ResNet32 for 32x32 pictures: 31 convolutions and a Linear layer, 464,154 parameters.

    Five basic blocks each at 16, 32 and 64 channels; weights by Kaiming's normal initialisation.
    Source: He et al. 2016 (arXiv:1512.03385), section 4.2.
    """
    layers: list[nn.Module] = [
        nn.Conv2d(3, 16, 3, padding=1, bias=False),
        nn.BatchNorm2d(16),
        nn.ReLU(),
    ]
    inward = 16
    for outward in (16, 32, 64):
        for place in range(5):
            stride = 2 if place == 0 and outward > 16 else 1
            layers.append(BasicBlock(inward, outward, stride))
            inward = outward
    layers += [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, classes)]
    model = nn.Sequential(*layers)
    for module in model.modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            nn.init.kaiming_normal_(module.weight)
    return model


def strided_cnn(channels: Sequence[int], size: int, classes: int = 10) -> nn.Sequential:
    """3x3 convolutions of stride 2, each with ReLU, and a Linear layer; no norms, all with biases.

    channels: of the pictures, then of each convolution. size: of the square pictures, a multiple
    of 2 ** (number of convolutions). With (3, 32, 64, 64) and 32: 66,570 parameters.
    """
    layers: list[nn.Module] = []
    for inward, outward in pairwise(channels):
        layers += [nn.Conv2d(inward, outward, 3, stride=2, padding=1), nn.ReLU()]
    side = size // 2 ** (len(channels) - 1)
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(channels[-1] * side**2, classes))
