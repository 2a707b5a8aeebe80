"""Additions that spikes cause, by our count and by SpikingJelly's operation counter, on one student in the steps form.

    python -m benchmarks.operation_counts [--student runs/v11_1/<run_id>/student] [--tokens 64]

SpikingJelly looks at the whole tensor in front of a matrix: one of nothing but 0 and 1 costs an addition per 1 and
output (SynOpCounter), any other a multiply-accumulate per number and output (MACCounter). Ternary spikes have a -1
somewhere and so count as dense, at each of T micro-steps; where none is negative, as behind relu^2, the two counts
agree, and so they do for positive and negative spikes given to it as two binary tensors. Tokens are drawn at random,
and so is the student if none is named: the rates are nobody's.

In float64, where both forms of the product have the same spikes.
"""

import argparse
from collections import Counter

import torch
from spikingjelly.activation_based.op_counter import DispatchCounterMode, MACCounter, SynOpCounter

from asnn_goose.evaluation.firing import measure_firing, projections
from asnn_goose.models import GooseConfig, GooseForCausalLM
from benchmarks.measuring import report


class Text:
    """One window of random tokens."""

    def __init__(self, tokens: int, vocabulary: int):
        self.input_ids = torch.randint(vocabulary, (1, tokens), generator=torch.Generator().manual_seed(0))


@torch.no_grad()
def theirs(student: GooseForCausalLM, text: Text) -> tuple[Counter, Counter]:
    """(additions, multiply-accumulates) by site, all blocks together, of one pass in the steps form."""
    additions, macs = SynOpCounter(), MACCounter()
    paths = {id(module): f"GooseModel.{path}" for path, module in student.model.named_modules()}
    watched = list(projections(student))
    for _, _, linear in watched:
        linear.form = "steps"
    with DispatchCounterMode([additions, macs]):
        student.model(text.input_ids)
    for _, _, linear in watched:
        linear.form = "rate"
    found = Counter(), Counter()
    for _, site, linear in watched:
        for counter, by_site in zip((additions, macs), found, strict=True):
            by_site[site] += sum(counter.get_counts()[paths[id(linear)]].values())
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--student")
    parser.add_argument("--tokens", type=int, default=64)
    arguments = parser.parse_args()
    torch.manual_seed(0)
    if arguments.student is None:
        student = GooseForCausalLM(GooseConfig(vocab_size=1024))
        with torch.no_grad():
            for parameter in student.parameters():
                parameter += 0.02 * torch.randn_like(parameter)  # output and value matrices start at 0
    else:
        student = GooseForCausalLM.from_pretrained(arguments.student)
    student = student.double().eval()
    text = Text(arguments.tokens, student.config.vocab_size)
    sites = measure_firing(student, student.model, [text])
    additions, macs = theirs(student, text)
    ours, dense = Counter(), Counter()
    for site in sites:
        ours[site.site] += site.additions
        dense[site.site] += site.tokens * site.channels * site.outputs
    rows = [
        (name, *(f"{part[name] / arguments.tokens:,.0f}" for part in (dense, ours, additions, macs))) for name in ours
    ]
    columns = ("site", "dense products a token", "our additions", "their additions", "their multiply-accumulates")
    kind = student.config.neuron["kind"]
    report("operation_counts", f"operations of the mixer matrices, {kind}, T = {sites[0].steps}", columns, rows)


if __name__ == "__main__":
    main()
