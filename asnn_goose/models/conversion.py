"""Teacher weights and states -> the student's start.

Shapes: B windows, L tokens, N tokens in all, E teacher channels, C student channels.
"""

import math

import torch
from torch import Tensor, nn

from asnn_goose.config.schema import StudentConfig
from asnn_goose.errors import UserError
from asnn_goose.models.configuration import GooseConfig
from asnn_goose.models.goose import GooseForCausalLM
from asnn_goose.models.teacher import Teacher

RIDGE = 1e-3
"""Ridge penalty of the regression, as a share of the inputs' mean square (1 for normalised embeddings)."""


def build_student(settings: StudentConfig, teacher: Teacher, fit_BL: Tensor) -> GooseForCausalLM:
    """A student with the teacher's vocabulary, started as ``settings.init`` says.

    none: random embedding. embeddings: the teacher's embedding (tied to the head), and its final norm. regression: the
    same, and the linear map behind the embedding fitted by :func:`fit_projection`.

    Args:
        settings: the student group of the configuration.
        teacher: a loaded teacher.
        fit_BL: windows of training text for the regression.

    Raises:
        UserError: head_size does not divide the width, or the teacher lacks a part that ``init`` takes from it.
    """
    width = settings.width or teacher.hidden_size
    if width % settings.head_size:
        raise UserError(
            f"student.head_size {settings.head_size} does not divide the width {width}: choose one that does"
        )
    config = GooseConfig(
        vocab_size=teacher.vocab_size,
        embedding_size=teacher.hidden_size,
        embedding_projection=settings.init == "regression",
        hidden_size=width,
        num_hidden_layers=settings.layers,
        head_size=settings.head_size,
        channel_mix_size=settings.channel_mix_width,
        norm=settings.norm,
        neuron=settings.neuron.model_dump(),
        hidden_neuron=settings.hidden_neuron.model_dump(),
        wkv_backend=settings.wkv_backend,
        wkv_chunk=settings.wkv_chunk,
        lif_backend=settings.lif_backend,
        bos_token_id=teacher.tokenizer.bos_token_id,
        eos_token_id=teacher.tokenizer.eos_token_id,
        pad_token_id=teacher.tokenizer.pad_token_id,
    )
    student = GooseForCausalLM(config)
    if settings.init == "none":
        return student
    if teacher.final_norm_kind != settings.norm:
        raise UserError(
            f"student.norm is {settings.norm!r} and the teacher's final norm is {teacher.final_norm_kind!r}: set "
            f"student.norm to {teacher.final_norm_kind} or student.init to none"
        )
    with torch.no_grad():
        student.model.embeddings.weight.copy_(teacher.embedding_weight_VE)
        student.tie_weights()
        if width == teacher.hidden_size:
            _copy_norm(student.model.norm, teacher)
        if settings.init == "regression":
            fit_projection(student, teacher, fit_BL)
    return student


def _copy_norm(norm: nn.Module, teacher: Teacher) -> None:
    norm.get_parameter("weight").copy_(teacher.final_norm_weight_E)
    bias_E = teacher.final_norm_bias_E
    if bias_E is not None:
        norm.get_parameter("bias").copy_(bias_E)


@torch.no_grad()
def fit_projection(student: GooseForCausalLM, teacher: Teacher, fit_BL: Tensor) -> None:
    """Start the student as the best linear guess of the teacher's last state from the current token alone.

    With e_n the normalised embedding of token n (and a constant 1), y_n the teacher's state behind its final norm
    divided by that norm's weight, and lambda = N RIDGE,

        W = (sum e e^T + lambda I)^{-1} sum e y^T

    becomes the map from embedding to residual stream. A guess is shorter than what it guesses; the final norm would
    blow it up to unit length, so the norm's weight is multiplied by the least-squares factor c = <g, y> / <g, g>, g
    the guess at unit length. The blocks' outputs start at 0, so this is the whole student before its first step.
    A narrower student keeps the leading principal directions of the guess.
    """
    E, C = teacher.hidden_size, student.config.hidden_size
    scale_E = teacher.final_norm_weight_E
    bias_E = teacher.final_norm_bias_E
    gram, cross = torch.zeros(E + 1, E + 1, dtype=torch.float64), torch.zeros(E + 1, E, dtype=torch.float64)
    inputs, targets = [], []
    for ids_BL in fit_BL.split(8):
        e_NE = student.model.embedding_norm(student.model.embeddings(ids_BL)).flatten(0, 1)
        e_NE = torch.cat([e_NE, torch.ones(e_NE.shape[0], 1)], -1)
        y_NE = teacher.states(ids_BL).float().flatten(0, 1)
        y_NE = (y_NE if bias_E is None else y_NE - bias_E) / scale_E
        gram += (e_NE.T @ e_NE).double()
        cross += (e_NE.T @ y_NE).double()
        inputs.append(e_NE)
        targets.append(y_NE)
    penalty = torch.full((E + 1,), RIDGE * fit_BL.numel(), dtype=torch.float64)
    penalty[-1] = 0.0
    map_EE = torch.linalg.solve(gram + torch.diag(penalty), cross).float()

    guess_NE, y_NE = torch.cat(inputs) @ map_EE, torch.cat(targets)
    unit_NE = guess_NE / guess_NE.square().mean(-1, keepdim=True).sqrt()
    shrink = ((unit_NE * y_NE).sum() / unit_NE.square().sum()).item()
    assert student.model.widen is not None, "init regression builds the map"
    if C == E:
        down_EC, student_scale = torch.eye(E), scale_E * shrink
    else:
        down_EC = torch.linalg.svd(guess_NE[: 4 * E], full_matrices=False).Vh[:C].T
        student_scale = torch.full((C,), shrink * math.sqrt(C / E))
        assert student.narrow is not None, "another width has a second map"
        student.narrow.weight.copy_(scale_E[:, None] * down_EC)
    student.model.widen.weight.copy_((map_EE[:-1] @ down_EC).T)
    student.model.widen.bias.copy_(map_EE[-1] @ down_EC)
    student.model.norm.get_parameter("weight").copy_(student_scale)
