"""common/incontext.py: the learners that GPICL is compared with, against their equations."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from common.incontext import FITTED, VSML, OnlineSGD, OuterProductLSTM, fitted_correct


def some_data(t=7, a=6, c=4):
    generator = torch.Generator().manual_seed(0)
    return torch.randn(1, t, a, generator=generator), torch.randint(c, (1, t), generator=generator)


def previous_labels(y):
    return F.pad(F.one_hot(y[:, :-1], 4).float(), (0, 0, 1, 0))


def logits_of(learner, x, y):
    return learner(x, previous_labels(y))[0]


def vsml(num_inputs):
    torch.manual_seed(0)
    return VSML(num_inputs, 4, units=4, message_size=3, ticks=2)


def test_outer_product_lstm_against_its_equations():
    """Appendix D.4, element by element."""
    learner, (x, y) = OuterProductLSTM(6, 4, 2, 5), some_data()
    learner.key_scale.data.fill_(0.7)
    label, heads, size = previous_labels(y), 2, 5
    hidden, cell, outputs = torch.zeros(heads * size), torch.zeros(heads, size, size), []
    for t in range(7):
        gated = learner.gates(torch.cat([x[0, t], label[0, t], hidden])).view(heads, 8 * size)
        hidden = torch.zeros(heads, size)
        for h in range(heads):
            k1, k2, q, o = gated[h].split([3 * size, 3 * size, size, size])
            for i in range(size):
                for j in range(size):
                    outer = [
                        torch.tanh(k1[g * size + i]) * math.log(1 + math.exp(0.7)) * torch.tanh(k2[g * size + j])
                        for g in range(3)
                    ]
                    gate_i, g, gate_f = torch.sigmoid(outer[0]), outer[1], torch.sigmoid(outer[2] + 1)
                    cell[h, i, j] = gate_f * cell[h, i, j] + gate_i * g
            for j in range(size):
                hidden[h, j] = torch.sigmoid(o[j]) * torch.tanh(sum(cell[h, i, j] * q[i] for i in range(size)))
        hidden = hidden.flatten()
        outputs.append(learner.head(hidden))
    torch.testing.assert_close(torch.stack(outputs), logits_of(learner, x, y)[0], atol=1e-5, rtol=1e-4)


def test_vsml_against_loops_and_its_symmetries():
    """Eq. 4.9 for each sub-RNN; and permuting inputs changes nothing, permuting classes permutes the answers."""
    learner, (x, y) = vsml(3), some_data(a=3)
    grid, n = learner.grid, 4
    h, c, predicted, outputs = torch.zeros(3, 4, n), torch.zeros(3, 4, n), torch.zeros(4), []
    label = previous_labels(y)[0]
    for t in range(7):
        for _ in range(2):
            new_h, new_c = h.clone(), c.clone()
            for a in range(3):
                for b in range(4):
                    row = torch.stack([grid.to_row(h[a, other]) for other in range(4)]).mean(0)
                    column = torch.stack([grid.to_column(h[other, b]) for other in range(3)]).mean(0)
                    gates = grid.from_row(torch.cat([x[0, t, a : a + 1], row])) + grid.recurrent(h[a, b])
                    of_column = torch.stack([predicted[b] - label[t, b], label[t, b]])
                    i, j, f, o = (gates + grid.from_column(torch.cat([of_column, column]))).chunk(4)
                    new_c[a, b] = torch.sigmoid(f + 1) * c[a, b] + torch.sigmoid(i) * torch.tanh(j)
                    new_h[a, b] = torch.sigmoid(o) * torch.tanh(new_c[a, b])
            h, c = new_h, new_c
        messages = torch.stack([torch.stack([grid.to_column(h[a, b]) for a in range(3)]).mean(0) for b in range(4)])
        outputs.append(learner.scale * messages[:, 0])
        predicted = outputs[-1].softmax(0)
    torch.testing.assert_close(torch.stack(outputs), logits_of(learner, x, y)[0], atol=1e-4, rtol=1e-4)
    order = torch.tensor([2, 0, 3, 1])
    torch.testing.assert_close(logits_of(learner, x[..., [1, 2, 0]], order[y])[..., order], logits_of(learner, x, y))
    torch.testing.assert_close(vsml(9).state_dict(), learner.state_dict())  # any number of inputs


@pytest.mark.parametrize("rule", ["sgd", "adam", "adamw"])
@pytest.mark.parametrize("hidden", [0, 6])
def test_online_sgd_equals_torch_optim(rule, hidden):
    learner = OnlineSGD(6, 4, rule, hidden, 0.05)
    for parameter in learner.parameters():
        nn.init.normal_(parameter, std=0.4, generator=torch.Generator().manual_seed(parameter.numel()))
    x, y = some_data(t=20)
    layers = [nn.Linear(w.shape[1], w.shape[0]) for w in learner.weights]
    for layer, w, b in zip(layers, learner.weights, learner.biases, strict=True):
        layer.weight.data, layer.bias.data = w.data.clone(), b.data.clone()
    net = nn.Sequential(*[part for layer in layers for part in (layer, nn.ReLU())][:-1])
    kind = {"sgd": torch.optim.SGD, "adam": torch.optim.Adam, "adamw": torch.optim.AdamW}[rule]
    optimizer, outputs = kind(net.parameters(), 0.05), []
    for t in range(20):
        logits = net(x[0, t])
        outputs.append(logits.detach())
        optimizer.zero_grad()
        F.cross_entropy(logits, y[0, t]).backward()
        optimizer.step()
    torch.testing.assert_close(logits_of(learner, x, y)[0], torch.stack(outputs), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("name", FITTED)
def test_classifiers_are_fitted_to_the_examples_before_alone(name):
    generator = torch.Generator().manual_seed(0)
    y = torch.randint(3, (4, 30), generator=generator)
    x = F.one_hot(y, 3) * 3.0 + 0.1 * torch.randn(4, 30, 3, generator=generator)
    correct = fitted_correct(name, x, y, [1, 2, 30])
    assert correct.shape == (4, 3) and correct[:, 2].all()
    assert torch.equal(correct[:, 0], y[:, 0] == 0) and torch.equal(correct[:, 1], y[:, 1] == y[:, 0])
    changed = y.clone()
    changed[:, -1] = (y[:, -1] + 1) % 3
    assert not fitted_correct(name, x, changed, [30]).any()
