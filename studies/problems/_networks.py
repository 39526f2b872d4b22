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
    """Two 3x3 convolutions and a shortcut without parameters; batch norm, or biases without it."""

    def __init__(self, inward: int, outward: int, stride: int, norm: bool = True) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inward, outward, 3, stride=stride, padding=1, bias=not norm)
        self.norm1 = nn.BatchNorm2d(outward) if norm else nn.Identity()
        self.conv2 = nn.Conv2d(outward, outward, 3, padding=1, bias=not norm)
        self.norm2 = nn.BatchNorm2d(outward) if norm else nn.Identity()
        self.relu = nn.ReLU()
        self.stride, self.extra = stride, outward - inward

    def forward(self, x: Tensor) -> Tensor:
        """Pictures [n, inward, h, w] -> [n, outward, h / stride, w / stride]."""
        h = self.relu(self.norm1(self.conv1(x)))
        h = self.norm2(self.conv2(h))
        return self.relu(h + shortcut(x, self.stride, self.extra))


def kaiming(model: nn.Sequential) -> nn.Sequential:
    """The model, its weights drawn anew: normal of variance 2 / inputs; biases as they were."""
    for module in model.modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            nn.init.kaiming_normal_(module.weight)
    return model


def resnet(channels: Sequence[int], depth: int, classes: int = 10) -> nn.Sequential:
    """Residual network for small coloured pictures, with batch norm: He et al.'s for CIFAR.

    A 3x3 convolution, `depth` basic blocks at each number of channels, of which all but the first
    halve the picture, means over the pixels and a Linear layer; weights by Kaiming's normal
    initialisation. Source: He et al. 2016 (arXiv:1512.03385), section 4.2.
    """
    layers: list[nn.Module] = [
        nn.Conv2d(3, channels[0], 3, padding=1, bias=False),
        nn.BatchNorm2d(channels[0]),
        nn.ReLU(),
    ]
    inward = channels[0]
    for stage, outward in enumerate(channels):
        for place in range(depth):
            layers.append(BasicBlock(inward, outward, stride=2 if stage and not place else 1))
            inward = outward
    layers += [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels[-1], classes)]
    return kaiming(nn.Sequential(*layers))


def resnet32(classes: int = 10) -> nn.Sequential:
    """ResNet32 for 32x32 pictures: 31 convolutions and a Linear layer, 464,154 parameters."""
    return resnet((16, 32, 64), depth=5, classes=classes)


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
        layers[f"block{place + 1}"] = BasicBlock(inward, outward, 2 if place else 1, norm=False)
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


def pooled_cnn(channels: Sequence[int], hidden: int, size: int, classes: int = 10) -> nn.Sequential:
    """5x5 convolutions, each with ReLU and pooling by 2, a Linear layer with ReLU and another.

    channels: of the pictures, then of each convolution. size: of the square pictures, a multiple
    of 2 ** (number of convolutions). With (1, 32, 64), 1024 and 28: 3,274,634 parameters.
    """
    layers: list[nn.Module] = []
    for inward, outward in pairwise(channels):
        layers += [nn.Conv2d(inward, outward, 5, padding=2), nn.ReLU(), nn.MaxPool2d(2)]
    inputs = channels[-1] * (size // 2 ** (len(channels) - 1)) ** 2
    head = (nn.Linear(inputs, hidden), nn.ReLU(), nn.Linear(hidden, classes))
    return nn.Sequential(*layers, nn.Flatten(), *head)


VGG11 = ((64,), (128,), (256, 256), (512, 512), (512, 512))
VGG16 = ((64, 64), (128, 128), (256, 256, 256), (512, 512, 512), (512, 512, 512))


def vgg(
    stages: Sequence[Sequence[int]],
    classes: int = 10,
    hidden: Sequence[int] = (4096, 4096),
    norm: bool = True,
) -> nn.Sequential:
    """VGG for coloured pictures of 2 ** (number of stages) pixels a side, all layers with biases.

    stages: channels of the 3x3 convolutions between two poolings by 2. norm: batch norm after each
    convolution. hidden: widths of the Linear layers before the last, with ReLU, without dropout.
    Convolutions begin normal, of variance 2 / (9 · channels), with biases of zero; Linear layers
    as PyTorch has them. Parameters, with norm and without:
    VGG11, 10 classes 28,149,514 and 28,144,010; VGG16, 100 classes 34,015,396 and 34,006,948.

    Source: Simonyan and Zisserman 2015 (arXiv:1409.1556), models A and D, with the head of the
    published code of arXiv:2106.02925; others who use it for CIFAR have one Linear layer (`hidden`
    of ()).
    """
    layers: list[nn.Module] = []
    inward = 3
    for stage in stages:
        for outward in stage:
            convolution = nn.Conv2d(inward, outward, 3, padding=1)
            nn.init.normal_(convolution.weight, std=(2 / (9 * outward)) ** 0.5)
            nn.init.zeros_(convolution.bias)  # type: ignore[arg-type]
            layers += [convolution, *([nn.BatchNorm2d(outward)] if norm else []), nn.ReLU()]
            inward = outward
        layers.append(nn.MaxPool2d(2))
    layers.append(nn.Flatten())
    for outward in hidden:
        layers += [nn.Linear(inward, outward), nn.ReLU()]
        inward = outward
    return nn.Sequential(*layers, nn.Linear(inward, classes))


def all_cnn(
    width: int = 96, classes: int = 10, dropout: tuple[float, float] = (0.0, 0.0)
) -> nn.Sequential:
    """All-CNN-C for coloured pictures: nine convolutions with ReLU, the last one too, and a mean.

    3x3 of `width` twice and once with stride 2, of 2 `width` likewise, another of these and 1x1 of
    2 `width` and of the classes. dropout: of the input, and after each convolution of stride 2;
    zeros have none, as the curvature papers. Weights by Kaiming's normal initialisation (ours).
    With 96 and 10 classes: 1,369,738 parameters.

    Source: Springenberg et al. 2015 (arXiv:1412.6806), table 1, with dropout (0.2, 0.5); all 3x3
    ones are padded here, as in published code, so that the mean is over 8x8 pixels of 32x32, where
    the paper's is over 6x6.
    """
    narrow, wide = width, 2 * width
    plan = [(narrow, 3, 1), (narrow, 3, 1), (narrow, 3, 2), (wide, 3, 1), (wide, 3, 1)]
    plan += [(wide, 3, 2), (wide, 3, 1), (wide, 1, 1), (classes, 1, 1)]
    layers: list[nn.Module] = [nn.Dropout(dropout[0])] if dropout[0] else []
    inward = 3
    for outward, size, stride in plan:
        layers += [nn.Conv2d(inward, outward, size, stride, padding=size // 2), nn.ReLU()]
        layers += [nn.Dropout(dropout[1])] if stride == 2 and dropout[1] else []
        inward = outward
    return kaiming(nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten()))
