"""DOT, the Distillation-Oriented Trainer (Zhao et al., ICCV 2023, arXiv 2307.08436): SGD with two momentum buffers."""

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor


class DOT(torch.optim.Optimizer):
    """SGD whose momentum is lower for the task's gradient and higher for the distillation terms'.

    v_task <- (mu - D) v_task + g_task + wd theta,   v_kd <- (mu + D) v_kd + g_kd,   theta <- theta - lr (v_task + v_kd)

    Buffers start at the first gradients. A parameter that only one of the two reaches has plain momentum mu and weight
    decay once; the other buffer, if there is one from earlier steps, rests.

    A constant gradient is multiplied by 1 / (1 - mu + D) = 5.714 on the task's side and by 1 / (1 - mu - D) = 40 on the
    other with mu = 0.9 and D = 0.075: DOT multiplies the weight of distillation by 7 relative to the task. Compare it
    with plain SGD and a weight seven times as high before crediting the two momenta.

    Before each step the task's gradient goes into ``.grad`` and the distillation's through :meth:`hand_over`; clip both
    by one factor. Defined for SGD and one group of parameters only; there is no published form for Adam.

    Args:
        params: the parameters, as one group.
        lr: learning rate.
        momentum: mu.
        delta: D; 0.075 on CIFAR-100 and Tiny-ImageNet, 0.09 on ImageNet in the paper. 0 is SGD with momentum mu.
        weight_decay: wd, added to the gradient.

    Raises:
        ValueError: a momentum outside [0, 1), or a negative rate or decay.
        NotImplementedError: more than one group of parameters.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float,
        momentum: float = 0.9,
        delta: float = 0.075,
        weight_decay: float = 0.0,
    ):
        if not 0.0 <= delta <= momentum < 1.0 - delta:
            raise ValueError(
                f"delta ({delta}) must leave both momenta, {momentum} - delta and {momentum} + delta, in [0, 1)"
            )
        for name, value in {"lr": lr, "weight_decay": weight_decay}.items():
            if not value >= 0.0:
                raise ValueError(f"{name} must be at least 0, not {value}")
        # Filled in place: the engine's wrapper reaches this list, while an attribute set on it would stay there.
        self._kd_gradients: list[Tensor | None] = []
        super().__init__(params, {"lr": lr, "momentum": momentum, "delta": delta, "weight_decay": weight_decay})

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        if self.param_groups:
            raise NotImplementedError("DOT is defined for one group of parameters: put all of them into one")
        super().add_param_group(param_group)

    def hand_over(self, kd_gradients: Sequence[Tensor | None]) -> None:
        """Give the next step its distillation gradients, one per parameter in the group's order; None: not reached."""
        (group,) = self.param_groups
        if len(kd_gradients) != len(group["params"]):
            raise ValueError(f"DOT has {len(group['params'])} parameters, but {len(kd_gradients)} gradients came")
        self._kd_gradients[:] = kd_gradients

    def handed_over(self) -> list[Tensor]:
        """The distillation gradients that wait for the next step, to be clipped in place."""
        return [gradient for gradient in self._kd_gradients if gradient is not None]

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> None:
        """One update from ``.grad`` and the gradients handed over, which are used once.

        Raises:
            RuntimeError: nothing was handed over since the last step.
            NotImplementedError: a closure, which gives one gradient where two are needed.
        """
        if closure is not None:
            raise NotImplementedError("DOT needs two gradients and a closure gives one: call hand_over, then step")
        (group,) = self.param_groups
        if not self._kd_gradients:
            raise RuntimeError("DOT has no distillation gradients for this step: call hand_over before step")
        mu, delta, lr = group["momentum"], group["delta"], group["lr"]
        for parameter, kd in zip(group["params"], self._kd_gradients, strict=True):
            task = parameter.grad
            low, high = (mu - delta, mu + delta) if task is not None and kd is not None else (mu, mu)
            decay = group["weight_decay"] * parameter
            moves = []
            if task is not None:
                moves.append(self._push(parameter, "task", low, task + decay))
            if kd is not None:
                moves.append(self._push(parameter, "kd", high, kd + decay if task is None else kd))
            for move in moves:
                parameter.sub_(move, alpha=lr)
        self._kd_gradients.clear()

    def _push(self, parameter: Tensor, name: str, momentum: float, gradient: Tensor) -> Tensor:
        state = self.state[parameter]
        state[name] = gradient.clone() if name not in state else state[name].mul_(momentum).add_(gradient)
        return state[name]
