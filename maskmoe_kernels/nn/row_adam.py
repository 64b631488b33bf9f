"""Adam whose step costs as much as the rows that a batch reads, however large the tables are."""

from __future__ import annotations

import math
import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from maskmoe_kernels.errors import LayoutError
from maskmoe_kernels.layout.arguments import check_kind

# A row without a gradient still moves, by steps that shrink like (beta1 / sqrt(beta2))^k. Those
# that are smaller than this share of the rounding of the first one are left out.
_NEGLIGIBLE = 2.0**-4
# Rows that catch up together, which bounds the memory.
_ROWS = 1 << 14


class RowAdam(torch.optim.Adam):
    """``torch.optim.Adam`` with ``fused=True``, for models that may have sparse embeddings.

    Of an embedding, let r be an element, t a step and g its gradient. Adam is ::

        m_t = beta1 m_(t-1) + (1 - beta1) g_t        v_t = beta2 v_(t-1) + (1 - beta2) g_t^2
        r_t = r_(t-1) - lr m_t / (1 - beta1^t) / (sqrt(v_t / (1 - beta2^t)) + eps)

    and moves every row in every step, for m is seldom 0. Of a row that a batch does not read g is
    0, so what k such steps do is known beforehand: m and v shrink by beta1^k and beta2^k, and r
    moves by a sum that soon converges. So of an ``nn.Embedding`` with ``sparse=True`` each row does
    the steps that it missed when it is next looked up, and what a step touches does not depend on
    the number of rows. The results are those of Adam with dense gradients, to rounding.
    (``torch.optim.SparseAdam`` is another rule: rows that are not read stay where they are.)

    Between steps, the other rows of ``weight`` are behind. Call :meth:`settle` before they are read
    in another way than by a call of the embedding: to save them for use, say. To resume a run,
    weights and state are saved and loaded as they are, the weights first.

    Args:
        model: All of its parameters are trained.
        lr: Learning rate.
        betas: As of Adam, with beta1^2 < beta2.
        eps: As of Adam.

    Raises:
        LayoutError: ``betas`` are not such, or a sparse embedding is not float32 or float64.
    """

    def __init__(
        self,
        model: nn.Module,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
    ) -> None:
        check_kind(nn.Module, model=model)
        if not betas[0] ** 2 < betas[1]:
            raise LayoutError(f"betas must have beta1^2 < beta2, or rows never rest, got {betas}")
        super().__init__(model.parameters(), lr=lr, betas=betas, eps=eps, fused=True)
        self._rate = lr
        self._tables: list[nn.Parameter] = []
        for name, module in model.named_modules():
            if isinstance(module, nn.Embedding) and module.sparse:
                if module.weight.dtype not in (torch.float32, torch.float64):
                    raise LayoutError(
                        f"the sparse embedding {name} must be float32 or float64, in which its "
                        f"rows count their steps, got {module.weight.dtype}"
                    )
                if not any(module.weight is table for table in self._tables):
                    self._tables.append(module.get_parameter("weight"))
                module.register_forward_pre_hook(_LookUp(self))
        if self._tables:
            self._step_supports_amp_scaling = False  # GradScaler then divides beforehand

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """One step; see ``torch.optim.Adam.step``."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        rate = float(self.param_groups[0]["lr"])
        if rate != self._rate:
            self.settle()  # at the rate of the steps that were missed
            self._rate = rate
        gradients = [table.grad for table in self._tables]
        for table, gradient in zip(self._tables, gradients, strict=True):
            if gradient is not None:
                self._step_rows(table, gradient.coalesce())
                table.grad = None  # Adam takes no sparse gradients
        super().step()
        for table, gradient in zip(self._tables, gradients, strict=True):
            table.grad = gradient
        return loss

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load the state of a RowAdam, or Adam, of the same parameters, after their weights.

        An embedding may have been sparse or dense there.

        Raises:
            ValueError: It is of other parameters, or damaged.
        """
        super().load_state_dict(state_dict)
        self._rate = float(self.param_groups[0]["lr"])
        tables = {id(table) for table in self._tables}
        for weight, state in self.state.items():
            last, done = state["step"], state.get("row_step")
            if done is None and id(weight) in tables:
                state["row_step"] = weight.new_zeros(len(weight)) + last
            elif done is not None:
                whole = done.shape == weight.shape[:1] and (done == done.floor()).all()
                if not whole or not ((done >= 0) & (done <= last)).all():
                    raise ValueError(
                        f"expected {len(weight)} whole numbers from 0 to {float(last):g} in "
                        "row_step, the steps that each row has done"
                    )
                if id(weight) not in tables:
                    self._settle(weight)
                    del state["row_step"]

    @torch.no_grad()
    def settle(self) -> None:
        """Let all rows of all sparse embeddings do the steps that they missed."""
        for table in self._tables:
            if self.state.get(table):
                self._settle(table)

    def look_up(self, table: Tensor, rows: Tensor) -> None:
        """Let rows do the steps that they missed; those of other tables have none.

        Args:
            table: A parameter, ``(count, width)``.
            rows: Of any shape, int64 or int32; may repeat.
        """
        if self.state.get(table):
            self._catch_up(table, rows.unique())

    def _settle(self, table: Tensor) -> None:
        state = self.state[table]
        behind = (state["row_step"] < state["step"]) & state["exp_avg"].any(1)
        for rows in behind.nonzero().squeeze(1).split(_ROWS):
            self._catch_up(table, rows)

    @torch.no_grad()
    def _catch_up(self, table: Tensor, rows: Tensor) -> None:
        """Do the steps without a gradient that ``rows``, ``(n,)`` and each once, have missed."""
        state, group = self.state[table], self.param_groups[0]
        (beta1, beta2), kind = group["betas"], table.dtype
        last = state["row_step"][rows].double()
        missed = state["step"] - last
        m, v = state["exp_avg"][rows], state["exp_avg_sq"][rows]
        # Where m is 0, a row rests; only v shrinks.
        most = _steps(beta1, beta2, kind)
        longest = min(int((missed * m.any(1)).amax()), most) if len(rows) else 0
        k = torch.arange(1, longest + 1, dtype=torch.float64, device=table.device).unsqueeze(1)
        step = last + k  # (longest, n)
        rate = self._rate * beta1**k / (1 - beta1**step) * (k <= missed)
        root = beta2 ** (k / 2) / (1 - beta2**step).sqrt()
        row, deviation = table[rows], v.sqrt()
        # In this order, whatever rows catch up together: the processes of a run do not differ.
        for a, b in zip(rate.to(kind).unsqueeze(2), root.to(kind).unsqueeze(2), strict=True):
            row.addcdiv_(a * m, (b * deviation).add_(group["eps"]), value=-1)
        shrunk = torch.where(missed < most, beta1**missed, 0.0)  # what is left moves nothing
        table[rows] = row
        state["exp_avg"][rows] = m * shrunk.to(kind).unsqueeze(1)
        state["exp_avg_sq"][rows] = v * (beta2**missed).to(kind).unsqueeze(1)
        state["row_step"][rows] = state["step"].to(kind)

    def _step_rows(self, table: Tensor, gradient: Tensor) -> None:
        """A step of the rows that have a gradient; it is sparse and coalesced."""
        state, group = self.state[table], self.param_groups[0]
        if not state:
            state["step"] = torch.zeros((), device=table.device)
            state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(table), torch.zeros_like(table)
            state["row_step"] = table.new_zeros(len(table))
        rows, g = gradient.indices().squeeze(0), gradient.values()
        self._catch_up(table, rows)  # those that this process did not look up, but another did
        beta1, beta2 = group["betas"]
        state["step"] += 1
        step = state["step"].double()
        m = state["exp_avg"][rows].lerp(g, 1 - beta1)
        v = (state["exp_avg_sq"][rows] * beta2).addcmul(g, g, value=1 - beta2)
        root, rate = (1 - beta2**step).sqrt(), self._rate / (1 - beta1**step)
        deviation = v.sqrt() / root.to(v.dtype) + group["eps"]
        table[rows] -= rate.to(m.dtype) * m / deviation
        state["exp_avg"][rows], state["exp_avg_sq"][rows] = m, v
        state["row_step"][rows] = state["step"].to(table.dtype)


def _steps(beta1: float, beta2: float, kind: torch.dtype) -> int:
    """After how many steps without a gradient a row no longer moves."""
    share = torch.finfo(kind).eps * _NEGLIGIBLE
    return math.ceil(math.log(share) / math.log(beta1 / beta2**0.5)) if beta1 else 1


class _LookUp:
    """A forward pre-hook of an embedding: its optimizer brings the rows up to date.

    It does not keep the optimizer alive. A copy of the module that shares the weight shares the
    hook; a pickled module is loaded without an optimizer.
    """

    def __init__(self, optimizer: RowAdam | None = None) -> None:
        self._optimizer = (lambda: None) if optimizer is None else weakref.ref(optimizer)
        # Compiled graphs are cut here: what rows missed is no part of the model.
        self._run = self._look_up if optimizer is None else torch.compiler.disable(self._look_up)

    def __call__(self, module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        self._run(module.get_parameter("weight"), inputs[0])

    def _look_up(self, table: Tensor, rows: Tensor) -> None:
        optimizer = self._optimizer()
        if optimizer is not None:
            optimizer.look_up(table, rows)

    def __deepcopy__(self, memo: dict[int, Any]) -> _LookUp:
        return self

    def __reduce__(self) -> tuple[type[_LookUp], tuple[()]]:
        return _LookUp, ()
