"""Whoever sees or changes a module's call is called, as in a sequence of the same modules."""

import copy
import functools

import pytest
import torch
from torch import nn
from torch.nn.modules import module as torch_module
from torch.nn.utils import parametrize, prune
from torch.utils.checkpoint import checkpoint

import maskmoe_kernels as mk
from maskmoe_kernels.models import InterpretableNCF, NCFSizes
from maskmoe_kernels.nn.attention import MaskedMultiheadAttention
from maskmoe_kernels.nn.gru import MaskedGRU

FAMILY = mk.SubsetFamily(
    {"a": 3, "b": 4, "c": 2},
    {"a": ["a"], "ab": ["a", "b"], "ac": ["a", "c"], "all": ["a", "b", "c"]},
)
ROWS = 6


def kept(value):
    """Tensors of any nest of tuples and dictionaries, as they are now."""
    if isinstance(value, torch.Tensor):
        return [value.detach().clone().as_subclass(torch.Tensor)]
    if isinstance(value, dict):
        value = tuple(value.values())
    return [t for part in value for t in kept(part)] if isinstance(value, tuple) else []


def recorder(log):
    """A hook of any signature: it keeps the tensors that it is given."""
    return lambda module, *args: log.append(kept(args))


def around(call, log):
    """``call``, with what goes in and what comes out kept."""

    @functools.wraps(call)
    def wrapped(*args, **kwargs):
        result = call(*args, **kwargs)
        log.append(kept((args, result)))
        return result

    return wrapped


class Doubled(nn.Module):
    """A parametrization that says when it is asked."""

    def __init__(self, log):
        super().__init__()
        self.log = [log]  # in a list, lest it be copied

    def forward(self, w):
        self.log[0].append(kept((w,)))
        return 2 * w


class Wrapper(nn.Module):
    """Around a layer, as those of quantization and of profilers are."""

    def __init__(self, layer, log):
        super().__init__()
        self.layer = layer
        self.seen = recorder(log)

    def forward(self, x):
        y = self.layer(x)
        self.seen(self, x, y)
        return y


def subclassed(layer, log):
    class Own(mk.MaskedLinear):
        def forward(self, x):
            y = super().forward(x)
            log.append(kept((x, y)))
            return y

    layer.__class__ = Own


def with_property(layer, log):
    class Own(mk.MaskedLinear):
        @property
        def weight(self):
            log.append([])
            return self.raw * 2

    raw = layer._parameters.pop("weight")
    layer.register_parameter("raw", raw)
    layer.__class__ = Own


def with_seeing_parameter(layer, log):
    class Seeing(nn.Parameter):
        @classmethod
        def __torch_function__(cls, function, types, args=(), kwargs=None):
            if "masked" in str(function):
                log.append([])
            return torch._C._disabled_torch_function_impl(function, types, args, kwargs or {})

    layer.weight = Seeing(layer.weight.detach())


def weight_norm(layer, log):
    nn.utils.weight_norm(layer)
    hook = next(iter(layer._forward_pre_hooks.values()))
    layer._forward_pre_hooks[next(iter(layer._forward_pre_hooks))] = around(hook, log)


def pruned(layer, log):
    torch.manual_seed(3)
    prune.random_unstructured(layer, "weight", 0.5)
    key, hook = next(iter(layer._forward_pre_hooks.items()))
    layer._forward_pre_hooks[key] = around(hook, log)


def replaced(name):
    return lambda layer, log: setattr(layer, name, around(getattr(layer, name), log))


def wrapped_in_place(sequence, k, log):
    sequence[k] = Wrapper(sequence[k], log)


def by_layer(install):
    return lambda sequence, k, log: install(sequence[k], log)


def on(method, *args, **kwargs):
    """A hook of one module."""
    return lambda layer, log: getattr(layer, method)(recorder(log), *args, **kwargs)


ON_A_MODULE = {
    "forward hook": on("register_forward_hook"),
    "forward hook, kwargs": on("register_forward_hook", with_kwargs=True),
    "forward hook, always": on("register_forward_hook", always_call=True),
    "forward pre-hook": on("register_forward_pre_hook"),
    "forward pre-hook, kwargs": on("register_forward_pre_hook", with_kwargs=True, prepend=True),
    "backward hook": on("register_full_backward_hook"),
    "backward pre-hook": on("register_full_backward_pre_hook"),
    "old backward hook": on("register_backward_hook"),
    "forward": replaced("forward"),
    "_call_impl": replaced("_call_impl"),
    "compiled call": lambda layer, log: setattr(
        layer, "_compiled_call_impl", around(layer._call_impl, log)
    ),
    "__call__": replaced("__call__"),  # of an instance: Python does not ask for it
}
ON_A_LAYER = {
    **ON_A_MODULE,
    "forward, checkpointed": lambda layer, log: setattr(
        layer,
        "forward",
        functools.partial(checkpoint, around(layer.forward, log), use_reentrant=False),
    ),
    "subclass": subclassed,
    "property": with_property,
    "parameter that sees": with_seeing_parameter,
    "parametrized weight": lambda layer, log: parametrize.register_parametrization(
        layer, "weight", Doubled(log)
    ),
    "parametrized bias": lambda layer, log: parametrize.register_parametrization(
        layer, "bias", Doubled(log)
    ),
    "weight_norm": weight_norm,
    "pruned": pruned,
    "hook of a parameter": lambda layer, log: layer.weight.register_hook(
        lambda grad: log.append(kept(grad))
    ),
    "hook after accumulation": lambda layer, log: layer.weight.register_post_accumulate_grad_hook(
        lambda p: log.append(kept(p.grad))
    ),
}
IN_A_SEQUENCE = {name: by_layer(install) for name, install in ON_A_LAYER.items()}
IN_A_SEQUENCE["wrapper"] = wrapped_in_place
NEVER = {"__call__"}
IN_BACKWARD = ("backward", "hook of a parameter", "hook after")

GLOBAL = [
    "register_module_forward_hook",
    "register_module_forward_pre_hook",
    "register_module_full_backward_hook",
    "register_module_full_backward_pre_hook",
    "register_module_backward_hook",
]


def data():
    torch.manual_seed(1)
    return torch.randn(ROWS, FAMILY.in_features), torch.rand(ROWS).round()


def mlp():
    torch.manual_seed(0)
    return mk.InterpretableMLP(FAMILY, [8, 8])


def results(entry, net, logits_of):
    """What an entry point returns and every gradient; of ``net``, or of ``logits_of`` beside it."""
    x, y = data()
    x.requires_grad_()
    if entry == "predict":
        out = net.predict(x) if net is not None else mk.mixture(logits_of(x).detach(), FAMILY)
        return [*out]
    if entry == "forward":
        out = logits_of(x) if net is None else net(x)
        out.backward(torch.arange(out.numel()).view_as(out).cos())
        return [out, x.grad]
    if net is None:
        loss = mk.gem_loss(logits_of(x), y, FAMILY, "smooth", normalize="sample")
    else:
        loss = net.gem_loss(x, y, "smooth", normalize="sample")
    loss.backward()
    return [loss, x.grad]


ENTRIES = ["forward", "gem_loss", "predict"]


def same(ours, theirs):
    assert len(ours) == len(theirs)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.filterwarnings("ignore")  # weight_norm and the old hooks are deprecated
@pytest.mark.parametrize("entry", ENTRIES)
@pytest.mark.parametrize("kind", IN_A_SEQUENCE)
def test_a_layer_is_seen_as_in_a_plain_sequence(kind, entry):
    net = mlp()
    plain = nn.Sequential(*(copy.deepcopy(layer) for layer in net.layers))
    logs = [], []
    for sequence, log in zip((net.layers, plain), logs, strict=True):
        IN_A_SEQUENCE[kind](sequence, 1, log)
    ours, theirs = results(entry, net, None), results(entry, None, plain)
    if kind not in NEVER and (entry != "predict" or not any(k in kind for k in IN_BACKWARD)):
        assert logs[1]
    assert len(logs[0]) == len(logs[1])
    for seen, expected in zip(*logs, strict=True):
        same(seen, expected)
    same(ours, theirs)
    same([p.grad for p in net.parameters()], [p.grad for p in plain.parameters()])


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("entry", ENTRIES)
@pytest.mark.parametrize("register", GLOBAL)
def test_global_hooks_see_every_layer(register, entry):
    net = mlp()
    plain = nn.Sequential(*(copy.deepcopy(layer) for layer in net.layers))
    logs = [], []
    for log, (of_net, layers) in zip(logs, ((net, None), (None, plain)), strict=True):

        def seen(module, *args, log=log):
            if isinstance(module, mk.MaskedLinear):
                log.append(kept(args))

        handle = getattr(torch_module, register)(seen)
        try:
            results(entry, of_net, layers)
        finally:
            handle.remove()
            torch_module._global_is_full_backward_hook = None
    assert len(logs[1]) == (0 if entry == "predict" and "backward" in register else 3)
    assert len(logs[0]) == len(logs[1])
    for ours, expected in zip(*logs, strict=True):
        same(ours, expected)


@pytest.mark.parametrize("entry", ENTRIES)
@pytest.mark.parametrize(("owner", "name"), [(mk.MaskedLinear, "forward"), (nn.Module, "__call__")])
def test_patched_classes_are_called(monkeypatch, owner, name, entry):
    """As profilers and tracers patch them."""
    net, log = mlp(), []
    monkeypatch.setattr(owner, name, around(getattr(owner, name), log))
    results(entry, net, None)
    layers = 3 if name == "forward" else 3 + 1 + 1
    assert len(log) == layers


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("entry", ENTRIES)
@pytest.mark.parametrize("of", ["net", "layers"])
@pytest.mark.parametrize("kind", [*ON_A_MODULE, "subclass"])
def test_the_mlp_and_its_layers_are_seen(kind, of, entry):
    net, log = mlp(), []
    expected, grads = results(entry, net, None), [p.grad for p in net.parameters()]
    net.zero_grad()
    module = net if of == "net" else net.layers
    if kind == "subclass":
        forward = around(type(module).forward, log)
        module.__class__ = type("Own", (type(module),), {"forward": forward})
    else:
        ON_A_MODULE[kind](module, log)
    same(results(entry, net, None), expected)
    for ours, theirs in zip([p.grad for p in net.parameters()], grads, strict=True):
        if theirs is not None:
            torch.testing.assert_close(ours, theirs)
    never = kind in NEVER or ("backward" in kind and entry == "predict")
    assert len(log) == (0 if never else 1)


def test_layers_may_be_another_module():
    net = mlp()
    x, y = data()
    expected = net(x), net.gem_loss(x, y), net.predict(x).probability
    net.layers = nn.Sequential(*net.layers)
    same([net(x), net.gem_loss(x, y), net.predict(x).probability], expected)


@pytest.mark.parametrize("kind", ON_A_LAYER)
@pytest.mark.filterwarnings("ignore")
def test_says_why_layers_run_one_by_one(kind):
    net = mlp()
    ON_A_LAYER[kind](net.layers[1], [])
    fused = "__call__" in kind or "hook of a parameter" in kind or "accumulation" in kind
    assert (net.layers.unsupported_reason() is None) == fused
    assert ("layer by layer" in repr(net)) != fused


def test_hooks_that_are_gone_cost_nothing():
    net = mlp()
    net.layers[0].register_forward_hook(recorder([])).remove()
    forward = net.layers[0].forward
    net.layers[0].forward = forward
    assert net.layers.unsupported_reason() is not None
    del net.layers[0].forward
    net.layers[1].note = "an attribute that is nobody's method"
    assert net.layers.unsupported_reason() is None


@pytest.mark.parametrize("kind", ["forward hook", "forward"])
def test_a_compiled_mlp_sees_them(kind):
    torch._dynamo.reset()
    net = mlp()
    ON_A_MODULE[kind](net.layers[1], [])
    net.layers[1].register_forward_hook(lambda module, args, y: 2 * y)
    x, _ = data()
    compiled = torch.compile(net, backend="aot_eager")
    torch.testing.assert_close(compiled(x), net.layers.layered(x))


def test_a_graph_of_modules_has_the_layers():
    class Tracer(torch.fx.Tracer):
        def is_leaf_module(self, module, name):
            return isinstance(module, mk.MaskedLinear)

    graph = Tracer().trace(mlp())
    assert [n.target for n in graph.nodes if n.op == "call_module"] == [
        f"layers.{k}" for k in range(3)
    ]


@pytest.mark.parametrize("entry", ["__call__", "gem_loss"])
def test_parameters_from_outside_and_checkpoints_keep_one_op(entry):
    net = mlp()
    x, y = data()
    call = (lambda n, *args: n(*args)) if entry == "__call__" else (lambda n, *a: n.gem_loss(*a))
    args = (x,) if entry == "__call__" else (x, y)
    expected = call(net, *args)
    grads = torch.autograd.grad(expected.sum(), [*net.parameters()])

    class Caller(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = copy.deepcopy(net)

        def forward(self, *args):
            return call(self.net, *args)

    outside = {f"net.{k}": p.detach().clone().requires_grad_() for k, p in net.named_parameters()}
    caller = Caller()
    for p in caller.parameters():
        p.detach().zero_()
    found = torch.func.functional_call(caller, outside, args)
    same(torch.autograd.grad(found.sum(), [*outside.values()]), grads)
    again = checkpoint(call, net, *args, use_reentrant=False)
    same([found, again], [expected, expected])
    same(torch.autograd.grad(again.sum(), [*net.parameters()]), grads)


# --- Other paths that leave a call out -----------------------------------------------------------

SIZES = NCFSizes(9, 7, {"sex": (2, 2), "age": (7, 3)}, 4, 5, 6)
PARTS = [
    "",
    "inputs",
    "inputs.content",
    "inputs.content.numeric",
    "inputs.content.embeddings.age",
    "inputs.user",
    "inputs.item",
    "experts",
    "experts.layers",
    "experts.layers.1",
]


def ncf_step(model, entry):
    torch.manual_seed(2)
    ids = [torch.randint(n, (ROWS,)) for n in (9, 7)]
    codes = torch.stack([torch.randint(n, (ROWS,)) for n in (2, 7)], -1)
    inputs = *ids, codes, torch.randn(ROWS, 4)
    if entry == "forward":
        out = model(*inputs)
        out.backward(torch.arange(out.numel()).view_as(out).cos())
    else:
        out = model.gem_loss(*inputs, torch.rand(ROWS).round(), weighting="deselection")
        out.backward()
    grads = [p.grad for p in model.parameters()]
    model.zero_grad()
    return [out, *grads]


@pytest.mark.parametrize("entry", ["forward", "gem_loss"])
@pytest.mark.parametrize("part", PARTS)
@pytest.mark.parametrize("kind", ["forward hook", "backward hook", "forward"])
def test_every_module_of_ncf_is_seen(kind, part, entry):
    torch.manual_seed(0)
    model, log = InterpretableNCF(SIZES, [8]), []
    expected = ncf_step(model, entry)
    ON_A_MODULE[kind](model.get_submodule(part), log)
    same(ncf_step(model, entry), expected)
    assert len(log) == 1


@pytest.mark.parametrize("entry", ["forward", "gem_loss"])
@pytest.mark.parametrize("kind", ["forward hook", "forward"])
def test_all_modules_of_ncf_are_seen_at_once(kind, entry):
    torch.manual_seed(0)
    model, logs = InterpretableNCF(SIZES, [8]), {part: [] for part in PARTS}
    expected = ncf_step(model, entry)
    for part, log in logs.items():
        ON_A_MODULE[kind](model.get_submodule(part), log)
    same(ncf_step(model, entry), expected)
    assert {part: len(log) for part, log in logs.items()} == dict.fromkeys(PARTS, 1)


def test_tables_of_ncf_that_nobody_watches_are_not_read_apart():
    """The op reads their rows itself; once a module among them is watched, all are gathered."""
    model = InterpretableNCF(SIZES, [8])
    ids = torch.zeros(ROWS, dtype=torch.int64)
    batch = ids, ids, torch.stack([ids, ids], -1), torch.randn(ROWS, 4)
    assert [table.shape[0] for table in model.inputs.parts(*batch).tables] == [2, 7, 9, 7]
    hook = model.inputs.item.register_forward_hook(lambda *of: None)
    assert model.inputs.parts(*batch).shape == (ROWS, model.family.in_features)
    hook.remove()
    assert len(model.inputs.parts(*batch).tables) == 4


def test_parametrized_tables_of_ncf_are_asked():
    torch.manual_seed(0)
    model, log = InterpretableNCF(SIZES, [8]), []
    parametrize.register_parametrization(model.inputs.user, "weight", Doubled(log))
    ncf_step(model, "gem_loss")
    assert len(log) == 2  # once while it was registered


@pytest.mark.parametrize("kind", ["forward hook", "backward hook", "forward", "forward pre-hook"])
@pytest.mark.parametrize("mode", ["self", "query apart", "all apart", "cross"])
def test_projections_of_an_attention_are_called(kind, mode):
    torch.manual_seed(0)
    cross = FAMILY if mode == "cross" else None
    attention = MaskedMultiheadAttention(FAMILY, 4, 2, cross, batch_first=True)
    x, other, third = torch.randn(3, 2, 5, 16)
    inputs = {"self": (x, x, x), "query apart": (x, other, other), "cross": (x, other, other)}
    query, key, value = inputs.get(mode, (x, other, third))
    for t in (query, key, value):
        t.requires_grad_()

    def step(attention):
        out = attention(query, key, value, need_weights=False)[0]
        parameters = [*attention.parameters(), query, key, value]
        return [out, *torch.autograd.grad(out, parameters, out.detach().cos())]

    expected = step(attention)
    for name in ("in_proj", "q_proj", "kv_proj", "out_proj"):
        hooked, log = copy.deepcopy(attention), []
        projection = getattr(hooked, name)
        if projection is not None:
            ON_A_MODULE[kind](projection, log)
            same(step(hooked), expected)
            calls = {"query apart": 2, "all apart": 3} if name == "in_proj" else {}
            assert len(log) == calls.get(mode, 1)


@pytest.mark.parametrize("kind", ["forward hook", "backward hook", "forward"])
@pytest.mark.parametrize("padded", [False, True])
def test_cells_of_a_gru_are_called(kind, padded):
    torch.manual_seed(0)
    gru = MaskedGRU(FAMILY, 3, num_layers=2)
    x = torch.randn(5, 2, 9, requires_grad=True)
    lengths = torch.tensor([3, 5]) if padded else None

    def step():
        out, last = gru(x, lengths=lengths)
        total = (out.cos() * 2).sum() + last.sin().sum()
        return [out, last, *torch.autograd.grad(total, [x, *gru.parameters()])]

    expected = step()
    for of, calls in (("cells.1", 5), ("cells.0.input_gates", 1), ("cells.0.hidden_gates", 5)):
        log = []
        ON_A_MODULE[kind](gru.get_submodule(of), log)
        same(step(), expected)
        assert len(log) == calls
