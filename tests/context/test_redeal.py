"""Frames dealt to the ranks for the encoder, and tokens brought to where they are wanted, equal one rank."""

from itertools import pairwise

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

from megatron_cp.comm import in_process
from megatron_cp.context.attend import attend, plan
from megatron_cp.context.documents import documents
from megatron_cp.context.frames import FramePlace, shares
from megatron_cp.context.layouts import LAYOUTS, STRIPED, indices
from megatron_cp.context.redeal import deal_frames, find_frames, frame_tokens, place_frames, redeal
from megatron_cp.context.sharding import shard
from tests.context.dense import relative_error
from tests.tolerances import EXACT

PIXELS, WIDTH, BATCH = 5, 4, 2


def batch_of(seq, frames):
    """Frames of 1 to 3 tokens, some shown twice: tokens, places, pixels of each frame, text and dout of the batch."""
    torch.manual_seed(seq + frames)
    tokens, places, starts = [1 + frame % 3 for frame in range(frames)], [], [1] * BATCH
    for frame, count in enumerate(tokens):
        for row in {frame % BATCH, 0 if frame % 4 == 0 else frame % BATCH}:
            places.append((frame, starts[row], row))
            # every third frame has no text before the next one
            starts[row] += count + (frame % 3 > 0)
    assert max(starts) <= seq
    pixels = [torch.randn(count, PIXELS, dtype=torch.float64) for count in tokens]
    text, dout = torch.randn(2, seq, BATCH, WIDTH, dtype=torch.float64)
    return tokens, places, pixels, text, dout, torch.randn(PIXELS, WIDTH, dtype=torch.float64)


def dense(tokens, places, pixels, text, dout, weight):
    """out, and gradients of pixels, text and the encoder's weight, by torch alone."""
    pixels = (
        torch.cat(pixels).requires_grad_() if pixels else torch.zeros(0, PIXELS, dtype=torch.float64).requires_grad_()
    )
    text, weight = text.clone().requires_grad_(), weight.clone().requires_grad_()
    first = [sum(tokens[:frame]) for frame in range(len(tokens))]
    x, encoded = text.clone(), torch.tanh(pixels @ weight)
    for frame, start, row in places:
        x[start : start + tokens[frame], row] = encoded[first[frame] : first[frame] + tokens[frame]]
    heads = x.permute(1, 0, 2).unsqueeze(1)
    out = scaled_dot_product_attention(heads, heads, heads, is_causal=True).squeeze(1).permute(1, 0, 2)
    return out.detach(), *torch.autograd.grad(
        out, (pixels, text, weight), dout, materialize_grads=True, allow_unused=True
    )


def assert_equals_one_rank(ranks, frames, *, seq, backend="zigzag", patches=False, **choices):
    whole = batch_of(seq, frames)
    tokens, places, pixels, text, dout, weight = whole

    def body(fabric):
        how = plan(backend, cp=fabric, kernel="reference", **choices)
        deal = deal_frames(how, tokens, places, seq=seq, batch=BATCH, patches=tokens if patches else None)
        seen = [pixels[frame].clone().requires_grad_() for frame in deal.mine]
        own, ours = shard(text, how).requires_grad_(), weight.clone().requires_grad_()
        encoded = torch.tanh(torch.cat(seen) @ ours) if seen else torch.zeros(0, WIDTH, dtype=torch.float64)
        before = fabric.sent
        x = place_frames(encoded, own, deal, how)
        sent = fabric.sent - before
        leaf = x.detach().requires_grad_()
        out = attend(*[leaf.unsqueeze(2)] * 3, how).squeeze(2)
        out.backward(shard(dout, how))
        before = fabric.sent
        x.backward(leaf.grad)
        return deal, out.detach(), (own.grad, ours.grad, *(x.grad for x in seen)), sent, fabric.sent - before

    parts = in_process(ranks, body)
    expected = dense(*whole)
    found = [torch.zeros_like(each) for each in expected]
    split = found[1].split(tokens) if tokens else []
    for rank, (deal, out, (own, shared, *seen), sent, back) in enumerate(parts):
        mine = torch.tensor(indices(choices.get("layout", "zigzag"), seq, ranks, rank))
        found[0][mine], found[2][mine] = out, own
        for frame, grad in zip(deal.mine, seen, strict=True):
            split[frame].copy_(grad)
        # the ranks share the encoder's weight, which one without frames does not use
        found[3] += 0 if shared is None else shared
        assert (sent, back) == (8 * WIDTH * deal.sent[rank], 8 * WIDTH * deal.received[rank])
    for name, ours, theirs in zip(("out", "dpixels", "dtext", "dweight"), found, expected, strict=True):
        assert relative_error(ours, theirs) <= EXACT if theirs.numel() and theirs.any() else not ours.any(), name


@pytest.mark.parametrize(("ranks", "frames"), [*((ranks, 11) for ranks in range(1, 9)), (3, 0), (4, 1), (5, 3)])
def test_frames_that_are_dealt_equal_one_rank(ranks, frames):
    assert_equals_one_rank(ranks, frames, seq=2 * ranks * -(-24 // (2 * ranks)), patches=ranks % 2 > 0)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_frames_go_to_every_layout(layout):
    assert_equals_one_rank(3, 9, seq=24, layout=layout, backend="all-gather" if layout == "contiguous" else "zigzag")


def test_frames_and_heads_on_a_grid_equal_one_rank():
    """USP behind the encoder, as in LongVILA: heads for tokens inside, a ring outside."""
    whole = batch_of(24, 7)
    tokens, places, pixels, text, dout, weight = whole

    def body(fabric):
        inner, outer = (
            fabric.subset([fabric.rank // 2 * 2, fabric.rank // 2 * 2 + 1]),
            fabric.subset([fabric.rank % 2, fabric.rank % 2 + 2]),
        )
        how = plan("usp", cp=fabric, inner=inner, outer=outer, kernel="reference")
        deal = deal_frames(how, tokens, places, seq=24, batch=BATCH)
        seen = [pixels[frame].clone().requires_grad_() for frame in deal.mine]
        own, ours = shard(text, how).requires_grad_(), weight.clone().requires_grad_()
        x = place_frames(torch.tanh(torch.cat(seen) @ ours), own, deal, how)
        # two heads, as many as the inner axis has ranks; each has half of the gradient of one
        out = attend(*[x.unsqueeze(2).repeat(1, 1, 2, 1)] * 3, how)
        grads = torch.autograd.grad(out, (own, ours, *seen), shard(dout, how).unsqueeze(2).repeat(1, 1, 2, 1) / 2)
        return torch.tensor(indices("zigzag", 24, 4, fabric.rank)), deal.mine, out.detach(), grads

    expected, dpixels, dtext, dweight = dense(*whole)
    dpixels, found = dpixels.split(tokens), torch.zeros_like(dweight)
    for mine, frames, out, (own, ours, *seen) in in_process(4, body):
        assert relative_error(out, expected[mine].unsqueeze(2).repeat(1, 1, 2, 1)) <= EXACT
        assert relative_error(own, dtext[mine]) <= EXACT
        for frame, grad in zip(frames, seen, strict=True):
            assert relative_error(grad, dpixels[frame]) <= EXACT
        found += ours
    # the ranks share the encoder's weight
    assert relative_error(found, dweight) <= EXACT


def test_a_frame_shown_often_has_the_sum_of_its_gradients_rounded_once():
    count = 40

    def body(fabric):
        how = plan("zigzag", cp=fabric, layout="contiguous", causal=False)
        deal = deal_frames(how, [1, 2], [(0, at) for at in range(count)] + [(1, 44)], seq=48)
        encoded = torch.zeros(deal.rows, 1, dtype=torch.bfloat16, requires_grad=True)
        x = place_frames(encoded, torch.zeros(24, 1, 1, dtype=torch.bfloat16), deal, how)
        (x.squeeze() * shard(1 + torch.arange(48) % 2 / 128, how).bfloat16()).sum().backward()
        return encoded.grad.squeeze(1).tolist()

    # in bfloat16 the sum would stop growing by these parts
    exact = torch.tensor(count + count / 2 / 128).bfloat16().item()
    assert in_process(2, body) == [[exact], [1.0, 1 + 1 / 128]]


def test_gradients_of_one_rank_go_home_whatever_the_others_want():
    def body(fabric):
        how = plan("zigzag", cp=fabric)
        deal = deal_frames(how, [2], [(0, 1)], seq=8)
        encoded = torch.ones(deal.rows, 3, requires_grad=bool(deal.mine))
        place_frames(encoded, torch.zeros(4, 1, 3), deal, how).sum().backward()
        return encoded.grad

    assert [grad is None or torch.equal(grad, torch.ones(2, 3)) for grad in in_process(2, body)] == [True, True]


@pytest.mark.parametrize("ranks", [1, 2, 3, 5, 8])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_tokens_come_with_all_that_belongs_to_them(layout, ranks):
    """Embeddings, labels, masks and segment ids of unlike numbers of tokens, in one all-to-all each way."""
    seq = 4 * ranks
    total = BATCH * seq
    torch.manual_seed(ranks)
    embeddings, dout = torch.randn(2, total, 3, dtype=torch.float64)
    labels, mask = torch.arange(total), torch.arange(total) % 3 > 0
    segments = (torch.arange(total) // 5).to(torch.int32)[:, None]
    # stretches of unlike lengths, the first ones with the last rank; where ranks want no stripes, each in two strides
    ends = [0, *[total * (rank + 1) ** 2 // ranks**2 for rank in range(ranks)]]
    step = 1 if layout == STRIPED else 2
    held = [[range(one + at, two, step) for at in range(step)] for one, two in pairwise(ends)][::-1]

    def body(fabric):
        how = plan("zigzag", cp=fabric, layout=layout)
        brought = torch.tensor([place for run in held[fabric.rank] for place in run])
        own = embeddings[brought].requires_grad_()
        before = fabric.sent
        arrived = redeal([own, labels[brought], mask[brought], segments[brought]], held, how, batch=BATCH)
        sent = fabric.sent - before
        wanted = [
            shard(x.unflatten(0, (BATCH, seq)).transpose(0, 1), how) for x in (embeddings, labels, mask, segments)
        ]
        assert all(torch.equal(one, two) and one.dtype == two.dtype for one, two in zip(arrived, wanted, strict=True))
        arrived[0].backward(shard(dout.unflatten(0, (BATCH, seq)).transpose(0, 1), how))
        assert torch.equal(own.grad, dout[brought])
        stay = set(shard(torch.arange(total).view(BATCH, seq).T, how).flatten().tolist()) & set(brought.tolist())
        # 8 bytes of each number and label, 1 of a mask, 4 of a segment id
        assert sent == (len(brought) - len(stay)) * (3 * 8 + 8 + 1 + 4)
        return sent

    assert len(in_process(ranks, body)) == ranks


def test_a_batch_cut_by_its_documents_gets_its_frames():
    packed = documents([0, 5, 23, 32])
    packed = packed.cut_by(packed.planned("blocks", 2))

    def body(fabric):
        how = plan("all-gather", cp=fabric, document_layout="blocks")
        deal = deal_frames(how, [7, 3], [(0, 2), (1, 20)], seq=32, documents=packed)
        encoded = torch.tensor([float(10 * frame + at) for frame in deal.mine for at in range([7, 3][frame])])[:, None]
        mine = [position for run in packed.layout[fabric.rank] for position in run]
        x = place_frames(encoded, torch.full((16, 1, 1), -1.0), deal, how)
        assert torch.equal(frame_tokens(deal).squeeze(), x.squeeze() >= 0)
        return zip(mine, x.flatten().tolist(), strict=True)

    found = dict(pair for part in in_process(2, body) for pair in part)
    places = {2 + at: float(at) for at in range(7)} | {20 + at: 10.0 + at for at in range(3)}
    assert found == {position: places.get(position, -1.0) for position in range(32)}


def test_frames_are_dealt_evenly():
    assert shares(10, 4) == ((0, 1), (2, 3, 4), (5, 6), (7, 8, 9))
    assert shares(2, 4) == ((), (0,), (), (1,))
    assert shares(0, 2) == ((), ())
    assert shares(5, 2, [1, 9, 4, 4, 1]) == ((1, 4), (0, 2, 3))
    patches = [1 + 37 * frame % 50 for frame in range(100)]
    loads = [sum(patches[frame] for frame in mine) for mine in shares(100, 8, patches)]
    assert max(loads) * 8 / sum(patches) < 1.02


def test_places_are_found_by_placeholders():
    ids = torch.tensor([[1, -2, -2, -2, 5, 6], [-2, -2, 9, 9, -2, 9]])
    assert find_frames(ids, -2, [2, 1, 2, 1]) == [(0, 1, 0), (1, 3, 0), (2, 0, 1), (3, 4, 1)]
    assert find_frames(ids, 4, []) == []
    with pytest.raises(ValueError, match="2 frames have 7 embeddings, and the ids 6 placeholders of -2; repeat"):
        find_frames(ids, -2, [3, 4])
    with pytest.raises(
        ValueError, match="frame 1 of 3 embeddings is cut in two behind position 0 of row 1: no rank can"
    ):
        find_frames(ids, -2, [3, 3])


@pytest.mark.parametrize(
    ("choices", "message"),
    [
        (
            {"places": [(0, 6)]},
            "frame 0 has 3 tokens from position 6 on of a sequence of 8, and no rank can take those",
        ),
        ({"places": [(0, -1)]}, "frame 0 has 3 tokens from position -1 on of a sequence of 8, and no rank can take"),
        ({"places": [(0, 1, 1)]}, "names a frame below 1 and a row below 1, got frame 0 in row 1"),
        ({"places": []}, "frame 0 has no place in the batch, and no rank can take it; leave it out"),
        (
            {"tokens": [3, 2], "places": [(1, 3), (0, 1)]},
            "frames 0 and 1 both stand at position 3 of row 0; frame 0 takes",
        ),
        (
            {"patches": [900], "most": 256},
            "frame 0 has 900 patches, and no rank takes more than 256; make frames smaller",
        ),
        (
            {"tokens": [1] * 5, "places": [(frame, frame) for frame in range(5)], "most": 2},
            "5 frames of 5 frames give one of 2 ranks 3, and no rank takes more than 2; use more ranks",
        ),
        ({"tokens": [0]}, "tokens must be a whole number of 1 or more for each frame, got 0"),
        ({"patches": [1, 1]}, "patches must be one number for each of 1 frames, got 2"),
        (
            {"places": [(0, 1, 0, 0)]},
            r"a place is \(frame, position\) or \(frame, position, row\) in whole numbers, got",
        ),
        ({"seq": 9}, "layout 'zigzag' needs S divisible by 2"),
        ({"batch": 0}, "batch must be a whole number of 1 or more, got 0"),
        ({"documents": documents([0, 6])}, "documents of 6 tokens do not fill a sequence of 8"),
    ],
)
def test_images_that_no_rank_can_take_are_refused(choices, message):
    def body(fabric):
        given = {"tokens": [3], "places": [(0, 1)], "seq": 8, **choices}
        with pytest.raises(ValueError, match=message) as refused:
            deal_frames(plan("zigzag", cp=fabric), given.pop("tokens"), given.pop("places"), **given)
        assert "\n" not in str(refused.value)
        return fabric.sent

    assert in_process(2, body) == [0, 0]


def on_last(rank, value, other):
    return value if rank == 1 else other


UNLIKE = {
    "rows": (
        lambda rank, how, deal: place_frames(torch.ones(on_last(rank, 2, 1), 4), torch.ones(4, 1, 4), deal, how),
        "rank 1: encoded must hold the 1 embeddings of this rank's 1 frames, got 2; encode the frames `deal.mine`",
    ),
    "dtype": (
        lambda rank, how, deal: place_frames(torch.ones(1, 4).double(), torch.ones(4, 1, 4), deal, how),
        "must have one width, dtype and device, got 4 torch.float64 on cpu and 4 torch.float32 on cpu",
    ),
    "width": (
        lambda rank, how, deal: place_frames(torch.ones(1, 4 + rank), torch.ones(4, 1, 4 + rank), deal, how),
        "tensors of one shape",
    ),
    "text": (
        lambda rank, how, deal: place_frames(torch.ones(1, 4), torch.ones(3, 1, 4), deal, how),
        "text must hold this rank's 4 tokens of 1 sequences",
    ),
    "another deal": (
        lambda rank, how, deal: place_frames(
            torch.ones(1, 4), torch.ones(4, 1, 4), deal_frames(how, [1, 1], [(0, rank), (1, 4)], seq=8), how
        ),
        "all ranks must attend by one plan, got rank 0",
    ),
    "another plan": (
        lambda rank, how, deal: place_frames(torch.ones(1, 4), torch.ones(4, 1, 4), deal, plan("zigzag")),
        "frames were dealt to rank",
    ),
    "places": (
        lambda rank, how, deal: redeal([torch.ones(4)], [[range(4)], [range(4, 8)]][:: 1 - 2 * rank], how),
        "all ranks must",
    ),
    "twice": (
        lambda rank, how, deal: redeal([torch.ones(4)], [[range(4)], [range(3, 7)]], how),
        "held has 8 places, but position 7 of row 0 is with no rank and another with two",
    ),
    "tokens": (
        lambda rank, how, deal: redeal([torch.ones(3)], [[range(4)], [range(4, 8)]], how),
        "tensor 0 must have the 4 tokens that this rank holds first, got (3,)",
    ),
    "nothing": (lambda rank, how, deal: redeal([], [[range(4)], [range(4, 8)]], how), "tensors must hold one"),
}


def test_what_does_not_fit_is_refused_by_all_before_anything_is_sent():
    def body(fabric):
        found = {}
        for name, (call, _) in UNLIKE.items():
            how = plan("zigzag", cp=fabric)
            deal = deal_frames(how, [1, 1], [(0, 1), (1, 4)], seq=8)
            with pytest.raises(ValueError, match=r"\w") as refused:
                call(fabric.rank, how, deal)
            found[name] = str(refused.value)
        return found, fabric.sent

    (first, sent), (second, _) = in_process(2, body)
    assert sent == 0
    for name, (_, text) in UNLIKE.items():
        assert text in first[name], (name, first[name])
        assert "\n" not in first[name] + second[name]


def test_places_are_tuples_with_names():
    assert FramePlace(3, 4) == (3, 4, 0)


def test_strides_that_cross_stripes_are_refused():
    held = [[range(0, 3, 2), range(1, 2)], [range(3, 6)], []]

    def body(fabric):
        tokens = torch.ones(sum(map(len, held[fabric.rank])))
        with pytest.raises(
            ValueError, match="ranks want places of step 3, got ranges of step 2 that they hold; give each"
        ):
            redeal([tokens], held, plan("zigzag", cp=fabric, layout="striped"))
        return fabric.sent

    assert in_process(3, body) == [0, 0, 0]
