"""The exact twin of a module whose gradients are routed."""

from __future__ import annotations

import copy
from typing import TypeVar

from torch import Tensor, nn

M = TypeVar("M", bound=nn.Module)


class Routed(nn.Module):
    """A module whose maps, or those of its parts, may stop a gradient."""

    def unrouted(self: M) -> M:
        """A twin with the same weights in which every block routes: its gradients are derivatives.

        A routed gradient trains each expert on its own features. It leaves out what the output owes
        to other experts' units, so it is not the derivative of the output, and what reads a
        gradient as one is wrong: integrated gradients do not add up to the change of the output
        (captum's convergence delta is as large as the effect), saliency and DeepLift miss features,
        an adversarial attack follows another function. Give these the twin.

        The twin shares the parameters and buffers themselves: it computes the same bits, sees every
        step of training, and takes no memory of its own. What it adds to ``.grad`` would train
        experts on each other's losses; so ask it by ``torch.autograd.grad``, or clear ``.grad``
        before the next step. Parameters that are replaced (``load_state_dict(assign=True)``,
        ``nn.utils.parametrize``) are no longer shared: make a new twin.

        Returns:
            A module of the same class; hooks and modes are copied as they are now.

        Example:
            >>> from captum.attr import IntegratedGradients
            >>> explain = IntegratedGradients(net.unrouted()).attribute
            >>> values, delta = explain(x, target=expert, return_convergence_delta=True)
        """
        return unrouted(self)

    def _unroute(self) -> None:
        """Route every block of this module's own layouts; its parts do so themselves."""


def unrouted(module: M) -> M:
    """:meth:`Routed.unrouted` of any module: of your own that has such layers inside, say."""
    tensors = [*module.parameters(), *module.buffers()]
    # A pruned weight is neither: an attribute with a graph, which cannot be copied.
    tensors += [
        t for part in module.modules() for t in vars(part).values() if isinstance(t, Tensor)
    ]
    shared = {id(tensor): tensor for tensor in tensors}
    twin = copy.deepcopy(module, shared)
    for part in twin.modules():
        if isinstance(part, Routed):
            part._unroute()
    return twin
