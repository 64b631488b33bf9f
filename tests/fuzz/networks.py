"""Random networks: logits, mixtures and losses as one op, layer by layer and by their definition.

Also hooks, checkpoints, transforms, refusals, large families, and training runs. As for layers,
networks come from a pool that the seed draws: cases share its layouts and what is kept for them.
"""

import copy
import warnings
from functools import lru_cache

import numpy as np
import torch

import maskmoe_kernels as mk
from maskmoe_kernels.backends import native
from maskmoe_kernels.objectives.selection import deselection, selection
from tests.fuzz.cases import as_view, hold, on_threads, run_cases, same_bits
from tests.fuzz.definition import SMALLEST
from tests.fuzz.drawn_networks import Case

CONFIDENCES = ("abs", "abs", "square", "smooth", "rare")
NORMALIZE = (None, "sample", "expert", "expert", "batch")
WEIGHTINGS = {"selection": selection, "deselection": deselection}


def run(cases: int, seed: int = 0, start: int = 0) -> None:
    """Check ``cases`` cases from number ``start`` on; raise on the first fault."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.func transforms run masked_linear")
        run_cases(check, cases, seed, start)


def check(seed, number):
    """One network; what is asked of it is drawn, too."""
    case = Case(seed, number)
    what = _KINDS[int(np.searchsorted(_SHARES, case.draw.bits.random(), side="right"))]
    try:
        what(case)
    except Exception as error:
        raise AssertionError(
            f"{what.__name__}: {type(error).__name__}: {error}; {case}"
        ) from error


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
    again, grads_again = case.run(lambda: net(case.input), cotangent, then)
    same_twice((ours, *grads.values()), (again, *grads_again.values()))
    with torch.no_grad(), on_threads(case.threads):
        same_twice([net(case.input)], [ours])
    if case.x is not None and not case.tables:
        check_blind(case, ours)


def compare_values(name, ours, plain, true, off):
    info = torch.finfo(ours.dtype)
    floor = off.view(true.shape) + 4 * info.eps * true.abs() + 4 * info.smallest_normal * info.eps
    hold(name, ours, plain, true, limited(floor, true, info))


def compare_gradients(ours, plain, wanted, factor=1.0):
    """``factor``: of the loss; gradients may be made without it, in float32 at least."""
    for name, grad in ours.items():
        true, bound = factor * wanted[name][0], abs(factor) * wanted[name][1]
        info = torch.finfo(grad.dtype)
        least = info.smallest_normal * info.eps + abs(factor) * SMALLEST
        floor = bound + 4 * info.eps * true.abs() + 4 * least
        hold(f"gradient of {name}", grad, plain[name], true, limited(floor, true, info))


def limited(floor, true, info):
    """No NaN is within a floor; what is nearly too large for the type may be infinite."""
    floor = floor.nan_to_num(1e300, 1e300).clamp(max=1e300)
    return floor.masked_fill(true.abs() + floor > info.max / 4, torch.inf)


def same_twice(first, second):
    for k, (a, b) in enumerate(zip(first, second, strict=True)):
        if not same_bits(a, b):
            raise AssertionError(f"not the same bits twice, result {k}")


def check_blind(case, clean):
    """NaN in a feature reaches the experts that see it, all of them, and no other."""
    feature = case.draw.upto(case.family.in_features - 1)
    spoilt = case.x.detach().clone()
    spoilt[..., feature] = torch.nan
    with torch.no_grad(), on_threads(case.threads):
        plain = case.net(case.x.detach().clone())
        logits = case.net(spoilt)
    sees = case.family.visible_features()[:, feature]
    first = case.of.dense[0]
    # An input layout may leave out what an expert may see.
    if not same_bits(logits[..., ~sees], plain[..., ~sees]):
        raise AssertionError(f"NaN in feature {feature} reaches an expert that does not see it")
    if not logits[..., sees].isnan().all():
        raise AssertionError(f"NaN in feature {feature} does not reach {first.shape}")


def check_predict(case):
    """Probability and attribution in one pass, as those of the logits."""
    options = {"confidence": case.draw.pick(CONFIDENCES), "sharpness": sharpness(case)}
    defined = case.define()
    with on_threads(case.threads):
        ours, again = (case.net.predict(case.input, **options) for _ in range(2))
    same_twice(ours, again)
    with torch.no_grad():
        plain = mk.mixture(case.net.layers.layered(case.input), case.family, **options)
    alpha, by = moved(
        case, defined, lambda z: selection(z, case.family, **options), 1e-6, SMALLEST
    )
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


def moved(case, defined, function, relative, least):
    """``function`` of the true logits, and how far roundings of the logits may move it."""
    true = function(defined.logits)
    off = relative * true.abs() + least
    for signs in sign_patterns(case, defined.logits):
        off = torch.maximum(off, 2 * (function(defined.logits + signs * defined.off) - true).abs())
    return true, off.nan_to_num(1e300, 1e300)


def sign_patterns(case, like):
    random = case.draw.normal(*like.shape).sign()
    return random, -random, torch.ones_like(like)


def sharpness(case):
    return case.draw.pick((1.0, 1.0, 1.0, 0.7, 3.0, 10.0 ** float(case.draw.bits.uniform(-3, 3))))


# --- The loss ------------------------------------------------------------------------------------


def check_loss(case):
    """Loss and gradients, by the definition and as the loss of the logits."""
    loss = Loss(case)
    loss.check()
    if case.draw.chance(0.2):
        loss.check_second_asking()


class Loss:
    """Targets, mask and options of a case, and its checks."""

    def __init__(self, case):
        self.case, draw = case, case.draw
        rows = case.shape
        target = torch.from_numpy(draw.bits.random(rows)) if draw.chance(0.3) else None
        target = draw.flags(rows).double() if target is None else target
        self.mask, self.factor = None, draw.pick((1.0, 1.0, 1.0, 65536.0, 1e-6, -2.5))
        if draw.chance(0.35):
            self.mask = draw.flags(rows, draw.pick((0.7, 0.1, -1.0)))
            self.spoil()
        self.true_target = target.clone()
        dtypes = (torch.float32, torch.float32, torch.float64, torch.bfloat16, torch.bool)
        soft = not torch.equal(target, target.round())
        self.target = as_view(draw, target.to(draw.pick(dtypes[: 3 if soft else 5])))
        if soft:  # what the losses are given, which may be rounded
            self.true_target = self.target.float().double()
        self.options = {
            "confidence": draw.pick(CONFIDENCES),
            "weighting": draw.pick((*WEIGHTINGS,)),
            "normalize": draw.pick(NORMALIZE),
            "sharpness": sharpness(case),
            "mask": self.mask,
        }

    def spoil(self):
        """What a mask leaves out may be anything."""
        case = self.case
        if case.x is not None and case.draw.chance(0.5):
            with torch.no_grad():
                clean = case.x.masked_fill(~self.mask.unsqueeze(-1), torch.nan)
            needed = case.x.requires_grad
            case.leaves = [(n, t) for n, t in case.leaves if n != "x"]
            case.x = clean.detach().requires_grad_(needed)
            case.leaves.insert(0, ("x", case.x))

    def __str__(self):
        shown = {k: v for k, v in self.options.items() if k != "mask"}
        counted = None if self.mask is None else int(self.mask.sum())
        return f"{shown}, mask {counted}, factor {self.factor}, target {self.target.dtype}"

    def ours(self):
        return self.case.net.gem_loss(self.case.input, self.target, **self.options)

    def two_steps(self):
        """The loss of logits that come layer by layer, on the batch that counts."""
        case, mask, target = self.case, self.mask, self.target
        given = case.input
        if mask is not None:
            given = given.joined() if case.tables else given
            given = given.masked_fill(~mask.unsqueeze(-1), 0)
        logits = case.net.layers.layered(given)
        return mk.gem_loss(logits, target, case.family, **self.options)

    def cotangent(self, loss_dtype=torch.float32):
        return torch.tensor(self.factor, dtype=loss_dtype)

    def check(self):
        try:
            self._check()
        except AssertionError as error:
            raise AssertionError(f"{error}: {self}") from error

    def _check(self):
        case = self.case
        wide = torch.float64 if case.dtype == torch.float64 else torch.float32
        cotangent = self.cotangent(wide)
        ours, grads = case.run(self.ours, cotangent)
        plain, plain_grads = case.run(self.two_steps, cotangent)
        again, grads_again = case.run(self.ours, cotangent)
        same_twice((ours, *grads.values()), (again, *grads_again.values()))
        with torch.no_grad(), on_threads(case.threads):
            same_twice([self.ours()], [ours])
        x = case.joined
        if self.mask is not None:
            x = x.masked_fill(~self.mask.view(-1, 1), 0)
        defined = case.define(x)
        true, off, grad, grad_off = self.definition(defined)
        hold("loss", ours, plain, true, limited(off, true, torch.finfo(ours.dtype)))
        wanted = case.gradients(defined, grad, grad_off)
        compare_gradients(grads, plain_grads, wanted, self.factor)

    def definition(self, defined):
        """Loss and gradient to the logits in float64, each with what rounding may do to it."""
        z, eps = defined.logits, 64 * defined.eps
        true, grad, lost = self._by_definition(z)
        off, grad_off = eps * true.abs() + lost[0], eps * grad.abs() + lost[1]
        for signs in sign_patterns(self.case, z):
            loss, other, _ = self._by_definition(z + signs * defined.off)
            off = torch.maximum(off, 2 * (loss - true).abs())
            grad_off = torch.maximum(grad_off, 2 * (other - grad).abs())
        return true, off, grad, grad_off

    def _by_definition(self, z):
        """Eq. 4 and 7: loss, gradient, and how much of both float32 may lose as too small."""
        y = self.true_target.reshape(-1, 1)
        counts = torch.ones(len(z), 1).double()
        if self.mask is not None:
            counts = self.mask.double().view(-1, 1)
            y = y.masked_fill(counts == 0, 0)
        options = {k: self.options[k] for k in ("confidence", "sharpness")}
        weight = counts * WEIGHTINGS[self.options["weighting"]](z, self.case.family, **options)
        lost = (SMALLEST * z.shape[-1] * counts).expand_as(weight)
        normalize = self.options["normalize"]
        if normalize is not None:
            over = {"sample": (1,), "expert": (0,), "batch": (0, 1)}[normalize]
            total = weight.sum(over, keepdim=True)
            weight = weight / total.masked_fill(total == 0, 1)
            lost = (lost + weight * lost.sum(over, keepdim=True)) / total  # without any: infinite
            lost = lost.nan_to_num(torch.inf, torch.inf)
        if normalize in (None, "sample"):
            count = counts.sum().clamp(min=1)
            weight, lost = weight / count, lost / count
        twice = 2 * z
        bce = twice.clamp(min=0) - twice * y + torch.log1p(torch.exp(-twice.abs()))
        # sigmoid(2z) - y, which does not cancel where it is small.
        slope = 2 * ((1 - y) * torch.sigmoid(twice) - y * torch.sigmoid(-twice))
        least = SMALLEST * (1 + bce).sum(), SMALLEST
        losses = (lost * (bce + SMALLEST)).sum() + least[0], lost * slope.abs() + least[1]
        return (weight * bce).sum(), weight * slope, losses

    def check_second_asking(self):
        """Gradients once more where the graph is kept, an error where not; none of second order."""
        wanted = [tensor for _, tensor in self.case.wanted]
        if not wanted:
            return
        loss = self.ours()
        first = torch.autograd.grad(loss, wanted, retain_graph=True)
        same_twice(first, torch.autograd.grad(loss, wanted))
        must_raise(RuntimeError, lambda: torch.autograd.grad(loss, wanted))
        if self.case.one_op:
            loss = self.ours()
            grads = torch.autograd.grad(loss, wanted, create_graph=True)
            total = sum((grad**2).sum() for grad in grads)
            must_raise(mk.BackendError, total.backward)


def must_raise(kind, function):
    try:
        function()
    except kind:
        return
    raise AssertionError(f"no {kind.__name__} was raised")


def check_training(case):
    """Some steps of Adam on separable data: every step is held to the definition."""
    draw, family = case.draw, case.family
    rows = draw.pick((16, 60))
    case.shape, case.tables, case.ids, case.order = (rows,), [], [], [-family.in_features]
    target = draw.flags(rows).double()
    x = draw.normal(rows, family.in_features) + draw.pick((0.5, 4.0)) * (2 * target - 1)[:, None]
    case.x = x.to(case.dtype)
    case.leaves = [("x", case.x), *case.net.named_parameters()]
    case.__dict__.pop("joined", None)
    for layer in case.net.layers:
        layer.reset_parameters()
        layer.requires_grad_(True)
    loss = Loss(case)
    loss.mask = loss.options["mask"] = None
    case.x = x.to(case.dtype)
    loss.target, loss.true_target, loss.factor = target.float(), target, 1.0
    optimizer = torch.optim.Adam(case.net.parameters(), lr=draw.pick((1e-3, 1e-2, 5e-2)))
    for step in range(draw.upto(30, 10)):
        try:
            loss.check()
        except AssertionError as error:
            raise AssertionError(f"step {step}: {error}") from error
        optimizer.zero_grad()
        loss.ours().backward()
        optimizer.step()


# --- What else a network is asked ----------------------------------------------------------------

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
    return type("Own", (type(module),), {"forward": lambda m, x: (f(), super(type(m), m).forward(x))[1]})


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

    def ask():
        if asked == "predict":
            return [net.predict(case.input)[0].detach()]
        if asked == "loss":
            value, grads = case.run(loss.ours, one)
        else:
            value, grads = case.run(lambda: net(case.input), cotangent)
        return [value, *grads.values()]

    before, calls = ask(), []
    _HOOKS[kind](net.layers[place], lambda: calls.append(1))
    after = ask()
    if not calls:
        raise AssertionError(f"a hook ({kind}) on layer {place} was not called by the {asked}")
    for a, b in zip(before, after, strict=True):
        if a.shape != b.shape or a.dtype != b.dtype:
            raise AssertionError(f"with a hook ({kind}), {a.dtype} {a.shape} is {b.dtype} {b.shape}")
    if case.of.isolated and asked == "logits":
        defined = case.define()
        compare_values("hooked logits", after[0], after[0], defined.logits.view(after[0].shape), (
            64 * defined.off * (torch.finfo(case.dtype).eps / defined.eps)
        ))  # fmt: skip


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
        "list": lambda t: t if t.dtype == torch.bfloat16 else torch.tensor(t.tolist(), dtype=t.dtype),
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
    state = {name: p.detach() for name, p in net.named_parameters()}

    def of(parameters):
        return torch.func.functional_call(_LossOf(net, loss), {f"net.{n}": p for n, p in parameters.items()}, ())

    found = torch.func.grad(of)(state)
    plain = torch.autograd.grad(loss.two_steps(), [*net.parameters()], allow_unused=False)
    x = case.joined
    if loss.mask is not None:
        x = x.masked_fill(~loss.mask.view(-1, 1), 0)
    defined = case.define(x)
    scale = torch.finfo(case.dtype).eps / defined.eps
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
    pairs = zip((net(x).detach(), *net.predict(x), *grads), (logits.detach(), *mixed, *plain), strict=True)
    for a, b in pairs:
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
