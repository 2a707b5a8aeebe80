"""From tokens to the sums of the configured terms: student, temperature and everything else that trains.

Shapes: B windows, L tokens, N predicted positions, C student channels, E teacher channels, V vocabulary.
"""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from asnn_goose.config.distillation import DistillationConfig
from asnn_goose.config.losses import LOGIT_TERMS
from asnn_goose.kernels.linear_divergence import linear_divergence
from asnn_goose.kernels.linear_divergence.rows import OPTIONS
from asnn_goose.losses.dual_head import dual_head_rows
from asnn_goose.losses.sparse import draw_targets, random_sampling_ce
from asnn_goose.losses.tiles import TILE, tiled_sum
from asnn_goose.models import GooseForCausalLM
from asnn_goose.models.projections import reading, student_projections
from asnn_goose.schedules import InstanceTemperature, LearnableTemperature, MinimisedTemperature, normalised_states
from asnn_goose.train.features import FeatureTerms, Inside
from asnn_goose.train.teacher_targets import Targets


def _temperature(
    config: DistillationConfig, channels: int
) -> LearnableTemperature | InstanceTemperature | MinimisedTemperature | None:
    """As configured, at its start; None where it is fixed. ``channels`` are those of both models' states."""
    temperature = config.temperature
    if temperature.mode == "fixed":
        return None
    start = temperature.init if temperature.ramp is None else temperature.ramp.start
    if config.curriculum is not None and config.curriculum.temperatures is not None:
        start = config.curriculum.temperatures[0]
    bounds = start, temperature.low, temperature.high
    if temperature.mode == "minimised":
        return MinimisedTemperature(*bounds)
    if temperature.scope == "global":
        return LearnableTemperature(*bounds)
    return InstanceTemperature(*bounds, channels, temperature.scope)


class Distillation(nn.Module):
    """Everything that trains, in one module: the student, its projectors, and the temperature if it is learned.

    ``forward`` goes from tokens to the sums of the configured terms, so that the engine's autocast covers the
    student; evaluation takes :meth:`states` alone.

    Args:
        student: the model; its head is the head of every term but ``dual_head``, which gets one of its own.
        config: the objective.
        features: the terms that look inside the models; None where the objective has none.
        teacher_width: E of the teacher's states, for a temperature that is read from them.
    """

    def __init__(
        self,
        student: GooseForCausalLM,
        config: DistillationConfig,
        features: FeatureTerms | None = None,
        teacher_width: int | None = None,
    ):
        super().__init__()
        self.student = student
        self._narrow_head: Tensor | None = None
        terms = config.losses.present()
        self.names = tuple(terms)
        self.random_sampling, self.dual_head = config.losses.random_sampling, config.losses.dual_head
        self.options = {
            name: {option: getattr(terms[name], option) for option in options}
            for name, options in OPTIONS.items()
            if name in terms
        }
        self.features = features
        self.auxiliary_head = None
        if self.dual_head is not None:
            self.auxiliary_head = nn.Linear(*reversed(student.lm_head.weight.shape), bias=False)
            with torch.no_grad():
                self.auxiliary_head.weight.copy_(student.lm_head.weight)
        self.temperature = _temperature(config, student.lm_head.weight.shape[1] + (teacher_width or 0))

    def steered(self) -> list[nn.Parameter]:
        """Every trainable parameter but the temperature's: what the student's optimiser moves."""
        temperature = set() if self.temperature is None else set(map(id, self.temperature.parameters()))
        return [p for p in self.parameters() if p.requires_grad and id(p) not in temperature]

    def head_VC(self) -> Tensor:
        """The student's head in the dtype of its products; a frozen one is cast once."""
        weight_VC = self.student.lm_head.weight
        dtype = torch.bfloat16 if torch.is_autocast_enabled(weight_VC.device.type) else weight_VC.dtype
        if weight_VC.requires_grad or dtype == weight_VC.dtype:
            return weight_VC.to(dtype)
        if self._narrow_head is None:
            self._narrow_head = weight_VC.detach().to(dtype)
        return self._narrow_head

    def states(self, input_ids: Tensor) -> Tensor:
        """The student's states [B, L, E] in front of its head."""
        return self._last(self.student.model(input_ids).last_hidden_state)

    def forward(
        self,
        input_ids: Tensor,
        mask: Tensor,
        targets: Targets,
        lam: float,
        scheduled: float,
        weights: Mapping[str, float],
        apart: bool = False,
    ):
        """(name -> sum, adversarial temperature, plain temperature) over the predicted positions.

        Divergences are in nats, an instance's temperatures are [B, L - 1].

        Args:
            input_ids, mask: [B, L].
            targets: of the teacher, for these windows.
            lam: strength of the temperature's adversary.
            scheduled: T, where it is not learned.
            weights: name -> factor that the sums will be combined with.
            apart: each term will be differentiated alone, so that the fused operation runs once per term.
        """
        out = None
        modules = student_projections(self.student) if self.features is not None and self.features.relations else {}
        with reading(modules) as projections:
            if self.features is None:
                states_BLE = self.states(input_ids)
            else:
                out = self.student.model(input_ids, output_hidden_states=True)
                states_BLE = self._last(out.last_hidden_state)
        predicting = mask[:, 1:]
        adversarial, plain = self._temperatures(lam, scheduled, states_BLE, predicting, targets)
        hidden_NE = states_BLE[:, :-1].flatten(0, 1)
        logits = {name: weights[name] for name in self.names if name in LOGIT_TERMS}
        sums: dict[str, Tensor] = {}
        for group in [{name: weight} for name, weight in logits.items()] if apart else [logits]:
            if group:
                sums |= self._of_logits(group, hidden_NE, input_ids, predicting, targets, adversarial)
        sums |= self._of_other_heads(hidden_NE, predicting, targets)
        if self.features is not None and out is not None:
            sums |= self._of_features(self.features, out.hidden_states, projections, predicting, targets)
        return sums, adversarial, plain

    def _last(self, last_BLC: Tensor) -> Tensor:
        return last_BLC if self.student.narrow is None else self.student.narrow(last_BLC)

    def _temperatures(self, lam: float, scheduled: float, states_BLE: Tensor, predicting_BL: Tensor, targets: Targets):
        """(adversarial, plain): two numbers, two scalars, or one of each for every predicted position [B, L - 1]."""
        if self.temperature is None:
            return scheduled, scheduled
        if not isinstance(self.temperature, InstanceTemperature):
            return self.temperature(lam)
        assert targets.states_BLE is not None, "the configuration lets no cut targets meet such a temperature"
        with torch.autocast(states_BLE.device.type, enabled=False):
            features_BLC = normalised_states(states_BLE[:, :-1], targets.states_BLE[:, :-1])
            adversarial_BL, plain_BL = self.temperature(features_BLC, predicting_BL, lam)
        if not plain_BL[predicting_BL].isfinite().all():
            raise FloatingPointError("the temperature is not finite, as the states that it is read from")
        return adversarial_BL, plain_BL

    def _of_logits(self, weights, hidden_NE, input_ids, predicting_BL, targets: Targets, temperature):
        topk = None
        if targets.topk is not None:
            ids, log_p, log_tail = (x[:, :-1].flatten(0, 1) for x in targets.topk)
            topk = (ids, log_p, log_tail)
        teacher_NE = None if targets.states_BLE is None else targets.states_BLE[:, :-1].flatten(0, 1)
        sums, _ = linear_divergence(
            hidden_NE,
            self.head_VC(),
            teacher_NE,
            None if teacher_NE is None else targets.teacher.head_VE,
            targets_N=input_ids[:, 1:].flatten(),
            weights=weights,
            options={name: options for name, options in self.options.items() if name in weights},
            temperature=temperature.flatten() if isinstance(temperature, Tensor) and temperature.ndim else temperature,
            mask=predicting_BL.flatten(),
            teacher_topk=topk,
        )
        return sums

    def _of_other_heads(self, hidden_NE: Tensor, predicting_BL: Tensor, targets: Targets) -> dict[str, Tensor]:
        """Terms of logits that the fused operation does not know, a tile of tokens at a time."""
        sums: dict[str, Tensor] = {}
        if (self.random_sampling is None and self.dual_head is None) or targets.states_BLE is None:
            return sums
        keep_N = predicting_BL.flatten()
        head_VE = targets.teacher.head_VE
        hidden_NE = hidden_NE[keep_N]
        teacher_NE = targets.states_BLE[:, :-1].flatten(0, 1)[keep_N].to(head_VE.dtype)
        with torch.autocast(hidden_NE.device.type, enabled=False):
            if (term := self.random_sampling) is not None:
                # Drawn first: a tile that is computed again in the backward pass must not draw again.
                drawn = [draw_targets(t @ head_VE.T, term.samples, term.power) for t in teacher_NE.split(TILE)]
                ids_NK, weights_NK = (torch.cat(parts) for parts in zip(*drawn, strict=True))
                weight_VC = self.head_VC()

                def sampled(x, ids, weights):
                    return random_sampling_ce(x.to(weight_VC.dtype) @ weight_VC.T, ids, weights) * len(x)

                sums["random_sampling"] = tiled_sum(sampled, hidden_NE, ids_NK, weights_NK)
            if (term := self.dual_head) is not None and self.auxiliary_head is not None:
                auxiliary_VC, tau, centred = self.auxiliary_head.weight, term.tau, term.centred

                def distance(x, t):
                    return dual_head_rows(x.float() @ auxiliary_VC.T, t @ head_VE.T, tau, centred).sum()

                sums["dual_head"] = tiled_sum(distance, hidden_NE, teacher_NE)
        return sums

    def _of_features(
        self, features: FeatureTerms, hidden, projections, predicting_BL: Tensor, targets: Targets
    ) -> dict[str, Tensor]:
        # A head that a shallow layer's prediction could train would learn to read shallow layers.
        weight_VC = self.head_VC().detach()

        def student_read_out(states: Tensor) -> Tensor:
            return self._last(self.student.model.norm(states)).to(weight_VC.dtype) @ weight_VC.T

        def cut(parts: Mapping) -> dict:
            return {key: x[:, :-1] for key, x in parts.items()}

        student = Inside(cut(dict(enumerate(hidden))), cut(projections), student_read_out)
        teacher = Inside(cut(targets.layers), cut(targets.projections), targets.teacher.read_out)
        return features(student, teacher, predicting_BL)
