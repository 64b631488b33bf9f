"""Plain PyTorch, one expert after the other, stop-gradients as ``.detach()``: what must come out.

The functions take the parameters of the modules they judge as dense matrices, so gradients can be
compared as they are. Everything they know about subsets they read off the groups' names.
"""

import torch
import torch.nn.functional as F
from hypothesis import settings
from hypothesis import strategies as st

seeds = st.integers(0, 2**31 - 1)
#: For properties that take tens of milliseconds an example: a third of the profile's.
fewer = settings(max_examples=settings().max_examples // 3)
POISON = (float("nan"), float("inf"), float("-inf"), 1e300)


def reads(family, columns=None):
    """For each expert: the experts of ``columns`` it reads, and the one it may train, if any."""
    columns = family if columns is None else columns
    result = []
    for name, groups in family.subsets.items():
        inside = [j for j, other in enumerate(columns.subsets.values()) if {*other} <= {*groups}]
        own = []
        for j in inside:
            namesake = columns.names[j]
            there = family.subsets.get(namesake)
            # The expert of that name trains j if it reads j, else the expert of the same groups.
            if there is not None and {*columns.subsets[namesake]} <= {*there}:
                own += [j] if namesake == name else []
            elif {*columns.subsets[namesake]} == {*groups}:
                own.append(j)
        result.append((inside, own))
    return result


def linear(dense, bias, parts, sizes, reading):
    """``F.linear`` of each expert over what it reads, of others behind ``.detach()``."""
    columns = torch.arange(dense.shape[1]).split([part.shape[-1] for part in parts])
    rows = torch.arange(dense.shape[0]).split(list(sizes))
    outputs = []
    for units, (inside, own) in zip(rows, reading, strict=True):
        seen = [parts[j] if j in own else parts[j].detach() for j in inside]
        x = torch.cat([parts[0][..., :0], *seen], -1)
        at = torch.cat([torch.arange(0), *(columns[j] for j in inside)])
        outputs.append(F.linear(x, dense[units][:, at], None if bias is None else bias[units]))
    return outputs


def project(layer, count, parts, sizes, reading):
    """The ``count`` maps of a stacked layer, each a list with one output per expert."""
    dense = layer.dense_weight().chunk(count)
    bias = [None] * count if layer.bias is None else layer.bias.chunk(count)
    return [linear(w, b, parts, sizes, reading) for w, b in zip(dense, bias, strict=True)]


def attention(module, query, key, value, padding=None, attn_mask=None):
    """Output and the weights of every head, ``(N, heads, L, S)``; all shapes batch first."""
    family, sizes = module.family, module.out_proj.layout.row_sizes
    inner = reads(family)
    columns = sizes if module.kv_proj is None else module.kv_proj.layout.col_sizes
    split = [t.split(list(of), -1) for t, of in ((query, sizes), (key, columns), (value, columns))]
    if module.in_proj is None:
        kv_family = module.kv_family
        (q,) = project(module.q_proj, 1, split[0], sizes, inner)
        k, v = (
            project(module.kv_proj, 2, parts, sizes, reads(family, kv_family))[n]
            for n, parts in enumerate(split[1:])
        )
    else:
        q, k, v = (project(module.in_proj, 3, split[n], sizes, inner)[n] for n in range(3))
    scores_of = _scores(padding, attn_mask, query, key, module.num_heads)
    outputs, weights, first = [], [], 0
    for q_i, k_i, v_i in zip(q, k, v, strict=True):
        heads, taken = [], 0
        while taken < q_i.shape[-1]:
            d = module.head_dims[first]
            here = slice(taken, taken + d)
            scores = q_i[..., here] @ k_i[..., here].mT / d**0.5 + scores_of(first)
            nothing = (scores == -torch.inf).all(-1, keepdim=True)
            weight = scores.masked_fill(nothing, 0).softmax(-1).masked_fill(nothing, 0)
            heads.append(weight @ v_i[..., here])
            weights.append(weight)
            taken, first = taken + d, first + 1
        outputs.append(torch.cat(heads, -1))
    out = module.out_proj
    return (
        torch.cat(linear(out.dense_weight(), out.bias, outputs, sizes, inner), -1),
        torch.stack(weights, 1),
    )


def _scores(padding, attn_mask, query, key, heads):
    def additive(mask):
        return torch.zeros_like(mask, dtype=query.dtype).masked_fill(mask, -torch.inf)

    total = query.new_zeros(query.shape[0], heads, query.shape[1], key.shape[1])
    if padding is not None:
        padding = additive(padding) if padding.dtype == torch.bool else padding
        total = total + padding[:, None, None]
    if attn_mask is not None:
        attn_mask = additive(attn_mask) if attn_mask.dtype == torch.bool else attn_mask
        total = total + (attn_mask if attn_mask.dim() == 2 else attn_mask.view_as(total))
    return lambda head: total[:, head]


def gru_cell(cell, x, states, sizes, reading, inner):
    """One step of every expert; ``x`` is split as the input layout's columns are."""
    into = project(cell.input_gates, 3, x, sizes, reading)
    back = project(cell.hidden_gates, 3, states, sizes, inner)
    after = []
    for i, state in enumerate(states):
        (xr, xz, xn), (hr, hz, hn) = ([gate[i] for gate in gates] for gates in (into, back))
        r, z = torch.sigmoid(xr + hr), torch.sigmoid(xz + hz)
        after.append((1 - z) * torch.tanh(xn + r * hn) + z * state)
    return after


def gru(module, x, hx, lengths, groups=None):
    """Output (N, T, units) and last state, one sample and one step at a time.

    ``groups``: group name to width of the input, if not the family's own.
    """
    family = module.family
    sizes = module.cells[0].hidden_gates.layout.col_sizes
    inner = reads(family)
    groups = family.groups if groups is None else groups
    of_groups = [
        (inside, inside)
        for subset in family.subsets.values()
        for inside in [[n for n, group in enumerate(groups) if group in subset]]
    ]
    outputs, lasts = [], []
    for n, length in enumerate(lengths):
        steps = [x[n, t].split(list(groups.values())) for t in range(length)]
        last = []
        for k, cell in enumerate(module.cells):
            states = list(hx[k, n].split(list(sizes)))
            after = []
            for step in steps:
                states = gru_cell(cell, step, states, sizes, of_groups if k == 0 else inner, inner)
                after.append(states)
            steps = after
            last.append(torch.cat(states))
        rows = [torch.cat(step) for step in steps]
        rows += [x.new_zeros(sum(sizes))] * (x.shape[1] - length)
        outputs.append(torch.stack(rows))
        lasts.append(torch.stack(last))
    return torch.stack(outputs), torch.stack(lasts, 1)


def norm(module, x):
    """``F.layer_norm`` of each expert."""
    weight, bias = module.weight.split(module.widths), module.bias.split(module.widths)
    parts = zip(x.split(module.widths, -1), weight, bias, strict=True)
    return torch.cat([F.layer_norm(p, p.shape[-1:], w, b, module.eps) for p, w, b in parts], -1)


def gradients(output, inputs, seed=0):
    """Gradients of a random-weighted sum of ``output``; zeros where there is none."""
    generator = torch.Generator().manual_seed(seed)
    grad_y = torch.randn(output.shape, generator=generator, dtype=torch.float64).to(output)
    return torch.autograd.grad(
        output, list(inputs), grad_y, materialize_grads=True, retain_graph=True
    )


def same_bits(a, b):
    """Equal bit for bit, NaN included."""
    return torch.equal(a.contiguous().view(torch.uint8), b.contiguous().view(torch.uint8))


@st.composite
def widths(draw, family, of=(1, 2, 3, 5)):
    """Units per expert: one number, or ragged."""
    ragged = st.lists(st.sampled_from(of), min_size=family.num_experts, max_size=family.num_experts)
    return draw(st.one_of(st.sampled_from(of), ragged))
