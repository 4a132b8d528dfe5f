"""A model of frames and text on two processes: torchrun --nproc-per-node 2 docs/examples/frames.py"""

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from megatron_cp import attend, plan, shard
from megatron_cp.comm import SingleFabric
from megatron_cp.context.plan import Plan
from megatron_cp.context.redeal import deal_frames, find_frames, place_frames

FRAME, VOCABULARY, WIDTH, HEADS, STEPS = -1, 32, 16, 2, 4
TOKENS, EMBEDDINGS = 32, [4, 4, 4]
"""Tokens of a sequence, and embeddings of each of the frames that it shows."""


class TwoTowers(nn.Module):
    """An encoder of frames, and one layer of a language model."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Sequential(nn.Linear(12, WIDTH), nn.GELU(), nn.Linear(WIDTH, WIDTH))
        self.embedding = nn.Embedding(VOCABULARY, WIDTH)
        self.qkv, self.head = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, VOCABULARY)

    def forward(self, frames: Tensor, ids: Tensor, how: Plan) -> Tensor:
        """Return logits s b v of this rank's tokens; frames f e p are all of the batch, ids b S whole sequences."""
        places = find_frames(ids, FRAME, EMBEDDINGS)
        deal = deal_frames(how, EMBEDDINGS, places, seq=ids.shape[1], batch=ids.shape[0])
        # only the frames of this rank go through the encoder
        encoded = self.encoder(frames[list(deal.mine)]).flatten(0, 1)
        text = self.embedding(shard(ids.T, how).clamp(0))
        x = place_frames(encoded, text, deal, how)
        q, k, v = self.qkv(x).unflatten(2, (3, HEADS, -1)).unbind(2)
        return self.head(x + attend(q, k, v, how).flatten(2))


def train(how: Plan) -> list[float]:
    """Return the loss of each step, on all ranks of the plan."""
    torch.manual_seed(1)
    model = TwoTowers()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    losses = []
    for step in range(STEPS):
        torch.manual_seed(step)
        frames, ids = torch.randn(len(EMBEDDINGS), EMBEDDINGS[0], 12), torch.randint(VOCABULARY, (1, TOKENS + 1))
        ids[0, 2:6] = ids[0, 9:13] = ids[0, 13:17] = FRAME
        logits, labels = model(frames, ids[:, :-1], how), shard(ids[:, 1:].T, how)
        # the ranks' losses are sums, over the text tokens of the whole batch
        count = int((ids[:, 1:] != FRAME).sum())
        loss = cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=FRAME, reduction="sum") / count
        optimizer.zero_grad()
        loss.backward()
        losses.append(total(loss.detach(), how))
        for weight in model.parameters():
            weight.grad = total(weight.grad, how)
        optimizer.step()
    return [float(loss) for loss in losses]


def total(part: Tensor, how: Plan) -> Tensor:
    """Return the sum over the ranks of the plan."""
    return how.cp.all_gather(part[None]).sum((0, 1))


def main() -> None:
    dist.init_process_group("gloo")
    ours = train(plan("zigzag", cp=dist.group.WORLD))
    alone = train(plan("zigzag", cp=SingleFabric()))
    torch.testing.assert_close(torch.tensor(ours), torch.tensor(alone))
    print(f"rank {dist.get_rank()}: losses {', '.join(f'{loss:.4f}' for loss in ours)}, as on one rank")


if __name__ == "__main__":
    main()
    dist.destroy_process_group()
