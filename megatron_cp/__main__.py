from megatron_cp.cli import main

main()
