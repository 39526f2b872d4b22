"""Convolutional networks: the papers' own, and small ones."""

from collections import OrderedDict
from collections.abc import Sequence
from itertools import pairwise

from torch import Tensor, nn
from torch.nn.functional import pad


def shortcut(x: Tensor, stride: int, extra: int) -> Tensor:
    """Pictures [n, c, h, w] -> [n, c + extra, h / stride, w / stride], without parameters.

    Every second pixel where the stride is 2, and `extra` channels of zeros, half of them on each
    side (He et al. 2016, option A).
    """
    if stride == 1 and not extra:
        return x
    half = extra // 2
    return pad(x[:, :, ::stride, ::stride], (0, 0, 0, 0, half, extra - half))


class BasicBlock(nn.Module):
    """Two 3x3 convolutions with batch norm, beside a shortcut without parameters."""

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
        return self.relu(h + shortcut(x, self.stride, self.extra))


class NormFreeBlock(nn.Module):
    """Two 3x3 convolutions with biases and without norm, beside a shortcut without parameters."""

    def __init__(self, inward: int, outward: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inward, outward, 3, stride=stride, padding=1)
        self.conv2 = nn.Conv2d(outward, outward, 3, padding=1)
        self.relu = nn.ReLU()
        self.stride, self.extra = stride, outward - inward

    def forward(self, x: Tensor) -> Tensor:
        """Pictures [n, inward, h, w] -> [n, outward, h / stride, w / stride]."""
        h = self.conv2(self.relu(self.conv1(x)))
        return self.relu(h + shortcut(x, self.stride, self.extra))


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


def norm_free_resnet(channels: Sequence[int], classes: int = 10) -> nn.Sequential:
    """Residual network without norms; its layers are in "stem", "block1", "block2", ... and "head".

    The stem is a 3x3 convolution of coloured pictures; each block after the first halves the
    picture; the head is Linear on the means over the pixels. With (16, 32, 64): 75,050 parameters.

    Convolutions begin with biases of zero and normal weights: Kaiming's, of variance 2 / inputs,
    but 1 / (inputs · blocks) for the second one of each block. So each block multiplies the mean
    square of what passes by at most 1 + 1/blocks, all of them by less than e, and no norm is
    needed. Zeros there would do so too, but give the first convolution of the block neither
    gradient nor curvature at the start.
    """
    layers: OrderedDict[str, nn.Module] = OrderedDict()
    layers["stem"] = nn.Conv2d(3, channels[0], 3, padding=1)
    layers["relu"] = nn.ReLU()
    for place, (inward, outward) in enumerate(pairwise((channels[0], *channels))):
        layers[f"block{place + 1}"] = NormFreeBlock(inward, outward, stride=2 if place else 1)
    layers |= {"pool": nn.AdaptiveAvgPool2d(1), "flatten": nn.Flatten()}
    layers["head"] = nn.Linear(channels[-1], classes)
    model = nn.Sequential(layers)
    for name, module in model.named_modules():
        if isinstance(module, nn.Conv2d):
            gain = len(channels) ** -0.5 if name.endswith("conv2") else 2**0.5
            nn.init.normal_(module.weight, std=gain * module.weight[0].numel() ** -0.5)
            nn.init.zeros_(module.bias)  # type: ignore[arg-type]
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
