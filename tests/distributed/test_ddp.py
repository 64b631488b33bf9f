"""DistributedDataParallel: two processes get the gradients that one gets of the whole batch."""

import copy
from contextlib import nullcontext

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

import maskmoe_kernels as mk
from tests.distributed.cases import FAMILY, Loss, assert_same, case, gradients, mine, ncf_case
from tests.distributed.processes import in_processes

OPTIONS = (
    {},
    {"static_graph": True},
    {"find_unused_parameters": True},
    {"gradient_as_bucket_view": True, "static_graph": True},
)


def one_pass():
    net, x, y = case()
    assert net.layers.unsupported_reason() is None
    for weighting in ("selection", "deselection"):
        alone = copy.deepcopy(net)
        loss = alone.gem_loss(x, y, weighting=weighting)
        loss.backward()
        for options in OPTIONS:
            of = copy.deepcopy(net)
            parallel = DistributedDataParallel(Loss(of), **options)
            for step in range(3):  # a static graph is learned in the first
                parallel.zero_grad()
                ours = parallel(mine(x), mine(y), weighting=weighting)
                ours.backward()
                dist.all_reduce(ours.detach())
                torch.testing.assert_close(ours / 2, loss)
                assert_same(gradients(of), gradients(alone), f"{options}, step {step}")


def test_the_one_pass_loss(tmp_path):
    in_processes(2, tmp_path, one_pass)


def accumulated():
    net, x, y = case()
    alone = copy.deepcopy(net)
    alone.gem_loss(x, y).backward()
    for options in OPTIONS:
        if "static_graph" in options:
            continue  # torch's own fault with no_sync: pytorch/pytorch#143580
        of = copy.deepcopy(net)
        parallel = DistributedDataParallel(Loss(of), **options)
        for step in range(2):
            parallel.zero_grad()
            parts = list(zip(mine(x).chunk(3), mine(y).chunk(3), strict=True))
            for k, part in enumerate(parts):
                with nullcontext() if k == len(parts) - 1 else parallel.no_sync():
                    (parallel(*part) / len(parts)).backward()
            assert_same(gradients(of), gradients(alone), f"{options}, step {step}")


def test_gradients_accumulated_without_synchronisation(tmp_path):
    in_processes(2, tmp_path, accumulated)


def some_experts():
    """The loss is of one expert's logit; or one process has no sample that counts."""
    net, x, y = case()
    one = FAMILY.names.index("a+b")
    alone = copy.deepcopy(net)
    alone(x)[:, one].square().mean().backward()
    for options in OPTIONS:
        of = copy.deepcopy(net)
        parallel = DistributedDataParallel(of, **options)
        for step in range(2):
            parallel.zero_grad()
            parallel(mine(x))[:, one].square().mean().backward()
            assert_same(gradients(of), gradients(alone), f"{options}, step {step}")

    first = dist.get_rank() == 0
    alone = copy.deepcopy(net)
    (alone.gem_loss(x[:6], y[:6]) / 2).backward()
    counts = torch.full((6,), first)
    x = x.masked_fill(~torch.arange(12)[:, None].lt(6), torch.nan)
    for options in OPTIONS:
        for left_out in ("masked", "no rows"):
            of = copy.deepcopy(net)
            parallel = DistributedDataParallel(Loss(of), **options)
            for step in range(2):
                parallel.zero_grad()
                if left_out == "masked":
                    loss = parallel(mine(x), mine(y), mask=counts)
                else:
                    rows = slice(0, 6 if first else 0)
                    loss = parallel(x[rows], y[rows])
                loss.backward()
                assert_same(gradients(of), gradients(alone), f"{options}, {left_out}, {step}")


def test_experts_without_a_gradient_and_processes_without_a_sample(tmp_path):
    in_processes(2, tmp_path, some_experts)


def frozen():
    net, x, y = case()
    net.layers[0].requires_grad_(False)
    alone = copy.deepcopy(net)
    alone.gem_loss(x, y).backward()
    parallel = DistributedDataParallel(Loss(net), static_graph=True)
    for _ in range(2):
        parallel.zero_grad()
        parallel(mine(x), mine(y)).backward()
        assert_same(gradients(net)[2:], gradients(alone)[2:])
        assert gradients(net)[:2] == [None, None]


def test_a_frozen_layer(tmp_path):
    in_processes(2, tmp_path, frozen)


class NCFLoss(torch.nn.Module):
    def __init__(self, net):
        super().__init__()
        self.net = net

    def forward(self, *args):
        return self.net.gem_loss(*args)


def embeddings():
    net, batch = ncf_case()
    alone = copy.deepcopy(net)
    alone.gem_loss(*batch).backward()
    for options in OPTIONS:
        of = copy.deepcopy(net)
        parallel = DistributedDataParallel(NCFLoss(of), **options)
        for step in range(2):
            parallel.zero_grad()
            parallel(*map(mine, batch)).backward()
            assert_same(gradients(of), gradients(alone), f"{options}, step {step}")


def test_rows_of_embeddings(tmp_path):
    in_processes(2, tmp_path, embeddings)


def logits():
    net, x, y = case()
    alone = copy.deepcopy(net)
    mk.gem_loss(alone(x), y, FAMILY).backward()
    parallel = DistributedDataParallel(net, static_graph=True)
    for _ in range(2):
        parallel.zero_grad()
        mk.gem_loss(parallel(mine(x)), mine(y), FAMILY).backward()
        assert_same(gradients(net), gradients(alone))


def test_a_loss_of_logits(tmp_path):
    in_processes(2, tmp_path, logits)
