"""What stands for query, key and value in a block: read by hooks during a forward pass of either model.

Shapes: B batch, L tokens, C channels.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from torch import Tensor, nn

from asnn_goose.errors import UserError
from asnn_goose.models.goose import GooseForCausalLM

NAMES = ("query", "key", "value")


def student_projections(student: GooseForCausalLM) -> dict[str, nn.Module]:
    """The last block's receptance, key and value products, before the value residual."""
    mix = student.model.blocks[-1].get_submodule("time_mix")
    return {name: mix.get_submodule(part) for name, part in zip(NAMES, ("receptance", "key", "value"), strict=True)}


def attention_projections(name: str, block: nn.Module) -> dict[str, nn.Module]:
    """The attention's three linear maps of a teacher's block, before any rotation.

    Raises:
        UserError: the attention has no separate maps, as GPT-2's fused one.
    """
    for module in block.modules():
        found = dict(module.named_children())
        if all(f"{short}_proj" in found for short in "qkv"):
            return {long: found[f"{long[0]}_proj"] for long in NAMES}
    raise UserError(
        f"teacher {name!r} has no separate q_proj, k_proj and v_proj, which value_relation and qkv_relation read: "
        "choose another teacher or drop these losses"
    )


@contextmanager
def reading(modules: Mapping[str, nn.Module]) -> Iterator[dict[str, Tensor]]:
    """A mapping that holds each module's last output [B, L, C], the first of several, once a pass went through it."""
    outputs: dict[str, Tensor] = {}

    def keep(name: str):
        def hook(_module, _arguments, output):
            outputs[name] = output[0] if isinstance(output, tuple) else output

        return hook

    hooks = [module.register_forward_hook(keep(name)) for name, module in modules.items()]
    try:
        yield outputs
    finally:
        for hook in hooks:
            hook.remove()
