"""Long sequences in a model of transformers: torchrun --nproc-per-node 2 docs/examples/hugging_face.py"""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import AttentionInterface, LlamaConfig, LlamaForCausalLM

from megatron_cp import attend, plan, positions, shard
from megatron_cp.context.plan import Plan

TOKENS, VOCABULARY, STEPS = 64, 128, 5


def use(how: Plan) -> None:
    """Let every model with attn_implementation="megatron-cp" attend by this plan."""

    def attention(
        module: torch.nn.Module, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, **more: Any
    ) -> tuple[Tensor, None]:
        # the plan has the mask, the window and the scale; beyond it nothing is taken
        assert mask is None
        assert not more.get("dropout")
        assert not more.get("sliding_window")
        assert more["scaling"] == q.shape[-1] ** -0.5
        out = attend(*(x.permute(2, 0, 1, 3) for x in (q, k, v)), how)  # b h s d -> s b h d
        return out.transpose(0, 1), None

    AttentionInterface.register("megatron-cp", attention)


def tiny(attention: str) -> LlamaForCausalLM:
    torch.manual_seed(1)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        attn_implementation=attention,
        use_cache=False,
    )
    return LlamaForCausalLM(config)


def step(
    model: LlamaForCausalLM, optimizer: torch.optim.Optimizer, tokens: Tensor, labels: Tensor, at: Tensor
) -> Tensor:
    """Train on this rank's tokens [s], which stand at these positions; return the mean loss of its tokens."""
    logits = model(input_ids=tokens[None], position_ids=at[None]).logits[0]
    # not the model's own loss, which takes the next token of a rank for the next one of the sequence
    loss = cross_entropy(logits, labels)
    optimizer.zero_grad()
    loss.backward()
    if dist.get_world_size() > 1:
        for weight in model.parameters():
            assert weight.grad is not None
            dist.all_reduce(weight.grad)
            weight.grad /= dist.get_world_size()
    optimizer.step()
    return loss.detach()


def main() -> None:
    dist.init_process_group("gloo")
    how = plan("zigzag", cp=dist.group.WORLD, causal=True)
    use(how)

    model = tiny("megatron-cp")
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    sequence = torch.randint(VOCABULARY, (TOKENS + 1,), generator=torch.Generator().manual_seed(2))
    tokens, labels = sequence[:-1], sequence[1:]
    losses = []
    for _ in range(STEPS):
        loss = step(model, optimizer, shard(tokens, how), shard(labels, how), positions(how, TOKENS))
        dist.all_reduce(loss)
        losses.append(loss.item() / dist.get_world_size())

    # the same model on one process, with the whole sequence and torch's attention
    alone = tiny("sdpa")
    optimizer = torch.optim.AdamW(alone.parameters(), lr=1e-2)
    expected = []
    for _ in range(STEPS):
        loss = cross_entropy(alone(input_ids=tokens[None]).logits[0], labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        expected.append(loss.item())
    torch.testing.assert_close(torch.tensor(losses), torch.tensor(expected), rtol=1e-4, atol=0)
    assert how.sent > 0
    print(f"rank {dist.get_rank()}: loss {losses[0]:.4f} to {losses[-1]:.4f}, {how.sent:,} bytes sent")


if __name__ == "__main__":
    main()
    dist.destroy_process_group()
