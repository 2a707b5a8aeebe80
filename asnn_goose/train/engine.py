"""The distributed engine: the only file that knows Lightning Fabric."""

import logging
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from lightning_fabric import Fabric
from torch import Tensor, nn

from asnn_goose.config.classifier import TaskTrainConfig
from asnn_goose.config.hardware import native_bfloat16
from asnn_goose.config.schema import TrainConfig
from asnn_goose.errors import UserError

# Fabric repeats on stderr what it was told: precision, ranks, backend.
logging.getLogger("lightning_fabric").setLevel(logging.WARNING)


def resolve_device(device: str) -> str:
    """cpu or cuda; auto takes cuda where there is one."""
    if device == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cuda" and not torch.cuda.is_available():
        raise UserError("train.device is cuda, but torch sees no CUDA device: set train.device to cpu")
    return device


def resolve_precision(precision: str, device: str) -> str:
    """bfloat16 or float32; auto takes bfloat16 where the device multiplies it faster."""
    if precision == "auto":
        return "bfloat16" if native_bfloat16(device) else "float32"
    return precision


class Engine:
    """Processes, devices and the dtype of the student's products."""

    def __init__(self, config: TrainConfig | TaskTrainConfig):
        self.device_type = resolve_device(config.device)
        if self.device_type == "cuda" and config.devices > torch.cuda.device_count():
            raise UserError(
                f"train.devices is {config.devices}, and there are {torch.cuda.device_count()} GPUs: lower it"
            )
        self.precision = resolve_precision(config.precision, self.device_type)
        self._fabric = Fabric(
            accelerator=self.device_type,
            devices=config.devices,
            strategy="ddp" if config.devices > 1 else "auto",
            precision="bf16-mixed" if self.precision == "bfloat16" else "32-true",
        )

    def machine(self) -> dict[str, Any]:
        """Where products are computed, for the provenance: the accelerator, and how many threads of the processor."""
        gpu = torch.cuda.get_device_name() if self.device_type == "cuda" else None
        return {"gpu": gpu, "threads": torch.get_num_threads()}

    def launch(self) -> None:
        """Start the other processes, if any; each runs the script again from its beginning."""
        self._fabric.launch()

    @property
    def device(self) -> torch.device:
        return self._fabric.device

    @property
    def rank(self) -> int:
        return self._fabric.global_rank

    @property
    def world_size(self) -> int:
        return self._fabric.world_size

    def setup(self, module: nn.Module, *optimizers: torch.optim.Optimizer) -> tuple[Any, list[Any]]:
        """The module and its optimisers as the engine runs them: on the device, under autocast, in step."""
        wrapped, *rest = self._fabric.setup(module, *optimizers)
        return wrapped, rest

    def backward(self, loss: Tensor, retain_graph: bool = False) -> None:
        self._fabric.backward(loss, retain_graph=retain_graph)

    def unwrapped(self, module: Any) -> Callable[..., Any]:
        """The forward pass of a module that :meth:`setup` gave, for gradients by torch.autograd.grad.

        In mixed precision Fabric's wrapper lets none be taken but by :meth:`backward`. For one process.
        """

        def forward(*arguments: Any, **keywords: Any) -> Any:
            with self.autocast():
                return module.module(*arguments, **keywords)

        return forward

    def no_sync(self, module: Any, enabled: bool) -> AbstractContextManager:
        """Within it, gradients stay local: for all but the last micro-batch of a step."""
        return self._fabric.no_backward_sync(module, enabled=enabled)

    def autocast(self) -> AbstractContextManager:
        """The dtype of the student's products, outside the engine's own forward."""
        return torch.autocast(self.device_type, torch.bfloat16, enabled=self.precision == "bfloat16")

    @contextmanager
    def looking(self, module: nn.Module) -> Iterator[None]:
        """Within it the module is as an evaluation has it: in eval mode, without gradient, under :meth:`autocast`."""
        training = module.training
        module.eval()
        try:
            with torch.no_grad(), self.autocast():
                yield
        finally:
            module.train(training)

    def sum(self, value: float) -> float:
        """Sum of a number over all processes."""
        if self.world_size == 1:
            return value
        total = self._fabric.all_reduce(torch.tensor(value, dtype=torch.float64), reduce_op="sum")
        return float(total)  # pyright: ignore[reportArgumentType]

    def barrier(self) -> None:
        self._fabric.barrier()
