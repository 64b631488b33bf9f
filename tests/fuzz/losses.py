"""The loss of a drawn MLP, held to its definition, once and in every step of a training."""

import torch

import maskmoe_kernels as mk
from maskmoe_kernels.ops.selection import deselection, selection
from tests.fuzz.cases import as_view, on_threads
from tests.fuzz.compare import compare_gradients, hold, limited, must_raise, same_bits, same_twice
from tests.fuzz.definition import SMALLEST

CONFIDENCES = ("abs", "abs", "square", "smooth", "rare")
NORMALIZE = (None, "sample", "expert", "expert", "batch")
# Gradients wait to be divided by sums that are as large: kLeastSum of csrc/cpu/masked_mlp/gem.cpp.
MAY_WAIT = 2.0**-63
WEIGHTINGS = {
    "selection": selection,
    "deselection": deselection,
    "uniform": lambda z, family, **_: torch.ones_like(z),
}


def check_loss(case):
    """Loss and gradients, by the definition and as the loss of the logits."""
    loss = Loss(case)
    loss.check()
    if case.draw.chance(0.2):
        loss.check_second_asking()
    if case.draw.chance(0.2):
        loss.check_blindness()


class Loss:
    """Targets, mask and options of a case, and its checks.

    Attributes:
        slope_off: What sigmoid(2z) - y may be off by, beyond digits of its own.
    """

    slope_off = 0.0

    def __init__(self, case):
        self.case, draw = case, case.draw
        rows = case.shape
        target = torch.from_numpy(draw.bits.random(rows)) if draw.chance(0.3) else None
        target = draw.flags(rows).double() if target is None else target
        self.mask, self.factor = None, draw.pick((1.0, 1.0, 1.0, 65536.0, 1e-6, -2.5))
        if draw.chance(0.35):
            self.mask = draw.flags(rows, draw.pick((0.7, 0.1, -1.0)))
            self.spoil()
        self.times = None
        if draw.chance(0.3):
            times = draw.flags(rows, draw.pick((0.7, -1.0))).double() * (1 + draw.flags(rows))
            self.times = times * draw.pick((1.0, 3.7, 1e-20))
        dtypes = (torch.float32, torch.float32, torch.float64, torch.bfloat16, torch.bool)
        soft = not torch.equal(target, target.round())
        self.target = as_view(draw, target.to(draw.pick(dtypes[: 3 if soft else 5])))
        # What the losses see of it; a view may hold other values than were drawn.
        seen = torch.float64 if case.dtype == torch.float64 else torch.float32
        self.true_target = self.target.to(seen).double()
        self.options = {
            "confidence": draw.pick(CONFIDENCES),
            "weighting": draw.pick((*WEIGHTINGS,)),
            "normalize": draw.pick(NORMALIZE),
            "sharpness": sharpness(case),
            "mask": self.mask,
            "sample_weight": self.times,
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
        shown = {k: v for k, v in self.options.items() if k not in ("mask", "sample_weight")}
        counted = None if self.mask is None else int(self.mask.sum())
        weighed = None if self.times is None else self.times.sum()
        of = f"mask {counted}, weights {weighed}, target {self.target.dtype}"
        return f"{shown}, {of}, factor {self.factor}"

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
        for _ in range(case.repeats):
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
        defined.least = float(lost[2])
        off, grad_off = eps * true.abs() + lost[0], eps * grad.abs() + lost[1]
        for signs in sign_patterns(self.case, z):
            loss, other, _ = self._by_definition(z + signs * defined.off)
            off = torch.maximum(off, 2 * (loss - true).abs())
            grad_off = torch.maximum(grad_off, 2 * (other - grad).abs())
        return true, off, grad, grad_off

    def _by_definition(self, z):
        """Eq. 4 and 7: loss, gradient; what float32 loses of these and of products as too small."""
        y = self.true_target.reshape(-1, 1)
        counts = torch.ones(len(z), 1).double()
        if self.mask is not None:
            counts = self.mask.double().view(-1, 1)
            y = y.masked_fill(counts == 0, 0)
        options = {k: self.options[k] for k in ("confidence", "sharpness")}
        times = counts
        if self.times is not None:
            times = counts * self.times.view(-1, 1)
            counts = (times != 0).double()
            y = y.masked_fill(counts == 0, 0)
            times = times * counts.sum() / times.sum().clamp(min=1e-300)
        weight = counts * WEIGHTINGS[self.options["weighting"]](z, self.case.family, **options)
        lost = (SMALLEST * z.shape[-1] * counts).expand_as(weight)
        normalize = self.options["normalize"]
        least = torch.full((1, 1), SMALLEST).double()
        if normalize != "sample":  # else the sum over a sample is that of its weights alone
            weight, lost = weight * times, lost * times
        if normalize is not None:
            over = {"sample": (1,), "expert": (0,), "batch": (0, 1)}[normalize]
            total = weight.sum(over, keepdim=True)
            weight = weight / total.masked_fill(total == 0, 1)
            lost = (lost + weight * lost.sum(over, keepdim=True)) / total  # without any: infinite
            lost = lost.nan_to_num(torch.inf, torch.inf)
            if normalize != "sample":  # a product is rounded before it is divided by such a sum
                least = SMALLEST / total.clamp(min=MAY_WAIT, max=1)
        if normalize == "sample":
            weight, lost = weight * times, lost * times
        if normalize in (None, "sample"):
            count = counts.sum().clamp(min=1)
            weight, lost = weight / count, lost / count
        twice = 2 * z
        bce = twice.clamp(min=0) - twice * y + torch.log1p(torch.exp(-twice.abs()))
        # sigmoid(2z) - y, which does not cancel where it is small.
        slope = 2 * ((1 - y) * torch.sigmoid(twice) - y * torch.sigmoid(-twice))
        of_loss = (lost * (bce + SMALLEST) + least + SMALLEST * bce).sum()
        losses = of_loss, lost * slope.abs() + weight * self.slope_off + least, least.max()
        return (weight * bce).sum(), weight * slope, losses

    def check_blindness(self):
        """NaN in a row reaches the gradients of who sees it, those of no other expert."""
        case, normalize = self.case, self.options["normalize"]
        rows = self.true_target.numel()
        if case.tables or not (case.of.isolated and rows) or normalize in ("sample", "batch"):
            return
        plain = case.x.detach().clone().reshape(rows, -1)
        if self.mask is not None:
            plain = plain.masked_fill(~self.mask.view(-1, 1), 1.0)
        spoilt, sees = spoil_a_feature(case, plain, 0)
        found = []
        for x in (plain, spoilt):
            target = self.target.reshape(rows)
            mask, times = (
                None if of is None else of.reshape(rows) for of in (self.mask, self.times)
            )
            flat = {"mask": mask, "sample_weight": times}
            loss = case.net.gem_loss(x, target, **self.options | flat)
            wanted = [p for p in case.net.parameters() if p.requires_grad]
            if not wanted:
                return
            found.append(dict(zip(wanted, torch.autograd.grad(loss, wanted), strict=True)))
        arrives = all(of is None or bool(of.view(-1)[0]) for of in (self.mask, self.times))
        for layer in case.net.layers:
            experts = torch.arange(len(sees))
            sizes = torch.tensor(layer.layout.weight_offsets).diff()
            units = experts.repeat_interleave(torch.tensor(layer.layout.row_sizes))
            for of, owner in (
                (layer.weight, experts.repeat_interleave(sizes)),
                (layer.bias, units),
            ):
                if of is None or not of.requires_grad:
                    continue
                before, after = (grads[of] for grads in found)
                stays = ~sees[owner] if arrives else torch.ones_like(owner).bool()
                if not same_bits(before[stays], after[stays]):
                    raise AssertionError(
                        f"NaN in row 0 reaches who does not see it, {sees}: {self}"
                    )
                last = layer is case.net.layers[-1] and of is layer.bias
                if last and not after[~stays].isnan().all():
                    raise AssertionError(f"NaN does not reach all of {sees}: {self}")

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
    # Adam's own epsilon is 0 in float16, and what has no gradient would become 0 / 0.
    lr, eps = draw.pick((1e-3, 1e-2, 5e-2)), 1e-4 if case.dtype == torch.float16 else 1e-8
    optimizer = torch.optim.Adam(case.net.parameters(), lr=lr, eps=eps)
    for step in range(draw.upto(30, 10)):
        try:
            loss.check()
        except AssertionError as error:
            raise AssertionError(f"step {step}: {error}") from error
        optimizer.zero_grad()
        loss.ours().backward()
        optimizer.step()


def spoil_a_feature(case, plain, row=slice(None)):
    """``plain`` with NaN in one feature, and which experts see that."""
    feature = case.draw.upto(case.family.in_features - 1)
    spoilt = plain.clone()
    spoilt[row, ..., feature] = torch.nan
    return spoilt, case.family.visible_features()[:, feature]


def sign_patterns(case, like):
    random = case.draw.normal(*like.shape).sign()
    return random, -random, torch.ones_like(like)


def sharpness(case):
    return case.draw.pick((1.0, 1.0, 1.0, 0.7, 3.0, 10.0 ** float(case.draw.bits.uniform(-3, 3))))
