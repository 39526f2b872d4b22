"""Problem: a model, a loss and a batch, copied and checked, whose curvature is computed."""

import warnings
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from . import checks
from .blocks import Block, Member, owner, units
from .copies import first_line, hook_free_copy, left_out, work_on_copies
from .functional import call

W_BAR_LAYERS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)


class Problem:
    """A model, a loss and a batch whose curvature is asked for.

    loss(outputs, targets) must be the mean over the batch of per-example losses (checked). A
    hook-free copy of the model in eval mode and a copy of the data are used; the model given and
    the global random state stay as they are. `notes` say where eval mode or missing hooks change
    the loss, or may.

    dtype: of the copies, float64 recommended; None keeps the model's. likelihood: "categorical",
    "bernoulli" or "gaussian", for `exact.fisher` and `fisher_mc`; None finds it from the loss.
    budget: bytes for truths, computed and kept (default 4 GiB).

    Raises: ValueError for an empty batch, non-finite values, a random model, a loss that is not a
    mean over examples, no trainable parameter, weights made by hooks, or what cannot be copied.
    """

    def __init__(
        self,
        model: nn.Module,
        loss: checks.Loss,
        inputs: Tensor,
        targets: Tensor,
        *,
        dtype: torch.dtype | None = None,
        likelihood: str | None = None,
        budget: int = 4 * 2**30,
    ) -> None:
        checks.check_batch(inputs, targets)
        checks.check_hooks(model)
        self.model = hook_free_copy(model).to(dtype=dtype).eval()
        self.loss = hook_free_copy(loss).to(dtype=dtype) if isinstance(loss, nn.Module) else loss
        self.inputs, self.targets = (_copy(t.detach(), dtype) for t in (inputs, targets))
        self.likelihood = likelihood
        self.notes: list[str] = []
        self._kept: OrderedDict[Any, Any] = OrderedDict()
        self.budget = budget
        self._room = budget // 4
        self.trainable = [n for n, p in self.model.named_parameters() if p.requires_grad]
        checks.check_parameters(self.model)
        with torch.random.fork_rng(_devices(self.inputs)):
            work_on_copies(self.model, self.inputs)
            checks.check_forward(self.model, self.loss, self.inputs, self.targets)
            checks.check_mean(self.model, self.loss, self.inputs, self.targets)
            note = self._train_mode(model, dtype) if model.training else ""
        self._note(note, warn=True)
        self._note(*left_out(model))
        self._gradients = self._all_gradients()

    def _note(self, note: str, warn: bool) -> None:
        if note:
            self.notes.append(note)
        if note and warn:
            warnings.warn(note, stacklevel=3)

    def _train_mode(self, model: nn.Module, dtype: torch.dtype | None) -> str:
        """A note where dropout or batch statistics make the training loss another one, else ""."""
        with torch.no_grad():
            evaluation = self.loss(self.model(self.inputs), self.targets).item()
            note = f"measured in eval mode, where the loss is {evaluation:.6g}; in train mode it "
            try:
                as_trained = hook_free_copy(model).to(dtype=dtype).train()
                training = self.loss(as_trained(self.inputs.clone()), self.targets).item()
            except Exception as error:  # of any kind: what is measured does without this loss
                return f"{note}could not be evaluated ({first_line(error)})"
        if abs(training - evaluation) <= 1e-6 * (1 + abs(evaluation)):
            return ""
        return f"{note}is {training:.6g} (dropout or batch statistics)"

    def _all_gradients(self) -> dict[str, Tensor | None]:
        parameters = dict(self.model.named_parameters())
        wanted = [parameters[name] for name in self.trainable]
        with torch.enable_grad():
            value = self.loss(self.model(self.inputs), self.targets)
            found = torch.autograd.grad(value, wanted, allow_unused=True)
        for parameter in parameters.values():
            parameter.requires_grad_(False)
        return dict(zip(self.trainable, found, strict=True))

    @property
    def n(self) -> int:
        """Examples in the batch."""
        return len(self.inputs)

    def gradient(self, block: Block) -> Tensor:
        """Gradient of the batch-mean loss with respect to the block, [d]."""
        return block.join({name: self._gradients[name] for name in block.parameters})  # type: ignore[misc]

    def outputs(self, block: Block, v: Tensor) -> Tensor:
        """Model outputs [n, ...] at the block's parameters plus v [d]; differentiable."""
        shifts = block.split(v)
        parameters = {n: self.model.get_parameter(n) + shift for n, shift in shifts.items()}
        return call(self.model, parameters, self.inputs)

    def total_loss(self, outputs: Tensor) -> Tensor:
        """Sum of the per-example losses as a function of the outputs."""
        return self.n * self.loss(outputs, self.targets).reshape(())

    def blocks(
        self, by: str = "layer", groups: Mapping[str, Sequence[str]] | None = None
    ) -> list[Block]:
        """All blocks, by "layer" (module), "tensor", "unit" or "group".

        Units are a Linear layer's output neurons ("0[3]": row 3 of [W, b]) and a convolution's
        kernel slices ("0[3,1]": from input channel 1 to output 3; "0[3,bias]").
        groups: {name: module names}, for by="group".

        Raises: ValueError for an unknown `by` or a group of unknown layers.
        """
        if by == "layer":
            return list(self._layers().values())
        if by == "tensor":
            return [self._tensor(name) for name in self.trainable if self._used(name)]
        if by == "unit":
            return [unit for layer in self._layers().values() for unit in self._units(layer)]
        if by == "group":
            if not groups:
                raise ValueError('by="group" needs groups={name: [module names]}')
            return [self.group(name, modules) for name, modules in groups.items()]
        raise ValueError(f"no blocks by '{by}'; known: layer, tensor, unit, group")

    def group(self, name: str, modules: Sequence[str]) -> Block:
        """One block of all layers inside the named modules ("" is the model).

        Raises: ValueError for an unknown name, a frozen or an unused layer, or no layer at all.
        """
        members: list[Member] = []
        for module in modules:
            inside = [
                b.members[0]
                for n, b in self._layers().items()
                if n == module or n.startswith(f"{module}.") or module == ""
            ]
            if not inside and not self._bare(module):
                self._unknown(module)
            members += [member for member in inside if member not in members]
        if not members:
            raise ValueError(f"{list(modules)} hold no parameters; known: {list(self._layers())}")
        return Block(name, tuple(members))

    def _bare(self, module: str) -> bool:
        """Whether the module exists and has no parameters."""
        found = dict(self.model.named_modules()).get(module)
        return found is not None and not any(True for _ in found.parameters())

    def block(self, name: str) -> Block:
        """The layer "encoder.0", tensor "encoder.0.weight" or unit "encoder.0[3]".

        Raises: ValueError for a name the model lacks, a frozen or an unused layer.
        """
        if name in (layers := self._layers()):
            return layers[name]
        if name in self.trainable and self._used(name):
            return self._tensor(name)
        stem = name.partition("[")[0]
        if stem != name and stem in layers:
            units = {unit.name: unit for unit in self._units(layers[stem])}
            if name in units:
                return units[name]
        return self._unknown(name)

    def _unknown(self, name: str) -> Block:
        modules, stem = dict(self.model.named_modules()), name.partition("[")[0]
        own = [n for n, _ in self.model.named_parameters() if n == stem or owner(n) == stem]
        if stem in modules and own and not set(own) & set(self.trainable):
            raise ValueError(
                f"layer '{stem}' is frozen: {', '.join(own)} have requires_grad=False; "
                f"unfreeze it before measuring its curvature"
            )
        if own and stem == name:
            raise ValueError(f"layer '{stem}' is unused: the loss does not depend on {own}")
        raise ValueError(f"no block '{name}'; known: {list(self._layers())}")

    def _used(self, parameter: str) -> bool:
        return self._gradients[parameter] is not None

    def _layers(self) -> dict[str, Block]:
        owners: dict[str, list[str]] = {}
        for name in self.trainable:
            if self._used(name):
                owners.setdefault(owner(name), []).append(name)
        return {o: Block(o, (self._member(o, names),)) for o, names in owners.items()}

    def _units(self, layer: Block) -> list[Block]:
        return units(layer, self.model.get_submodule(layer.members[0].module))

    def _tensor(self, name: str) -> Block:
        return Block(name, (self._member(owner(name), [name]),))

    def _member(self, module: str, names: Sequence[str]) -> Member:
        linear = isinstance(self.model.get_submodule(module), W_BAR_LAYERS)
        if linear:  # the weight first, also where it was registered again, as prune.remove does
            names = sorted(names, key=lambda n: not n.endswith("weight"))
        shapes = tuple(tuple(self.model.get_parameter(n).shape) for n in names)
        local = [n.rpartition(".")[2] for n in names]
        w_bar = linear and local in (["weight"], ["weight", "bias"], ["bias"])
        return Member(module, tuple(names), shapes, w_bar)

    def recall(self, key: Any) -> Any:
        """The result kept for `key`, None if there is none."""
        return self._kept[key][0] if key in self._kept else None

    def remember(
        self, key: Any, compute: Callable[[], Any], size: int | Callable[[Any], int]
    ) -> Any:
        """The result kept for `key`, else that of compute(), which is kept.

        size: its bytes, or a function of it; the oldest results leave when a quarter of the budget
        is full.
        """
        if key in self._kept:
            return self._kept[key][0]
        found = compute()
        taken = size(found) if callable(size) else size
        self._kept[key] = (found, taken)
        others = [(k, s) for k, (_, s) in self._kept.items() if s and k != key]
        excess = taken + sum(s for _, s in others) - self._room
        for old, freed in others if taken else []:
            if excess <= 0:
                break
            del self._kept[old]
            excess -= freed
        return found


def _copy(tensor: Tensor, dtype: torch.dtype | None) -> Tensor:
    return tensor.to(dtype=dtype if tensor.is_floating_point() else None, copy=True)


def _devices(inputs: Tensor) -> list[int]:
    """CUDA devices whose random state the checks might move."""
    return [inputs.get_device()] if inputs.is_cuda else []
