"""What GPICL is compared with: learners that read a sequence of examples (thesis, appendices D.4 and D.5).

    learner = LSTM(num_inputs=64, num_classes=10, width=256)
    logits, state = learner(x, label)  # x (s, t, a), label (s, t, c) of the example before each
    logits, state = learner(more_x, more_label, state)

Axes: s sequences in parallel, t time (examples), a inputs, b outputs, c classes, h heads, n hidden state, m message.
"""

from itertools import pairwise
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from common.learners import descend


class MLP(nn.Module):
    """A classifier that sees one example at a time: two hidden layers with ReLUs (Figure 5.2a; N_D = 1 in Eq. 5.2)."""

    def __init__(self, num_inputs: int, num_classes: int, width: int):
        super().__init__()
        n = width
        self.layers = nn.Sequential(nn.Linear(num_inputs, n), nn.ReLU(), nn.Linear(n, n), nn.ReLU(), nn.Linear(n, num_classes))

    def forward(self, x: Tensor, label: Tensor, state: Any = None) -> tuple[Tensor, list]:
        return self.layers(x), []


class LSTM(nn.Module):
    """The in-context LSTM (Hochreiter et al. 2001; Table 5.2)."""

    def __init__(self, num_inputs: int, num_classes: int, width: int, label_scale: float = 1.0):
        super().__init__()
        self.label_scale = label_scale
        self.lstm = nn.LSTM(num_inputs + num_classes, width, batch_first=True)
        self.head = nn.Linear(width, num_classes)

    def forward(self, x: Tensor, label: Tensor, state: Any = None) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        h, state = self.lstm(torch.cat([x, self.label_scale * label], -1), state)
        return self.head(h), state


class Recurrent(nn.Module):
    """A learner that reads a sequence by step(x (s, a), label (s, c), state) -> logits (s, c), state."""

    def forward(self, x: Tensor, label: Tensor, state: Any = None) -> tuple[Tensor, Any]:
        if state is None:
            state = self.initial_state(len(x))
        steps = []
        for x_t, label_t in zip(x.unbind(1), label.unbind(1), strict=True):
            logits, state = self.step(x_t, label_t, state)
            steps.append(logits)
        return torch.stack(steps, 1), state

    def zeros(self, *shape: int) -> Tensor:
        parameter = next(self.parameters())
        return torch.zeros(shape, device=parameter.device, dtype=parameter.dtype)


class OuterProductLSTM(Recurrent):
    """An LSTM whose cell is a matrix for each head, written and gated by outer products and read by a query."""

    def __init__(self, num_inputs: int, num_classes: int, heads: int, size: int, label_scale: float = 1.0):
        super().__init__()
        self.heads, self.size, self.label_scale = heads, size, label_scale
        self.gates = nn.Linear(num_inputs + num_classes + heads * size, 8 * heads * size)
        self.key_scale = nn.Parameter(torch.zeros(()))
        self.head = nn.Linear(heads * size, num_classes)

    def initial_state(self, s: int) -> tuple[Tensor, Tensor]:
        return self.zeros(s, self.heads * self.size), self.zeros(s, self.heads, self.size, self.size)

    def step(self, x: Tensor, label: Tensor, state: Any) -> tuple[Tensor, Any]:
        """cell (s, h, i, j)."""
        hidden, cell = state
        parts = self.gates(torch.cat([x, self.label_scale * label, hidden], -1))
        k1, k2, query, out = parts.unflatten(-1, (self.heads, 8, self.size)).split([3, 3, 1, 1], 2)  # (s, h, k, i)
        i, g, f = (F.softplus(self.key_scale) * k1.tanh()[..., None] * k2.tanh()[..., None, :]).unbind(2)
        cell = (f + 1).sigmoid() * cell + i.sigmoid() * g
        hidden = (out.sigmoid() * (query @ cell).tanh()).flatten(1)
        return self.head(hidden), (hidden, cell)


class SubRNNs(nn.Module):
    """A grid of LSTMs with shared weights. The inputs of each are those of its row a and of its column b, and the messages of
    its row and of its column: Eq. 4.9 with messages of the last tick, where chapter 4 keeps those of the last example. Messages
    are averaged. units: n; message_size: m."""

    def __init__(self, row_inputs: int, column_inputs: int, units: int, message_size: int, ticks: int):
        super().__init__()
        n, m, self.ticks = units, message_size, ticks
        self.from_row, self.from_column = nn.Linear(row_inputs + m, 4 * n), nn.Linear(column_inputs + m, 4 * n)
        self.recurrent = nn.Linear(n, 4 * n, bias=False)
        self.to_row, self.to_column = nn.Linear(n, m), nn.Linear(n, m)

    def forward(self, row: Tensor, column: Tensor, h: Tensor, c: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """row (s, a, i), column (s, b, j), h and c (s, a, b, n). Returns messages to the columns (s, b, m), h and c."""
        for _ in range(self.ticks):
            from_row = self.from_row(torch.cat([row, self.to_row(h.mean(2))], -1))
            from_column = self.from_column(torch.cat([column, self.to_column(h.mean(1))], -1))
            i, j, f, o = (from_row[:, :, None] + from_column[:, None] + self.recurrent(h)).chunk(4, -1)
            c = (f + 1).sigmoid() * c + i.sigmoid() * j.tanh()
            h = o.sigmoid() * c.tanh()
        return self.to_column(h.mean(1)), h, c


class VSML(Recurrent):
    """One layer of VSML with self-messages. A row's input is one of the network's; a column's are the error of the last
    prediction and the last label. Logits are the first of the messages to the columns."""

    def __init__(self, num_inputs: int, num_classes: int, units: int, message_size: int, ticks: int):
        super().__init__()
        self.shape = (num_inputs, num_classes, units)
        self.grid = SubRNNs(1, 2, units, message_size, ticks)
        self.scale = nn.Parameter(torch.tensor(10.0))  # averages over many inputs are small

    def initial_state(self, s: int) -> tuple[Tensor, Tensor, Tensor]:
        return self.zeros(s, *self.shape), self.zeros(s, *self.shape), self.zeros(s, self.shape[1])

    def step(self, x: Tensor, label: Tensor, state: Any) -> tuple[Tensor, Any]:
        *state, predicted = state
        messages, *state = self.grid(x[..., None], torch.stack([predicted - label, label], -1), *state)
        logits = self.scale * messages[..., 0]
        return logits, (*state, logits.softmax(-1))


class VSMLWithoutSymmetries(Recurrent):
    """The same grid, of size x size, between two learned linear projections: no symmetry between inputs, nor between
    classes."""

    def __init__(
        self, num_inputs: int, num_classes: int, size: int, units: int, message_size: int, ticks: int, label_scale: float = 1.0
    ):
        super().__init__()
        self.shape, self.label_scale = (size, size, units), label_scale
        self.project = nn.Linear(num_inputs + num_classes, 2 * size)
        self.grid = SubRNNs(1, 1, units, message_size, ticks)
        self.head = nn.Linear(size * message_size, num_classes)

    def initial_state(self, s: int) -> tuple[Tensor, Tensor]:
        return self.zeros(s, *self.shape), self.zeros(s, *self.shape)

    def step(self, x: Tensor, label: Tensor, state: Any) -> tuple[Tensor, Any]:
        row, column = self.project(torch.cat([x, self.label_scale * label], -1))[..., None].chunk(2, 1)
        messages, *state = self.grid(row, column, *state)
        return self.head(messages.flatten(1)), tuple(state)


class OnlineSGD(Recurrent):
    """A network without or with one hidden layer of ReLUs that learns by backpropagation from one example at a time: by SGD,
    Adam (Kingma and Ba 2015) or AdamW. Its state is the weights. MAML (Finn et al. 2017) is the same with SGD and initial
    weights that are meta-trained, through the updates (Appendix D.5)."""

    RULES = ("sgd", "adam", "adamw")

    def __init__(self, num_inputs: int, num_classes: int, rule: str, hidden: int, lr: float | Tensor):
        """lr may be a tensor (s, 1, 1), a rate for each sequence."""
        super().__init__()
        self.rule, self.lr = rule, lr
        sizes = (num_inputs, hidden, num_classes) if hidden else (num_inputs, num_classes)
        self.weights = nn.ParameterList(torch.empty(b, a) for a, b in pairwise(sizes))
        self.biases = nn.ParameterList(torch.empty(b) for b in sizes[1:])

    def initial_state(self, s: int) -> dict[str, Any]:
        """Weights and moments of all layers, their inputs, the last prediction, and how many there were."""
        layers, inputs = [], []
        for weight, bias in zip(self.weights, self.biases, strict=True):
            weight = torch.cat([weight.T, bias[None]]).expand(s, -1, -1)
            layers.append((weight, *(torch.zeros_like(weight) for _ in range(2 * (self.rule != "sgd")))))
            inputs.append(self.zeros(s, weight.shape[1]))
        return dict(layers=layers, inputs=inputs, predicted=self.zeros(s, len(bias)), t=self.zeros(1))

    def step(self, x: Tensor, label: Tensor, state: Any) -> tuple[Tensor, Any]:
        """Learn from the last example, whose label is now there, then predict."""
        layers, t = list(state["layers"]), state["t"]
        error = state["predicted"] - label  # gradient of the cross-entropy with respect to the logits; zero before the first
        decay = 0.01 * (t > 0) if self.rule == "adamw" else None
        for k in reversed(range(len(layers))):
            (weight, *moments), inputs = layers[k], state["inputs"][k]
            layers[k] = descend(weight, inputs, error, self.lr, t.clamp(min=1), *moments, decay=decay)
            if k > 0:  # backpropagation through ReLUs
                error = (weight @ error[..., None]).squeeze(-1)[:, :-1] * (inputs[:, :-1] > 0)
        inputs = []
        for weight, *_ in layers:
            inputs.append(F.pad(x.relu() if inputs else x, (0, 1), value=1.0))
            x = (inputs[-1][:, None] @ weight).squeeze(1)
        return x, dict(layers=layers, inputs=inputs, predicted=x.softmax(-1), t=t + 1)


FITTED = ("logistic", "neighbors", "forest")  # by scikit-learn, once for each prediction


def fitted_correct(name: str, x: Tensor, y: Tensor, steps: list[int]) -> Tensor:
    """Whether the predictions at some steps (counted from 1) of x (s, t, a), y (s, t) are correct, (s, len(steps)), after a
    fit of scikit-learn's defaults to the examples before. While there is one class, it is predicted; before any, class 0."""
    from sklearn.ensemble import RandomForestClassifier
    from sklearn.linear_model import LogisticRegression
    from sklearn.neighbors import KNeighborsClassifier

    def predict(x: np.ndarray, y: np.ndarray) -> int:
        """The label of the last example, from those before it."""
        if len(set(y[:-1])) < 2:
            return y[0] if len(y) > 1 else 0
        models = {
            "logistic": LogisticRegression(max_iter=1000),
            "neighbors": KNeighborsClassifier(min(5, len(y) - 1)),
            "forest": RandomForestClassifier(random_state=0),
        }
        return models[name].fit(x[:-1], y[:-1]).predict(x[-1:])[0]

    xs, ys = x.numpy(force=True), y.numpy(force=True)
    correct = [[predict(x[:step], y[:step]) == y[step - 1] for step in steps] for x, y in zip(xs, ys, strict=True)]
    return torch.tensor(correct, device=x.device)
