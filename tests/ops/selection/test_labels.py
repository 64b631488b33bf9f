"""Labels that are no probabilities are refused, by every form of the loss."""

import pytest
import torch

import maskmoe_kernels as mk
from maskmoe_kernels.models import InterpretableNCF, NCFSizes

FAMILY = mk.SubsetFamily.powerset({"a": 2, "b": 3})
ROWS = 6


def of_logits(target, **options):
    return mk.gem_loss(torch.randn(ROWS, 3), target, FAMILY, **options)


def of_net(target, **options):
    return mk.InterpretableMLP(FAMILY, [4]).gem_loss(torch.randn(ROWS, 5), target, **options)


def of_layers(target, **options):
    net = mk.InterpretableMLP(FAMILY, [4], backend="torch")
    return net.gem_loss(torch.randn(ROWS, 5), target, **options)


def of_ncf(target, **options):
    model = InterpretableNCF(NCFSizes(4, 4, {"sex": (2, 2)}, 2, 2, 4), [4])
    ids = torch.zeros(ROWS, dtype=torch.int64)
    return model.gem_loss(ids, ids, ids[:, None], torch.randn(ROWS, 2), target, **options)


FORMS = [of_logits, of_net, of_layers, of_ncf]
REFUSED = {
    "class indices": (torch.arange(ROWS), r"from 0 to 5; for class indices, pass target == k"),
    "float classes": (torch.arange(ROWS).float(), r"from 0 to 5; for class indices"),
    "signs": (torch.tensor([-1, 1, 1, -1, 1, -1]), r"from -1 to 1; .* pass \(target \+ 1\) / 2"),
    "one sign": (torch.full((ROWS,), -1.0), r"from -1 to -1; .* pass \(target \+ 1\) / 2"),
    "percent": (torch.tensor([0.0, 50.5, 100, 0, 0, 0]), r"from 0 to 100\.?0?; scale them"),
    "a little more": (torch.tensor([0, 1, 1 + 1e-6, 0, 0, 0]), r"got values from 0 to 1"),
    "nan": (torch.tensor([0.0, 1, torch.nan, 0, 1, 0]), r"NaN out with mask"),
    "inf": (torch.tensor([0.0, 1, torch.inf, 0, 1, 0]), r"from 0 to inf"),
}  # fmt: skip


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", REFUSED)
def test_values_outside_are_refused(form, name):
    target, message = REFUSED[name]
    with pytest.raises(mk.LayoutError, match=r"labels in \[0, 1\].*" + message):
        form(target)
    # What is left out may hold anything, and only that.
    mask = (target >= 0) & (target <= 1)
    if mask.any():
        assert form(target, mask=mask).isfinite()
    if (~mask).sum() > 1:
        mask[(~mask).nonzero()[0]] = True
        with pytest.raises(mk.LayoutError, match=r"labels in \[0, 1\]"):
            form(target, mask=mask)


@pytest.mark.parametrize("form", FORMS)
def test_probabilities_and_every_dtype_pass(form):
    labels = torch.tensor([0, 1, 1, 0, 1, 0])
    for dtype in (
        torch.bool,
        torch.uint8,
        torch.int64,
        torch.float16,
        torch.bfloat16,
        torch.double,
    ):
        assert form(labels.to(dtype)) >= 0
    assert form(torch.linspace(0, 1, ROWS)) >= 0
    assert form(labels.float(), mask=torch.zeros(ROWS, dtype=torch.bool)) == 0


def test_no_sample_is_no_fault():
    net = mk.InterpretableMLP(FAMILY, [4])
    assert net.gem_loss(torch.randn(0, 5), torch.randn(0)) == 0


@pytest.mark.parametrize("masked", [False, True])
def test_a_compiled_loss_asserts(masked):
    torch._dynamo.reset()
    net = mk.InterpretableMLP(FAMILY, [4])
    x, labels, mask = torch.randn(ROWS, 5), torch.ones(ROWS), torch.arange(ROWS) > 0
    loss = torch.compile(
        lambda y: net.gem_loss(x, y, mask=mask if masked else None),
        fullgraph=True,
        backend="aot_eager",
    )
    torch.testing.assert_close(loss(labels), net.gem_loss(x, labels, mask=mask if masked else None))
    loss(labels).backward()
    labels[0] = 2
    if masked:
        loss(labels)
        labels[1] = torch.nan
    with pytest.raises(RuntimeError, match=r"labels in \[0, 1\]"):
        loss(labels)


def test_transforms_are_not_looked_into():
    losses = torch.vmap(lambda z, y: mk.gem_loss(z, y, FAMILY))(
        torch.randn(4, 2, 3), torch.ones(4, 2)
    )
    assert losses.shape == (4,)
