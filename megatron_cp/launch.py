"""Run an unmodified Megatron script with our features: `torchrun … -m megatron_cp.launch pretrain_gpt.py FLAGS`."""

from megatron_cp.quiet import without_import_warnings

if __name__ == "__main__":
    without_import_warnings()
    from megatron_cp.megatron.process.ending import ended_together
    from megatron_cp.megatron.process.launch import main

    with ended_together():
        main()
