"""Reductions of gradients wait for the exchanges of backward, and all of them start."""

from functools import partial
from itertools import groupby

import torch

from megatron_cp.comm import SingleFabric, in_process
from megatron_cp.experts.exchange import TwoHopExchange
from megatron_cp.experts.pieces import PieceLoop, in_pieces
from megatron_cp.experts.priority import ExchangePriority

LAYERS, PIECES, HIDDEN = 3, 2, 4


def noted_starts(*steps):
    """What starts after each step: a name is ready, `expect`, `over` or `finish`; and how many have waited."""
    priority, started, found = ExchangePriority(), [], []
    for step in steps:
        if step in ("expect", "over", "finish"):
            getattr(priority, step)()
        else:
            priority.start(partial(started.append, step))
        found.append(" ".join(started))
        started.clear()
    return found, priority.held


def test_a_reduction_waits_for_the_next_exchange_where_one_is_to_come():
    steps = ("a", "expect", "expect", "b", "c", "over", "d", "over", "e")
    assert noted_starts(*steps) == (["a", "", "", "", "", "b c", "", "d", "e"], 3)


def test_the_end_of_a_step_starts_all_that_wait_and_expects_nothing():
    # a forward without a backward, and a backward after the end
    assert noted_starts("expect", "a", "b", "finish", "c", "over", "d") == (["", "", "", "a b", "c", "", "d"], 2)


class Noted(TwoHopExchange):
    """An exchange that notes each message."""

    def __init__(self, fabric, notes):
        super().__init__(SingleFabric(), fabric)
        self.notes = notes

    def there(self, rows, plan):
        self.notes.append("exchange")
        return super().there(rows, plan)

    def home(self, rows, plan):
        self.notes.append("exchange")
        return super().home(rows, plan)


def backward_of(fabric, *, first):
    """Notes of a backward through layers, with a weight before the exchange and an expert's, and how many waited."""
    notes, priority = [], ExchangePriority()
    exchange = Noted(fabric, notes)

    def reduced(name, _):
        notes.append(f"{name} ready")
        priority.start(partial(notes.append, f"{name} starts"))

    def weight(name):
        made = torch.ones(1, requires_grad=True)
        made.register_post_accumulate_grad_hook(partial(reduced, name))
        return made

    x, plan = torch.ones(2 * PIECES, HIDDEN), exchange.plan([[1, 1]], [1, 1])
    for layer in range(1, LAYERS + 1):
        attention, expert = weight(f"attention {layer}"), weight(f"expert {layer}")
        compute = partial(lambda expert, rows, probs: rows * probs[:, None] * expert, expert)
        loop = PieceLoop(
            exchange, [plan] * PIECES, [compute] * PIECES, keeps=True, priority=priority if first else None
        )
        rows = (x * attention).split(2)
        x = torch.cat(in_pieces(loop, rows, [torch.ones(2)] * PIECES, [expert]))
    notes.clear()
    x.sum().backward()
    priority.finish()
    return [note for note, _ in groupby(notes)], priority.held


def test_no_reduction_starts_between_one_exchange_and_the_next_but_right_after_it():
    for notes, held in in_process(2, partial(backward_of, first=True)):
        assert held == 2 * (LAYERS - 1)
        assert notes == [
            "exchange",
            *("expert 3 ready", "attention 3 ready", "exchange", "expert 3 starts", "attention 3 starts"),
            *("expert 2 ready", "attention 2 ready", "exchange", "expert 2 starts", "attention 2 starts"),
            *("expert 1 ready", "expert 1 starts", "attention 1 ready", "attention 1 starts"),
        ]


def test_without_priority_reductions_start_when_they_are_ready():
    for notes, held in in_process(2, partial(backward_of, first=False)):
        assert held == 0
        starts = [at for at, note in enumerate(notes) if note.endswith("starts")]
        assert len(starts) == 2 * LAYERS
        assert all(notes[at - 1] == notes[at].replace("starts", "ready") for at in starts)
