"""The interpretable multi-layer perceptron (section 3.4)."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from maskmoe_kernels._compat import parameters_of_any_size
from maskmoe_kernels.errors import LayoutError
from maskmoe_kernels.layout.arguments import block_sizes, check_kind
from maskmoe_kernels.layout.blocks import BlockLayout
from maskmoe_kernels.layout.subsets import SubsetFamily, Width
from maskmoe_kernels.nn.interception import interceptor_of_class, interceptor_of_instance
from maskmoe_kernels.nn.mlp import MaskedMLP
from maskmoe_kernels.nn.routed import Routed
from maskmoe_kernels.ops.masked_mlp.api import (
    masked_mlp_expert_loss,
    masked_mlp_gem,
    masked_mlp_mixture,
)
from maskmoe_kernels.ops.masked_mlp.call import Inputs, MLPCall
from maskmoe_kernels.ops.selection import torch_impl
from maskmoe_kernels.ops.selection.api import (
    Mixture,
    check_confidence,
    check_loss,
    check_target,
    check_values,
    gem_loss,
    mixture,
)
from maskmoe_kernels.ops.selection.confidence import Confidence
from maskmoe_kernels.ops.selection.labels import check_labels
from maskmoe_kernels.ops.selection.samples import check_samples, no_gradient, weighted


class InterpretableMLP(Routed):
    """All experts of a family as one masked MLP: expert i's logit is a function of S_i alone.

    With h_0 = x, and h_k^i the units of expert i in layer k (eq. 14)::

        h_1^i = act(b_1^i + sum over groups n in S_i of W_1^in x_n)
        h_k^i = act(b_k^i + sum over j with S_j a subset of S_i of W_k^ij h_(k-1)^j)
        z_i   = the same with one unit (or K, with ``outputs``) and without act, in the last layer

    The gradient of a hidden layer's input flows where i = j only. So expert i's loss moves expert
    i's parameters alone, although experts on supersets of S_i read its units.

    Args:
        family: The subsets; the input is its groups side by side.
        hidden: Units per expert of each hidden layer; each entry an int, or one per expert.
        activation: Of the hidden layers; see :func:`masked_linear`.
        outputs: K, the outputs of an expert: class logits, say, or regressands. ``None``: one, and
            no axis for it.
        input_layout: Layout of the first layer, if it is not ``family.input_layout(hidden[0])``:
            one that routes the gradient to the smallest subsets only, say.
        backend: See :func:`masked_linear`.
        device: Where to create the parameters.
        dtype: Floating-point type of the parameters.

    Raises:
        LayoutError: A width, ``outputs`` or an ``input_layout`` that does not fit the family, or an
            ``input_layout`` through which an expert sees a group outside its subset.

    Example:
        >>> family = SubsetFamily.powerset({"a": 2, "b": 3})
        >>> net = InterpretableMLP(family, hidden=[16, 16])
        >>> net(torch.randn(5, 5)).shape
        torch.Size([5, 3])
    """

    def __init__(
        self,
        family: SubsetFamily,
        hidden: Sequence[Width] = (16, 16),
        activation: str | None = "relu",
        *,
        outputs: int | None = None,
        input_layout: BlockLayout | None = None,
        backend: str | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.family = family
        if not isinstance(hidden, Iterable) or isinstance(hidden, str):
            raise LayoutError(
                f"hidden must be a sequence with one entry per hidden layer, got {hidden!r}; write "
                f"[{hidden!r}] for a single layer"
            )
        check_kind(SubsetFamily, family=family)
        if outputs is not None and (not isinstance(outputs, int) or outputs < 1):
            raise LayoutError(f"outputs must be None, or a number of at least 1, got {outputs!r}")
        self.outputs = outputs
        widths: list[Width] = [*hidden, outputs or 1]
        for k, width in enumerate(hidden):
            block_sizes(f"hidden[{k}]", width, family.num_experts)
        default = family.input_layout(widths[0])
        if input_layout is not None:
            check_kind(BlockLayout, input_layout=input_layout)
            _refuse_unfit(input_layout, default)
        layouts = [default if input_layout is None else input_layout]
        layouts += [family.hidden_layout(a, b) for a, b in itertools.pairwise(widths)]
        self.layers = MaskedMLP(layouts, activation, backend=backend, device=device, dtype=dtype)
        self._make_table(self.layers[0].weight.device)

    def forward(self, x: Tensor | Inputs) -> Tensor:
        """Input ``(*, family.in_features)`` to logits ``(*, H)``; with ``outputs`` ``(*, H, K)``.

        :class:`Inputs` are gathered on the way: rows of embedding tables beside dense columns.

        Raises:
            LayoutError: A shape, dtype or device that does not fit.
            BackendError: A named backend that cannot run; see :func:`masked_linear`.
        """
        logits: Tensor = self.layers(x)
        return logits if self.outputs is None else logits.unflatten(-1, (-1, self.outputs))

    def gem_loss(
        self,
        x: Tensor | Inputs,
        target: Tensor,
        confidence: Confidence = "abs",
        weighting: str = "selection",
        normalize: str | None = None,
        mask: Tensor | None = None,
        sharpness: float = 1.0,
        sample_weight: Tensor | None = None,
    ) -> Tensor:
        """``gem_loss(net(x), target, net.family, ...)``, in one pass where that is possible.

        In one pass, loss and gradients are computed together, a tile of rows at a time, and no
        activation is kept for ``backward``. A sample that ``mask`` leaves out reaches no gradient,
        whatever it holds, NaN included.

        A hook of this module or a ``forward`` of a subclass is called: the loss is then that of
        ``self(x)``. A module around this one is not called. So with DistributedDataParallel, take
        the loss of ``parallel(x)``. With FSDP2, call ``fully_shard(net)``, whose hooks are called;
        or shard a module around it, and register the method of that module that computes the loss.

        Args:
            x: As in ``forward``.
            target: y in {0, 1}, or its probability, ``(*,)``; with K ``outputs``, classes.
            confidence: See :func:`selection`.
            weighting: See :func:`maskmoe_kernels.gem_loss`, as for ``normalize``.
            normalize: What the weights are divided by.
            mask: ``(*,)`` bool, true where a sample counts.
            sharpness: See :func:`selection`.
            sample_weight: ``(*,)``, how often each sample counts; one of weight 0 reaches no
                gradient, either.

        Returns:
            Scalar, float32 (float64 for float64 parameters).

        Raises:
            LayoutError: As :func:`maskmoe_kernels.gem_loss`.
            BackendError: The parameters are sharded, and no module that gathers them was called.

        Example:
            >>> model = fully_shard(model)  # model.net is this module, model.loss its gem_loss
            >>> register_fsdp_forward_method(model, "loss")
            >>> model.loss(x, target).backward()
        """
        shape = _batch_shape(x)
        options = (confidence, weighting, normalize, mask, sharpness, sample_weight)
        check_loss(shape, x.device, target, *options, self.outputs)
        constant = no_gradient(target, sample_weight)
        by_name = isinstance(confidence, str) and self.outputs is None
        call = self._fused(x) if by_name and constant else None
        mask, sample_weight = weighted(mask, sample_weight)
        if call is None:
            return self._gem_loss_of_logits(x, target, mask, *options)
        names = str(confidence), sharpness, weighting, normalize
        return self._gem_loss_of_call(call, target, *names, mask, sample_weight)

    def expert_loss(
        self,
        x: Tensor | Inputs,
        target: Tensor,
        kind: str = "binary",
        sample_weight: Tensor | None = None,
        mask: Tensor | None = None,
    ) -> Tensor:
        """``expert_loss(net(x), target, kind, ...)``: every expert learns from every sample.

        In one pass where that is possible, as for :meth:`gem_loss`, whose remarks hold here, too.

        Args:
            x: As in ``forward``.
            target: See :func:`maskmoe_kernels.expert_loss`, as for the next.
            kind: ``"binary"`` (without ``outputs``), ``"multiclass"`` (with) or ``"regression"``.
            sample_weight: ``(*,)``, how often each sample counts.
            mask: ``(*,)`` bool, true where a sample counts.

        Returns:
            Scalar, float32 (float64 for float64 parameters).

        Raises:
            LayoutError: As :func:`maskmoe_kernels.expert_loss`.
        """
        if kind == "binary" and self.outputs is None:
            return self.gem_loss(
                x, target, weighting="uniform", mask=mask, sample_weight=sample_weight
            )
        shape = _batch_shape(x)
        check_target(shape, x.device, target, kind, self.outputs)
        check_samples(shape, x.device, mask, sample_weight)
        counts, weight = weighted(mask, sample_weight)
        check_values(target, counts, kind, self.outputs)
        constant = target.is_cpu and no_gradient(target, sample_weight)
        call = self._fused(x) if constant else None
        if call is not None:
            return masked_mlp_expert_loss(call, target, kind, self.outputs, counts, weight)
        x, target = _kept(x, target, counts)
        return torch_impl.expert_loss(self(x), target, kind, self.outputs, counts, weight)

    def _gem_loss_of_call(self, call: MLPCall, target: Tensor, *options: Any) -> Tensor:
        mask = options[-2]
        if not target.is_cpu:
            check_labels(target, mask)
        is_proper_subset = self._is_proper_subset(call.weights[0].device)
        try:
            return masked_mlp_gem(call, target, is_proper_subset, *options)
        except RuntimeError:
            check_labels(target, mask)  # the op refuses bad labels; this error says what to do
            raise

    def _gem_loss_of_logits(
        self, x: Tensor | Inputs, target: Tensor, counts: Tensor | None, *options: Any
    ) -> Tensor:
        x, target = _kept(x, target, counts)
        return gem_loss(self(x), target, self.family, *options, outputs=self.outputs)

    @torch.no_grad()
    def predict(
        self,
        x: Tensor | Inputs,
        confidence: Confidence = "abs",
        sharpness: float = 1.0,
        missing: str = "propagate",
    ) -> Mixture:
        """Probability ``(*,)`` and attribution ``(*, H)`` (eq. 1); no gradient is recorded.

        With K ``outputs``, probabilities ``(*, K)`` of classes.

        With ``missing="skip"``, experts that see a group that is missing in a row (NaN) are left
        out of the mixture of that row; see :func:`mixture`.

        Raises:
            LayoutError: As :func:`mixture`.
        """
        by_name = isinstance(confidence, str) and self.outputs is None
        call = self._fused(x) if by_name and missing == "propagate" else None
        if call is None:
            options = (confidence, sharpness, missing)
            return mixture(self(x), self.family, *options, outputs=self.outputs)
        check_confidence(confidence, sharpness)
        is_proper_subset = self._is_proper_subset(call.weights[0].device)
        return Mixture(*masked_mlp_mixture(call, is_proper_subset, str(confidence), sharpness))

    def _fused(self, x: Tensor | Inputs) -> MLPCall | None:
        """A call of one op that stands for this module's; None if the modules are to be called."""
        layers = self.layers
        if (
            interceptor_of_class(type(self), _FORWARD)
            or interceptor_of_class(type(layers), _LAYERS_FORWARD)
            or interceptor_of_instance(self)
            or interceptor_of_instance(layers)
        ):
            return None
        return layers.fused(x)  # which looks for global hooks

    def _is_proper_subset(self, device: torch.device) -> Tensor:
        """``family.strict`` on ``device``."""
        if torch.compiler.is_dynamo_compiling():
            with parameters_of_any_size():
                size = self._subset_table.shape  # it is read here
            del size
        table = self._subset_table
        return table if table.device == device else self._make_table(device)

    def _make_table(self, device: torch.device) -> Tensor:
        # A compiled call reads this attribute instead of the family: torch.compile guards on the
        # value of a family, but not on that of a tensor, so one graph serves all families.
        self._subset_table = self.family.table("is_proper_subset", device)
        return self._subset_table

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> InterpretableMLP:
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]  # .to(), to_empty()
        self._make_table(next(self.parameters(), self._subset_table).device)
        return self


_FORWARD, _LAYERS_FORWARD = InterpretableMLP.forward, MaskedMLP.forward


def _batch_shape(x: Tensor | Inputs) -> torch.Size:
    if isinstance(x, Inputs):
        return x.shape
    check_kind(Tensor, x=x)
    return x.shape[:-1]


def _kept(
    x: Tensor | Inputs, target: Tensor, counts: Tensor | None
) -> tuple[Tensor | Inputs, Tensor]:
    """Inputs and targets, 0 where a sample does not count."""
    if counts is None:
        return x, target
    joined = x.joined() if isinstance(x, Inputs) else x
    out = ~counts
    of_target = out.unsqueeze(-1) if target.dim() > out.dim() else out
    return joined.masked_fill(out.unsqueeze(-1), 0), target.masked_fill(of_target, 0)


def _refuse_unfit(given: BlockLayout, default: BlockLayout) -> None:
    shape = (default.out_features, default.in_features)
    if (given.out_features, given.in_features) != shape:
        raise LayoutError(
            f"input_layout must be (units of the first layer, input features) = {shape}, got "
            f"{(given.out_features, given.in_features)}"
        )
    beyond = (given.mask() & ~default.mask()).nonzero()
    if beyond.numel():
        raise LayoutError(
            f"input_layout lets {len(beyond)} weights see features outside their expert's subset, "
            f"the first at (unit, feature) {tuple(beyond[0].tolist())}; take away from "
            "family.input_layout(hidden[0]), add nothing to it"
        )
