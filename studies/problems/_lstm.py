"""LSTM with peepholes in plain tensor operations, which differentiate twice, and a classifier."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

PEEPHOLES = ("weight_ci", "weight_cf", "weight_co")
PARAMETERS = ("weight_ih", "weight_hh", "bias_ih", "bias_hh", *PEEPHOLES)


def lstm_step(
    projected: Tensor, h: Tensor, c: Tensor, W_h: Tensor, peepholes: Sequence[Tensor]
) -> tuple[Tensor, Tensor]:
    """One time step: hidden state and cell, both [n, h], of the step before -> those of this one.

    i, f, g, o  =  the four parts of  projected + h W_hᵀ
    c'          =  σ(f + w_cf * c) * c + σ(i + w_ci * c) * tanh(g)
    h'          =  σ(o + w_co * c') * tanh(c')

    projected [n, 4h]: what the input gives to the gates, biases included. W_h [4h, h]. peepholes:
    w_ci, w_cf, w_co, each [h].
    """
    w_ci, w_cf, w_co = peepholes
    i, f, g, o = torch.addmm(projected, h, W_h.T).chunk(4, dim=1)
    c = (f + w_cf * c).sigmoid() * c + (i + w_ci * c).sigmoid() * g.tanh()
    return (o + w_co * c).sigmoid() * c.tanh(), c


class PeepholeLSTM(nn.Module):
    """`nn.LSTM(input_size, hidden_size, num_layers, batch_first=True)` whose gates see the cell.

    The formulas are those of `lstm_step`. Parameters have the names, shapes and initial values of
    nn.LSTM's, and besides, for each layer k, weight_ci_l{k}, weight_cf_l{k} and weight_co_l{k} [h],
    which begin at zero: a new PeepholeLSTM is exactly the nn.LSTM of the same seed. Unlike the
    fused kernels of nn.LSTM it can be differentiated twice and forwards, on any device.

    Raises: ValueError for sizes below one, and for inputs or states of another shape.
    Source: Gers, Schraudolph and Schmidhuber 2002, "Learning precise timing with LSTM recurrent
    networks", JMLR 3.
    """

    def __init__(self, input_size: int, hidden_size: int, num_layers: int = 1) -> None:
        super().__init__()
        self.input_size, self.hidden_size, self.num_layers = input_size, hidden_size, num_layers
        if min(input_size, hidden_size, num_layers) < 1:
            raise ValueError(f"sizes are at least one, not {self.extra_repr()}")
        h = hidden_size
        for k in range(num_layers):
            inward = hidden_size if k else input_size
            shapes = ((4 * h, inward), (4 * h, h), (4 * h,), (4 * h,), (h,), (h,), (h,))
            for name, shape in zip(PARAMETERS, shapes, strict=True):
                self.register_parameter(f"{name}_l{k}", nn.Parameter(torch.empty(shape)))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Peepholes to zero, all else uniform in ±1/√h, drawn in the order of nn.LSTM."""
        bound = self.hidden_size**-0.5
        for name, parameter in self.named_parameters():
            if name.startswith(PEEPHOLES):
                nn.init.zeros_(parameter)
            else:
                nn.init.uniform_(parameter, -bound, bound)

    def forward(
        self, x: Tensor, state: tuple[Tensor, Tensor] | None = None
    ) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """Sequences x [n, T, input_size] -> (output, (h_n, c_n)).

        output [n, T, h]: the top layer's hidden states. h_n, c_n [layers, n, h]: every layer's last
        ones. state: the first ones, (h_0, c_0), of the same shapes; zeros where None.
        """
        h_0, c_0 = self._checked_state(x, state)
        last = []
        for k, (h, c) in enumerate(zip(h_0.unbind(0), c_0.unbind(0), strict=True)):
            x, h, c = self._layer(k, x, h, c)
            last.append((h, c))
        h_n, c_n = (torch.stack(each) for each in zip(*last, strict=True))
        return x, (h_n, c_n)

    def _layer(self, k: int, x: Tensor, h: Tensor, c: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        # getattr, for torch.func puts tensors in place of parameters, which get_parameter refuses
        W_x, W_h, b_x, b_h, *peepholes = (getattr(self, f"{name}_l{k}") for name in PARAMETERS)
        projected = linear(x.transpose(0, 1), W_x, b_x + b_h)  # [T, n, 4h]: one product for all
        outputs = []
        for each in projected.unbind(0):  # an index per step would fill as many gradients of [T, …]
            h, c = lstm_step(each, h, c, W_h, peepholes)
            outputs.append(h)
        return torch.stack(outputs, dim=1), h, c

    def _checked_state(
        self, x: Tensor, state: tuple[Tensor, Tensor] | None
    ) -> tuple[Tensor, Tensor]:
        if x.ndim != 3 or x.shape[2] != self.input_size or not x.shape[1]:
            raise ValueError(
                f"sequences are [n, T, {self.input_size}] with T > 0, not {list(x.shape)}"
            )
        shape = (self.num_layers, len(x), self.hidden_size)
        if state is None:
            return x.new_zeros(shape), x.new_zeros(shape)
        h, c = state
        if h.shape != shape or c.shape != shape:
            raise ValueError(
                f"h_0 and c_0 are {list(shape)}, not {list(h.shape)} and {list(c.shape)}"
            )
        return h, c

    def extra_repr(self) -> str:
        """Sizes, for print(model)."""
        return f"{self.input_size}, {self.hidden_size}, num_layers={self.num_layers}"


class SequenceClassifier(nn.Module):
    """Peephole LSTMs "lstm1", "lstm2", ... in a row, then "head", Linear on the last hidden state.

    One module for each layer, not one of several layers: so each can be a block of the curvature.

    inputs: features of a time step. hidden: units of every layer. Outputs are logits.
    """

    def __init__(self, inputs: int, hidden: int, layers: int, classes: int) -> None:
        super().__init__()
        for k in range(layers):
            self.add_module(f"lstm{k + 1}", PeepholeLSTM(hidden if k else inputs, hidden))
        self.head = nn.Linear(hidden, classes)

    def forward(self, x: Tensor) -> Tensor:
        """Sequences [n, T, inputs] -> logits [n, classes]."""
        *lstms, head = self.children()
        for lstm in lstms:
            x, _ = lstm(x)
        return head(x[:, -1])
