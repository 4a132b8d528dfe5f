"""Pretrain a GPT with only PyPI's megatron-core: `torchrun -m megatron_cp.pretrain_gpt FLAGS`."""

from megatron_cp.quiet import without_import_warnings

if __name__ == "__main__":
    without_import_warnings()
    from megatron_cp.megatron.process.ending import ended_together
    from megatron_cp.megatron.process.pretrain import main

    with ended_together():
        main()
