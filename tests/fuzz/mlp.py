"""Random MLPs: logits, mixtures and losses as one op, layer by layer and by their definition.

Also hooks, checkpoints, transforms, refusals, large families, and training runs. As for layers,
MLPs come from a pool that the seed draws: cases share its layouts and what is kept for them.
"""

import copy
import warnings
from functools import lru_cache

import numpy as np
import torch

import maskmoe_kernels as mk
from maskmoe_kernels.ops.selection import rare_positive, selection
from tests.fuzz.cases import as_view, on_threads, run_cases
from tests.fuzz.compare import (
    compare_gradients,
    compare_values,
    hold,
    limited,
    same_bits,
    same_twice,
)
from tests.fuzz.definition import SMALLEST
from tests.fuzz.drawn_mlps import Case
from tests.fuzz.losses import (
    CONFIDENCES,
    Loss,
    check_loss,
    check_training,
    sharpness,
    sign_patterns,
    spoil_a_feature,
)


def run(cases: int, seed: int = 0, start: int = 0) -> None:
    """Check ``cases`` cases from number ``start`` on; raise on the first fault."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.func transforms run masked_linear")
        warnings.filterwarnings("ignore", "Full backward hook is firing")
        run_cases(check, cases, seed, start)


def check(seed, number):
    """One MLP; what is asked of it is drawn, too."""
    case = Case(seed, number)
    what = _KINDS[int(np.searchsorted(_SHARES, case.draw.bits.random(), side="right"))]
    try:
        what(case)
    except Exception as error:
        told = f"{what.__name__}: {type(error).__name__}: {error}; {case}"
        raise AssertionError(told) from error


# --- Logits --------------------------------------------------------------------------------------


def check_logits(case):
    """Values and gradients, bits, and what NaN reaches."""
    net, draw = case.net, case.draw
    defined = case.define()
    cotangent = draw.normal(*case.shape, case.family.num_experts).to(case.dtype)
    cotangent = as_view(draw, cotangent)
    then = draw.pick((1, 2, 4)) if case.threads > 1 else None
    ours, grads = case.run(lambda: net(case.input), cotangent, then)
    plain, plain_grads = case.run(lambda: net.layers.layered(case.input), cotangent)
    flat = cotangent.double().reshape(defined.logits.shape)
    wanted = case.gradients(defined, flat, torch.zeros_like(flat))
    compare_values("logits", ours, plain, defined.logits.view(ours.shape), defined.off)
    compare_gradients(grads, plain_grads, wanted)
    for _ in range(case.repeats):
        again, grads_again = case.run(lambda: net(case.input), cotangent, then)
        same_twice((ours, *grads.values()), (again, *grads_again.values()))
    with torch.no_grad(), on_threads(case.threads):
        same_twice([net(case.input)], [ours])
    if case.x is not None and not case.tables:
        check_blind(case)


def check_blind(case):
    """NaN in a feature reaches the experts that see it, all of them, and no other."""
    plain = case.x.detach().clone()
    spoilt, sees = spoil_a_feature(case, plain)
    larger = (case.family.inclusion & sees).any(1)
    with torch.no_grad(), on_threads(case.threads):
        before, logits = case.net(plain), case.net(spoilt)
        clean, mixed = case.net.predict(plain), case.net.predict(spoilt)
    if not same_bits(logits[..., ~sees], before[..., ~sees]):
        raise AssertionError(f"NaN reaches experts that do not see it, those who do are {sees}")
    if not same_bits(mixed.selection[..., ~larger], clean.selection[..., ~larger]):
        raise AssertionError(f"NaN reaches the weight of who does not see it, {larger}")
    if not (logits[..., sees].isnan().all() and mixed.selection[..., larger].isnan().all()):
        raise AssertionError(f"NaN does not reach all who see it: {sees}, {logits}, {mixed}")


def check_predict(case):
    """Probability and attribution in one pass, as those of the logits."""
    options = {"confidence": case.draw.pick(CONFIDENCES), "sharpness": sharpness(case)}
    defined = case.define()
    with on_threads(case.threads):
        ours, again = (case.net.predict(case.input, **options) for _ in range(2))
    same_twice(ours, again)
    with torch.no_grad():
        plain = mk.mixture(case.net.layers.layered(case.input), case.family, **options)
    if options["confidence"] == "rare":
        defined.off = defined.off + reading_of_p(defined.logits)
    # exp(-2|z|) is rounded to a multiple of the least number; 1 - g is up to four times as much.
    alpha, by = moved(
        case, defined, lambda z: selection(z, case.family, **options), 1e-6, 4 * SMALLEST
    )
    if options["sharpness"] != 1:  # g^s is exp(s log g), whose exponent is rounded
        by = by + 2**-23 * torch.xlogy(alpha, alpha).abs()
    total = alpha.sum(-1, keepdim=True)
    # Shares of a sum that float32 hardly holds are shares of roundings.
    shares, share_off = moved(
        case, defined, lambda z: mk.mixture(z, case.family, **options).attribution, 1e-6, 0
    )
    share_off = share_off + case.family.num_experts * (by / total.clamp(min=1e-300)).sum(
        -1, keepdim=True
    )
    truth, off = moved(
        case, defined, lambda z: mk.mixture(z, case.family, **options).probability, 1e-6, 0
    )
    off = off + share_off.sum(-1)
    for name, a, b, t, floor in (
        ("selection", ours.selection, plain.selection, alpha, by),
        ("attribution", ours.attribution, plain.attribution, shares, share_off),
        ("probability", ours.probability, plain.probability, truth, off),
    ):
        hold(name, a, b, t.view(a.shape), limited(floor, t, torch.finfo(a.dtype)).view(a.shape))


def reading_of_p(z):
    """What float32's reading of p = sigmoid(2z) is worth in logits, for the confidence "rare".

    That is a function of p - 0.3, with the slope 4 g / (p - 0.3): whatever p is off by, however
    small its logit, is magnified. p is off by a rounding, eps / 2, of each of exp(-2|z|), 1 + it,
    their quotient and a product; as dp = 2 p (1 - p) dz, these 2 eps p are a move of the logit by
    eps / (1 - p). Where g > 0.5 it is 1 - p that is read, with as many roundings: eps / p.
    """
    p, rest = torch.sigmoid(2 * z), torch.sigmoid(-2 * z)
    read = torch.where(rare_positive()(z) < 0.5, rest, p)
    return 2**-23 / read


def moved(case, defined, function, relative, least):
    """``function`` of the true logits, and how far roundings of the logits may move it."""
    true = function(defined.logits)
    off = relative * true.abs() + least
    for signs in sign_patterns(case, defined.logits):
        off = torch.maximum(off, 2 * (function(defined.logits + signs * defined.off) - true).abs())
    return true, off.nan_to_num(1e300, 1e300)


# --- What else an MLP is asked ----------------------------------------------------------------

_HOOKS = {
    "forward": lambda m, f: m.register_forward_hook(lambda *args: f()),
    "forward, with kwargs": lambda m, f: m.register_forward_hook(
        lambda *args: f(), with_kwargs=True
    ),
    "forward, always": lambda m, f: m.register_forward_hook(lambda *args: f(), always_call=True),
    "forward pre": lambda m, f: m.register_forward_pre_hook(lambda *args: f()),
    "backward": lambda m, f: m.register_full_backward_hook(lambda *args: f()),
    "backward pre": lambda m, f: m.register_full_backward_pre_hook(lambda *args: f()),
    "method": lambda m, f: setattr(m, "forward", _calling(f, m.forward)),
    "subclass": lambda m, f: setattr(m, "__class__", _subclass(m, f)),
}


def _calling(f, method):
    def forward(*args, **kwargs):
        f()
        return method(*args, **kwargs)

    return forward


def _subclass(module, f):
    return type("Own", (type(module),), {"forward": _calling(f, type(module).forward)})


def check_hooks(case):
    """Whoever intercepts a layer is called, and changes no value."""
    draw, net = case.draw, case.net
    kind = draw.pick((*_HOOKS,))
    place = draw.upto(len(net.layers) - 1)
    for parameter in net.parameters():
        parameter.requires_grad_(True)
    loss = Loss(case)
    cotangent = draw.normal(*case.shape, case.family.num_experts).to(case.dtype)
    asked = draw.pick(("logits", "loss", "predict"))
    if asked == "predict" and "backward" in kind:
        asked = "loss"
    one = loss.cotangent(torch.float64 if case.dtype == torch.float64 else torch.float32)
    asks = {
        "predict": (
            lambda: mk.mixture(net.layers.layered(case.input).detach(), case.family).probability,
            lambda: net.predict(case.input).probability,
        ),
        "loss": (loss.two_steps, loss.ours),
        "logits": (lambda: net.layers.layered(case.input), lambda: net(case.input)),
    }

    def results(ask):
        if asked == "predict":
            with on_threads(case.threads):
                return [ask()]
        value, grads = case.run(ask, one if asked == "loss" else cotangent)
        return [value, *grads.values()]

    layer_by_layer, usual = asks[asked]
    before, calls = results(layer_by_layer), []
    _HOOKS[kind](net.layers[place], lambda: calls.append(1))
    after = results(usual)
    if not calls:
        raise AssertionError(f"a hook ({kind}) on layer {place} was not called by the {asked}")
    try:
        same_twice(before, after)
    except AssertionError:
        raise AssertionError(f"a hook ({kind}) on layer {place} changes the {asked}") from None


def check_state(case):
    """A state dict that went through a cast, numpy or the like is loaded with those numbers."""
    draw, net = case.draw, case.net
    other = copy.deepcopy(case.of.net).to(case.dtype)
    state = net.state_dict()
    casts = {
        "none": lambda t: t,
        "half": lambda t: t.half(),
        "double": lambda t: t.double(),
        "floating double": lambda t: t.double() if t.is_floating_point() else t,
        "numpy": lambda t: t if t.dtype == torch.bfloat16 else torch.from_numpy(t.numpy().copy()),
        "list": lambda t: torch.tensor(t.tolist(), dtype=t.dtype),
        "average": lambda t: (t + t) / 2,
    }
    kind = draw.pick((*casts,))
    sent = {name: casts[kind](tensor) for name, tensor in state.items()}
    try:
        other.load_state_dict(sent)
    except RuntimeError as error:
        if "_extra_state" in str(error) and kind in ("half", "double", "average"):
            return  # it says which key must be copied unchanged
        raise
    for (name, ours), theirs in zip(net.named_parameters(), other.parameters(), strict=True):
        if not same_bits(theirs, casts[kind](ours.detach()).to(case.dtype)):
            raise AssertionError(f"{name} is another after a state dict ({kind})")
    if kind != "half" and case.dtype != torch.float16:
        with torch.no_grad():
            for layer in other.layers:
                layer.backend = case.backend
            if kind == "none" or kind == "numpy":
                same_twice([net(case.input)], [other(case.input)])


def check_transform(case):
    """``torch.func.grad`` of the loss has the gradients of the loss."""
    if case.backend not in (None, "reference") or case.tables:
        return
    loss = Loss(case)
    net = case.net
    for parameter in net.parameters():
        parameter.requires_grad_(True)
    if not loss.two_steps().isfinite():
        return  # logits of 16 bits overflow, and a transform takes those
    state = {name: p.detach() for name, p in net.named_parameters()}

    def of(parameters):
        named = {f"net.{name}": parameter for name, parameter in parameters.items()}
        return torch.func.functional_call(_LossOf(net, loss), named, ())

    found = torch.func.grad(of)(state)
    plain = torch.autograd.grad(loss.two_steps(), [*net.parameters()], allow_unused=False)
    x = case.joined
    if loss.mask is not None:
        x = x.masked_fill(~loss.mask.view(-1, 1), 0)
    defined = case.define(x)
    scale = torch.finfo(case.dtype).eps / defined.eps
    # A transform has torch take 1 - sigmoid(-2z) for sigmoid(2z), and that cancels.
    loss.slope_off = torch.finfo(torch.promote_types(case.dtype, torch.float32)).eps
    _, _, grad, off = loss.definition(defined)
    wanted = case.gradients(defined, grad, off)
    wanted = {name: (value, 64 * scale * bound) for name, (value, bound) in wanted.items()}
    compare_gradients(found, dict(zip(state, plain, strict=True)), wanted)


class _LossOf(torch.nn.Module):
    def __init__(self, net, loss):
        super().__init__()
        self.net, self.loss = net, loss

    def forward(self):
        return self.loss.ours()


@lru_cache
def large(groups, width, hidden):
    family = mk.SubsetFamily.powerset({f"x{n}": width for n in range(groups)})
    return family, mk.InterpretableMLP(family, [hidden])


def check_large(case):
    """Power sets of hundreds to thousands of experts, in finer blocks than kernels may like."""
    draw = case.draw
    family, net = large(*draw.pick(((9, 1, 2), (10, 1, 1), (11, 2, 4))))
    for layer in net.layers:
        layer.reset_parameters()
    rows = draw.pick((1, 3, 9))
    x, target = draw.normal(rows, family.in_features).float(), draw.flags(rows).float()
    loss, logits = net.gem_loss(x, target), net.layers.layered(x)
    parameters = [*net.parameters()]
    grads = torch.autograd.grad(loss, parameters)
    plain = torch.autograd.grad(mk.gem_loss(logits, target, family), parameters)
    mixed = mk.mixture(logits.detach(), family)
    found = net(x).detach(), *net.predict(x), *grads
    for a, b in zip(found, (logits.detach(), *mixed, *plain), strict=True):
        if not (a - b).norm() <= 1e-4 * b.norm():
            raise AssertionError(f"{family}: off by {(a - b).norm():.3g} of {b.norm():.3g}")


_SHARE = {
    check_loss: 0.58,
    check_logits: 0.2,
    check_predict: 0.1,
    check_hooks: 0.06,
    check_state: 0.04,
    check_transform: 0.01,
    check_training: 0.009,
    check_large: 0.001,
}
_KINDS, _SHARES = [*_SHARE], np.cumsum([*_SHARE.values()])[:-1]
