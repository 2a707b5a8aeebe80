"""The student's start: what it takes from the teacher's weights and states.

Shapes: B windows, L tokens, N tokens in all, E teacher channels, C student channels.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from asnn_goose.config.schema import StudentConfig
from asnn_goose.errors import UserError
from asnn_goose.models.configuration import GooseConfig
from asnn_goose.models.goose import GooseForCausalLM, make_norm
from asnn_goose.models.layer_conversion import block_parts, convert_layers
from asnn_goose.models.teacher import Teacher

WINDOWS = 8
"""Windows per pass of the regression."""
RIDGE = 1e-3
"""Ridge penalty of the regression, as a share of the inputs' mean square (1 for normalised embeddings)."""


def build_student(
    settings: StudentConfig,
    teacher: Teacher,
    fit_BL: Tensor,
    fit_BLE: Tensor | None = None,
    layers: Sequence[int] = (),
) -> GooseForCausalLM:
    """A student with the teacher's vocabulary, started as ``settings.init`` says.

    none: random embedding, tied to the head. embeddings: the teacher's embedding and head, tied where the teacher ties
    them, and its final norm if the width is the teacher's. regression: embedding and head as well, and the linear map
    behind the embedding and the final norm fitted by :func:`fit_projection`. layers: embedding, final norm and head,
    and each block from the teacher's block of ``layers`` (models/layer_conversion.py).

    Args:
        settings: the student group of the configuration.
        teacher: a loaded teacher.
        fit_BL: windows of training text for the regression.
        fit_BLE: the teacher's states of these windows; None: they are computed here.
        layers: the teacher's layer that each block starts from, counted from 1, for ``init: layers``.

    Raises:
        UserError: head_size does not divide the width, or the teacher lacks a part that ``init`` takes from it.
    """
    width = settings.width or teacher.hidden_size
    if width % settings.head_size:
        raise UserError(
            f"student.head_size {settings.head_size} does not divide the width {width}: choose one that does"
        )
    none, converted = settings.init == "none", settings.init == "layers"
    hidden = settings.channel_mix_width
    if converted:
        hidden = block_parts(teacher, layers[0]).up.out_features
    config = GooseConfig(
        vocab_size=teacher.vocab_size,
        embedding_size=teacher.hidden_size,
        embedding_projection=settings.init == "regression",
        hidden_size=width,
        num_hidden_layers=settings.layers or teacher.num_layers,
        head_size=settings.head_size,
        channel_mix_size=hidden,
        time_mix="converted" if converted else "goose",
        channel_mix="gated" if converted else "relu2",
        embedding_norm=not converted,
        norm=settings.norm,
        **({"norm_eps": teacher.final_norm_eps} if converted else {}),
        neuron=settings.neuron.model_dump(),
        hidden_neuron=settings.hidden_neuron.model_dump(),
        wkv_backend=settings.wkv_backend,
        wkv_chunk=settings.wkv_chunk,
        tie_word_embeddings=none or torch.equal(teacher.embedding_weight_VE, teacher.head_weight_VE),
        bos_token_id=teacher.tokenizer.bos_token_id,
        eos_token_id=teacher.tokenizer.eos_token_id,
        pad_token_id=teacher.tokenizer.pad_token_id,
    )
    student = GooseForCausalLM(config)
    if none:
        return student
    if teacher.final_norm_kind != settings.norm:
        raise UserError(
            f"student.norm is {settings.norm!r} and the teacher's final norm is {teacher.final_norm_kind!r}: set "
            f"student.norm to {teacher.final_norm_kind} or student.init to none"
        )
    with torch.no_grad():
        student.model.embeddings.weight.copy_(teacher.embedding_weight_VE)
        student.lm_head.weight.copy_(teacher.head_weight_VE)
        if width == teacher.hidden_size:
            _copy_norm(student.model.norm, teacher)
        if converted:
            convert_layers(student, teacher, layers, fit_BL[:WINDOWS], settings.smoothing)
        if settings.init == "regression":
            if fit_BLE is None:
                splits = fit_BL.to(teacher.model.device).split(WINDOWS)
                fit_BLE = torch.cat([teacher.states(ids_BL) for ids_BL in splits])
            fit_projection(student, teacher, fit_BL, fit_BLE)
    return student


def _copy_norm(norm: nn.Module, teacher: Teacher) -> None:
    norm.get_parameter("weight").copy_(teacher.final_norm_weight_E)
    bias_E = teacher.final_norm_bias_E
    if bias_E is not None:
        norm.get_parameter("bias").copy_(bias_E)


@torch.no_grad()
def fit_projection(student: GooseForCausalLM, teacher: Teacher, fit_BL: Tensor, fit_BLE: Tensor) -> None:
    """Start the student as the best linear guess of the teacher's last state from the current token alone.

    With e_n the normalised embedding of token n (and a constant 1), y_n the teacher's state behind its final norm
    divided by that norm's weight, and lambda = N RIDGE,

        W = (sum e e^T + lambda I)^{-1} sum e y^T

    (the constant unpenalised) becomes the map from embedding to residual stream. A guess is shorter than what it
    guesses; the final norm would blow it up to unit length, so the norm's weight is multiplied by the least-squares
    factor c = <g, y> / <g, g>, g the guess as that norm leaves it. The blocks' outputs start at 0, so this is the whole
    student before its first step. A student of another width sees the guess through C orthonormal directions, the
    guess's principal ones if it is narrower, and its second map leads back.
    """
    config: GooseConfig = student.config  # pyright: ignore[reportAssignmentType]
    E, C, device = teacher.hidden_size, config.hidden_size, student.device
    scale_E = teacher.final_norm_weight_E.to(device)
    bias_E = None if teacher.final_norm_bias_E is None else teacher.final_norm_bias_E.to(device)
    gram = torch.zeros(E + 1, E + 1, dtype=torch.float64, device=device)
    cross = torch.zeros(E + 1, E, dtype=torch.float64, device=device)
    inputs, targets = [], []
    for ids_BL, states_BLE in zip(fit_BL.split(WINDOWS), fit_BLE.split(WINDOWS), strict=True):
        e_NE = student.model.embedding_norm(student.model.embeddings(ids_BL.to(device))).flatten(0, 1)
        e_NE = torch.cat([e_NE, e_NE.new_ones(e_NE.shape[0], 1)], -1)
        y_NE = states_BLE.to(device, torch.float32).flatten(0, 1)
        y_NE = (y_NE if bias_E is None else y_NE - bias_E) / scale_E
        gram += (e_NE.T @ e_NE).double()
        cross += (e_NE.T @ y_NE).double()
        inputs.append(e_NE)
        targets.append(y_NE)
    penalty = gram.new_full((E + 1,), RIDGE * fit_BL.numel())
    penalty[-1] = 0.0
    map_EE = torch.linalg.solve(gram + torch.diag(penalty), cross)

    down_EC = _orthonormal(map_EE.T @ gram @ map_EE, C).float()
    map_EC = map_EE.float() @ down_EC
    guess_NE = make_norm(config, C).to(device)(torch.cat(inputs) @ map_EC) @ down_EC.T
    c = ((guess_NE * torch.cat(targets)).sum() / guess_NE.square().sum()).item()
    assert student.model.widen is not None, "init regression builds the map"
    student.model.widen.weight.copy_(map_EC[:-1].T)
    student.model.widen.bias.copy_(map_EC[-1])
    norm = student.model.norm
    if student.narrow is None:
        norm.get_parameter("weight").copy_(c * scale_E)
        return
    student.narrow.weight.copy_(scale_E[:, None] * down_EC)
    norm.get_parameter("weight").fill_(c)
    if bias_E is not None:
        norm.get_parameter("bias").copy_(torch.linalg.lstsq(student.narrow.weight, bias_E[:, None]).solution[:, 0])


def _orthonormal(moment_EE: Tensor, C: int) -> Tensor:
    """[E, C]: the identity for C = E; the leading eigenvectors for C < E; a random frame, rows orthonormal, above."""
    E = len(moment_EE)
    if C == E:
        return torch.eye(E, dtype=moment_EE.dtype, device=moment_EE.device)
    if C > E:
        return nn.init.orthogonal_(moment_EE.new_empty(E, C))
    return torch.linalg.eigh(moment_EE).eigenvectors[:, -C:].flip(-1)
