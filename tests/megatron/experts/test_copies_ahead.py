"""Weights of copies leave while the layer before computes, and their gradients come home while it computes its own."""

import weakref
from contextlib import contextmanager
from types import SimpleNamespace

import pytest
import torch

from tests.megatron.experts.test_pieces import DROPPED, HIDDEN, _error, _in_halves, _ran
from tests.megatron.experts.test_placement import GROUPED, PLANS, _layers, _step
from tests.ranks import run_ranks
from tests.tolerances import EXACT

LAYERS, RANKS = 3, 2
VARIANTS = {
    "one by one": {},
    "at once, in two pieces, tokens dropped": {**GROUPED, **DROPPED, "pieces": 2},
    "one by one, in groups of a rank": {"hops": "fastermoe"},
}
FORWARD = """
weights 0 leave, weights 1 leave, weights 0 here, experts 0, weights 2 leave, weights 1 here, experts 1, weights 2 here,
experts 2
"""
BACKWARD = """
experts 2, gradients 2 leave, experts 1, gradients 1 leave, gradients 2 here, experts 0, gradients 0 leave,
gradients 1 here, gradients 0 here
"""
ALONE = """
weights 0 leave, weights 0 here, experts 0, weights 1 leave, weights 1 here, experts 1, weights 2 leave, weights 2 here,
experts 2
"""


def _row(changes):
    """Layers with copies in a row, as those of a chunk; those in `recomputed` are computed again in backward."""
    from megatron.core.tensor_parallel import checkpoint

    class Row(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = torch.nn.ModuleList(_layers(RANKS, **changes)[1] for _ in range(LAYERS))
            self.recomputed = ()

        def forward(self, x):
            for at, layer in enumerate(self.layers):
                again = at in self.recomputed and self.training
                # as in a model, with a norm before it and a residual connection beside it
                y = torch.nn.functional.layer_norm(x, (HIDDEN,))
                y = checkpoint(lambda given, layer=layer: layer(given)[0], False, y) if again else layer(y)[0]
                x = x + y
            return x, None

    return Row()


@contextmanager
def _noted(row):
    """Notes of what leaves, arrives and computes, and of the copies of layers that are alive while experts compute."""
    from megatron_cp.experts.lending import Borrowed

    notes, alive, rows = [], [], []
    numbers = {id(layer.placed.lending): at for at, layer in enumerate(row.layers)}
    send, came, undo = Borrowed.send, Borrowed.came, []

    def computes(at, output):
        notes.append(f"experts {at}")
        alive.append(sum(each() is not None for each in rows))
        if output is not None and output.requires_grad:
            output.register_hook(lambda _: notes.append(f"experts {at}"))

    def sends(borrowed, gradient):
        notes.append(f"gradients {numbers[id(borrowed._lending)]} leave")
        send(borrowed, gradient)

    def comes(borrowed):
        notes.append(f"gradients {numbers[id(borrowed._lending)]} here")
        return came(borrowed)

    for at, layer in enumerate(row.layers):
        placed, weights, landed = layer.placed, layer.placed.lending.weights, layer.placed._landed

        def leaves(loan, given, at=at, weights=weights):
            notes.append(f"weights {at} leave")
            flight = weights(loan, given)
            rows.append(weakref.ref(flight.rows))
            return flight

        def arrives(training, at=at, placed=placed, landed=landed):
            if placed._coming:
                notes.append(f"weights {at} here")
            return landed(training)

        placed.lending.weights, placed._landed = leaves, arrives
        handle = layer.experts.register_forward_hook(lambda _, __, output, at=at: computes(at, output[0]))
        undo.append((layer, handle))
    Borrowed.send, Borrowed.came = sends, comes
    yield notes, alive
    Borrowed.send, Borrowed.came = send, came
    for layer, handle in undo:
        handle.remove()
        del layer.placed.lending.weights, layer.placed._landed


def _once(notes):
    """Notes without those that follow an equal one: experts and copies are called one after the other."""
    return ", ".join(note for at, note in enumerate(notes) if not at or note != notes[at - 1])


def _all_ways(row, rank):
    """What microbatches, an evaluation with other weights, halves and recomputations of a step give."""
    found = [*_step(row, rank), *_in_halves(row, rank)[0], *_ran(row, rank, recompute=True)]
    for recomputed in ((0, 1, 2), (0,), (1,)):
        row.recomputed = recomputed
        found += _ran(row, rank)
        row.recomputed = ()
    return found


def _rows(variants):
    """For each variant, the largest error of each plan's step, if as many copies were sent, and what was noted."""
    from megatron.core import parallel_state

    from megatron_cp.megatron import hooks
    from megatron_cp.megatron.experts import placement
    from megatron_cp.megatron.machine.cpu import cpu_runtime

    torch.distributed.init_process_group("gloo")
    parallel_state.initialize_model_parallel(expert_model_parallel_size=RANKS)
    rank, run, found = torch.distributed.get_rank(), SimpleNamespace(curr_iteration=0), {}
    placement.args_of_run = lambda: run
    with cpu_runtime(), hooks.apply(["weight-queue"]):
        from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed

        model_parallel_cuda_manual_seed(1)
        for variant in variants:
            row, steps = _row(VARIANTS[variant]), []
            for layer in row.layers:
                layer.placed.placing.interval = 1000
            for hosted in PLANS[RANKS]:
                given = []
                for linked in (False, True):
                    for layer in row.layers:
                        placed = layer.placed
                        placed.following, placed.placing.plan = None, placed.plan._replace(hosted=hosted)
                    if linked:
                        placement.link_copies([row])
                    run.curr_iteration += 1
                    before = [(layer.placed.lending.there, layer.placed.lending.home) for layer in row.layers]
                    outputs = _all_ways(row, rank)
                    after = [(layer.placed.lending.there, layer.placed.lending.home) for layer in row.layers]
                    given.append((outputs, [(b[0] - a[0], b[1] - a[1]) for a, b in zip(before, after, strict=True)]))
                (apart, sent), (ahead, sent_ahead) = given
                steps.append((len(apart), _error(ahead, apart), sent == sent_ahead))
            found[variant] = steps
        # a chunk's last layer lends to none of another chunk
        for layer in row.layers:
            layer.placed.following = None
        placement.link_copies([row.layers[:2], row.layers[2:]])
        assert [layer.placed.following for layer in row.layers] == [row.layers[1], None, None]
        placement.link_copies([row])
        hosted, orders = PLANS[RANKS][0], []
        for layer in row.layers:
            layer.placed.placing.plan = layer.placed.plan._replace(hosted=hosted)
        for linked in (True, False):
            for layer in row.layers:
                layer.placed.following = layer.placed.following if linked else None
            run.curr_iteration += 1
            with _noted(row) as (notes, alive):
                x = torch.ones(5, 1, HIDDEN, dtype=torch.float64, requires_grad=True)
                output, _ = row(x)
                forward = _once(notes)
                notes.clear()
                output.sum().backward()
                backward = _once(notes)
                row.eval()
                with torch.no_grad():
                    # the first one lets go of what the step has kept
                    row(x)
                    alive.clear()
                    row(x)
                row.train()
                orders.append((forward, backward, max(alive)))
        torch.distributed.barrier()
    return found, orders


@pytest.mark.parametrize(
    "variants",
    [["one by one"], pytest.param([name for name in VARIANTS if name != "one by one"], marks=pytest.mark.slow)],
    ids=["one by one", "in pieces and groups"],
)
def test_copies_that_leave_a_layer_ahead_compute_what_those_of_the_layer_itself_do(variants):
    for found, orders in run_ranks(RANKS, _rows, variants):
        for steps in found.values():
            assert len(steps) == len(PLANS[RANKS])
            for count, worst, sent in steps:
                assert count > 40
                assert worst < EXACT
                assert sent
        if variants == ["one by one"]:
            (forward, backward, alive), (alone, _, alive_alone) = orders
            assert [forward, backward] == [" ".join(each.split()) for each in (FORWARD, BACKWARD)]
            assert alone == " ".join(ALONE.split())
            # of an evaluation, which keeps none: those of two layers
            assert (alive, alive_alone) == (2, 1)
