"""Blocks of parameters that are preconditioned together: layers, or single parameters."""

from collections.abc import Callable, Hashable, Iterable
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

KINDS = (nn.Linear, nn.Conv2d)


@dataclass(frozen=True, eq=False)
class Block:
    """One nn.Linear or nn.Conv2d trained as a whole: W_bar = [W, b], the bias last.

    A convolution's W is [O, I * kh * kw], input channel slowest; one in several groups is that
    many independent matrices [O / groups, I / groups * kh * kw + 1]. Without a trained bias
    (absent, frozen or shared) W_bar is W and the input gets no 1.
    """

    name: str
    module: nn.Linear | nn.Conv2d
    weight: Tensor
    bias: Tensor | None

    @property
    def kind(self) -> Hashable:
        """Blocks of different kinds are treated apart, of whatever shape they are."""
        kernel = self.module.kernel_size if isinstance(self.module, nn.Conv2d) else ()
        return type(self.module), kernel, self.bias is None

    @property
    def groups(self) -> int:
        """How many independent matrices W_bar consists of: 1, but for grouped convolutions."""
        return self.module.groups if isinstance(self.module, nn.Conv2d) else 1

    @property
    def convolutional(self) -> bool:
        """Whether the layer is a convolution."""
        return isinstance(self.module, nn.Conv2d)

    @property
    def inputs(self) -> int:
        """Columns of W: what one output is made from, without the 1."""
        return self.weight[0].numel()

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of one group's W_bar, (out, in+1) or (out, in)."""
        return self.weight.shape[0] // self.groups, self.inputs + (self.bias is not None)

    @property
    def parameters(self) -> list[Tensor]:
        """Weight and, if it is in the block, bias."""
        return [p for p in (self.weight, self.bias) if p is not None]

    @property
    def treatments(self) -> dict[Tensor, str]:
        """What `summary()` says of each parameter."""
        said = {self.weight: f"block '{self.name}' {list(self.shape)}"}
        if self.bias is not None:
            said[self.bias] = f"in block '{self.name}'"
        return said

    def parts(self, stacked: Tensor) -> list[tuple[Tensor, Tensor]]:
        """Each parameter with its part of a tensor like W_bar, [groups, out, in+1]."""
        size = self.inputs
        pairs = [(self.weight, stacked[..., :size])]
        if self.bias is not None:
            pairs.append((self.bias, stacked[..., size]))
        return pairs


@dataclass(frozen=True, eq=False)
class Variable:
    """One parameter by itself, seen as a tensor of `shape` (with the same entries).

    Takes the place of a Block in methods that need no layers. axes: those of the shape that get a
    matrix; too long ones do not.
    """

    name: str
    weight: Tensor
    shape: tuple[int, ...]
    axes: tuple[int, ...]

    kind = Tensor
    groups = 1
    convolutional = False

    @property
    def parameters(self) -> list[Tensor]:
        """The parameter."""
        return [self.weight]

    @property
    def treatments(self) -> dict[Tensor, str]:
        """How `summary()` describes the parameter."""
        long = ", ".join(str(n) for i, n in enumerate(self.shape) if i not in self.axes)
        if not self.axes:
            return {self.weight: f"plain rule: axes too long for a matrix: {long}"}
        rest = f", no matrix on long axes: {long}" if long else ""
        return {self.weight: f"axes {list(self.shape)}{rest}"}

    def parts(self, stacked: Tensor) -> list[tuple[Tensor, Tensor]]:
        """The parameter with a tensor [1, *shape]."""
        return [(self.weight, stacked)]


def find_variables(
    model: nn.Module, shape: Callable[[nn.Module, Tensor], tuple[int, ...]], longest: int
) -> list[Variable]:
    """Every trainable parameter once, in the shape for its (first) module and itself.

    Axes up to the length `longest` get a matrix.
    """
    found = []
    for parameter, names in owners_of(model).items():
        if parameter.requires_grad:
            sizes = shape(model.get_submodule(names[0].rpartition(".")[0]), parameter)
            axes = tuple(i for i, n in enumerate(sizes) if n <= longest)
            found.append(Variable(names[0], parameter, sizes, axes))
    return found


def find_blocks(model: nn.Module) -> list[Block]:
    """Every nn.Linear and nn.Conv2d whose trainable weight no other module uses.

    Only these classes themselves: a subclass or a parametrised layer may compute something else.
    """
    owners = owners_of(model)
    blocks = []
    for name, module in model.named_modules():
        # what a hook computes (weight_norm, pruning) is no parameter
        own: Any = module._parameters
        weight: Tensor | None = own.get("weight")
        if type(module) not in KINDS or weight is None or not weight.requires_grad:
            continue
        bias: Tensor | None = own.get("bias")
        if bias is not None and (not bias.requires_grad or len(owners[bias]) > 1):
            bias = None
        if len(owners[weight]) == 1:
            blocks.append(Block(name, module, weight, bias))
    return blocks


def plain_reasons(model: nn.Module, blocks: Iterable[Any]) -> dict[Tensor, str]:
    """The trainable parameters outside all blocks, each with the reason why."""
    inside = {p for block in blocks for p in block.parameters}
    reasons = {}
    for parameter, names in owners_of(model).items():
        if parameter in inside or not parameter.requires_grad:
            continue
        module = model.get_submodule(names[0].rpartition(".")[0])
        if len(names) > 1:
            reasons[parameter] = f"shared as {', '.join(names)}"
        elif type(module) in KINDS and module._parameters.get("weight") is None:
            reasons[parameter] = f"the weight of this {type(module).__name__} is computed"
        elif type(module) in KINDS:
            reasons[parameter] = "the weight beside it is frozen or shared"
        else:
            reasons[parameter] = f"no block for {type(module).__name__}"
    return reasons


def owners_of(model: nn.Module) -> dict[Tensor, list[str]]:
    """Each parameter with the names of all its places in the model."""
    owners: dict[Tensor, list[str]] = {}
    for prefix, module in model.named_modules():
        for name, parameter in module.named_parameters(recurse=False, remove_duplicate=False):
            owners.setdefault(parameter, []).append(f"{prefix}.{name}" if prefix else name)
    return owners


def live_blocks(blocks: Iterable[Any]) -> list[Any]:
    """The blocks that have a gradient now; the others sit this step out, as usual in PyTorch.

    Raises: ValueError for a block in which only one of weight and bias has a gradient.
    """
    live = []
    for block in blocks:
        grads = [p.grad is not None for p in block.parameters]
        if any(grads) and not all(grads):
            raise ValueError(
                f"layer '{block.name}': only one of weight and bias has a gradient; freeze "
                "parameters (requires_grad_(False)) before the optimizer is built"
            )
        if all(grads):
            live.append(block)
    return live


@dataclass(frozen=True, eq=False)
class Layer:
    """Parameters that share a step size: those one module owns itself, weight and bias."""

    name: str
    parameters: list[Tensor]


def layers_of(model: nn.Module, parameters: Iterable[Tensor]) -> list[Layer]:
    """One Layer for each module that owns some of these parameters; a shared one counts once.

    Raises: ValueError if a parameter is not the model's.
    """
    left = dict.fromkeys(parameters)
    layers = []
    for name, module in model.named_modules():
        own = [p for p in module.parameters(recurse=False) if p in left]
        for p in own:
            del left[p]
        if own:
            layers.append(Layer(name, own))
    if left:
        raise ValueError(
            f"{len(left)} parameters of the optimizer are not in {type(model).__name__}; give the "
            "model whose parameters the optimizer trains"
        )
    return layers
