"""Pretrain a GPT with only PyPI's megatron-core: `torchrun -m megatron_cp.pretrain_gpt FLAGS`."""

from megatron_cp.megatron.pretrain import main

if __name__ == "__main__":
    main()
