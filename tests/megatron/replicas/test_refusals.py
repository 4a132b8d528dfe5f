"""What --local-sgd-steps cannot do is refused in one line, with a way out."""

from types import SimpleNamespace

import pytest

from megatron_cp.megatron.arguments.replicas import check_local_sgd, complete_local_sgd

RUN = {
    "local_sgd_steps": "4",
    "local_sgd_outer": "average",
    "local_sgd_outer_lr": None,
    "local_sgd_outer_momentum": None,
    "use_distributed_optimizer": True,
    "num_distributed_optimizer_instances": 2,
    "data_parallel_size": 4,
    "train_iters": 16,
    "eval_interval": 1000,
    "eval_iters": 0,
}

SAVED = {"local_sgd_outer": "nesterov", "save": "here", "save_interval": 4, "ckpt_format": "torch_dist"}


def check(**given: object) -> None:
    check_local_sgd(SimpleNamespace(**{**RUN, **given}))


@pytest.mark.parametrize(
    "given",
    [
        {},
        {"local_sgd_steps": "16", "save": "here", "save_interval": 16},
        {"local_sgd_steps": "1:1,9:8", "save": "here", "save_interval": 8, "eval_interval": 8, "eval_iters": 1},
        # never reached
        {"save_interval": 3, "eval_interval": 3},
        {"local_sgd_outer": "diloco", "local_sgd_outer_lr": 1.0, "local_sgd_outer_momentum": 0.0},
        {"pp_schedule": "zb-h1", "bf16": True},
        SAVED,
        {"local_sgd_steps": None, "fp16": True, "num_distributed_optimizer_instances": 1},
    ],
)
def test_what_works_is_taken(given: dict[str, object]) -> None:
    check(**given)


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"num_distributed_optimizer_instances": 1}, "pass --use-distributed-optimizer and --num-dist.* got 1"),
        ({"use_distributed_optimizer": False}, "needs islands"),
        ({"num_distributed_optimizer_instances": 8}, "8 must divide the data-parallel size 4"),
        ({"fp16": True}, "--local-sgd-steps 4 does not do loss scales.*; pass --bf16"),
        ({"calculate_per_token_loss": True}, "leave --calculate-per-token-loss out"),
        ({"num_experts": 8}, "leave --num-experts out"),
        ({"use_megatron_fsdp": True}, "use --use-distributed-optimizer"),
        ({"optimizer": "sgd"}, "pass --optimizer adam"),
        ({"optimizer_cpu_offload": True}, "leave .*--optimizer-cpu-offload"),
        ({"overlap_param_gather_with_optimizer_step": True}, "leave --overlap-param-gather-with-optimizer-step out"),
        ({"optimizer_cuda_graph": True}, "leave --optimizer-cuda-graph out"),
        ({"pp_schedule": "2bw"}, "take another --pp-schedule"),
        ({"exit_signal_handler": True}, "leave --exit-signal-handler"),
        ({"exit_duration_in_mins": 5}, "leave --exit-signal-handler and --exit-duration-in-mins out"),
        ({"iterations_to_skip": [3]}, "leave --iterations-to-skip out"),
        ({"train_samples": 64}, "pass --train-iters"),
        ({"log_params_norm": True}, "leave --log-params-norm out"),
        ({"train_iters": 18}, "--train-iters 18 is no sync; train for 20 steps"),
        ({"save": "here", "save_interval": 6}, "--save-interval 6 reads them at step 6; the next sync is at 8"),
        ({"eval_interval": 6, "eval_iters": 1}, "--eval-interval 6 reads them at step 6"),
        ({"exit_interval": 3}, "--exit-interval 3 reads them at step 3; the next sync is at 4"),
        ({"local_sgd_steps": "0"}, "at least one step between two syncs"),
        ({"local_sgd_outer": "nesterow"}, "unknown outer optimizer 'nesterow'; did you mean 'nesterov'"),
        ({"local_sgd_spread": 0.0}, "--local-sgd-spread is more than 0, got 0.0"),
        ({"local_sgd_steps": None, "local_sgd_spread": 0.1}, "--local-sgd-spread 0.1 is of islands"),
        ({"local_sgd_outer_lr": 0.7}, "takes the mean, without --local-sgd-outer-lr"),
        ({"local_sgd_outer": "nesterov", "local_sgd_outer_lr": 0.0}, "-lr is more than 0, got 0.0"),
        ({"local_sgd_outer": "nesterov", "local_sgd_outer_momentum": 1.0}, "less than 1, got 1.0"),
        ({**SAVED, "ckpt_format": "torch"}, "with --save does not do checkpoints.*; pass --ckpt-format torch_dist"),
        ({**SAVED, "dist_ckpt_optim_fully_reshardable": True}, "leave --dist-ckpt-optim-fully-reshardable out"),
        ({**SAVED, "non_persistent_ckpt_type": "local"}, "leave --non-persistent-ckpt-type local out"),
        ({"local_sgd_steps": None, "local_sgd_outer": "nesterov"}, "--local-sgd-outer nesterov is of islands"),
        ({"local_sgd_steps": None, "local_sgd_outer_lr": 0.5}, "--local-sgd-outer-lr 0.5 is of islands"),
    ],
)
def test_what_does_not_is_refused_in_one_line(given: dict[str, object], says: str) -> None:
    with pytest.raises(ValueError, match=says) as error:
        check(**given)
    assert "\n" not in str(error.value)


def test_no_step_meets_all_ranks_that_need_not(capsys: pytest.CaptureFixture[str]) -> None:
    args = SimpleNamespace(**RUN, rerun_mode="validate_results", log_interval=1)
    complete_local_sgd(args)
    assert args.rerun_mode == "disabled"
    assert "--rerun-mode disabled" in capsys.readouterr().out
    args = SimpleNamespace(**{**RUN, "local_sgd_steps": None}, rerun_mode="validate_results")
    complete_local_sgd(args)
    assert args.rerun_mode == "validate_results"
