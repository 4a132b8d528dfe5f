"""Train a HybridModel by upstream's public calls, with the data and the step of the package; run by the launcher."""

from megatron.core.enums import ModelType
from megatron.training import pretrain
from megatron.training.argument_utils import hybrid_config_from_args, pretrain_cfg_container_from_args
from megatron.training.arguments import parse_and_validate_args

from megatron_cp.megatron.process.pretrain import datasets, forward_step

if __name__ == "__main__":
    args = parse_and_validate_args()
    container = pretrain_cfg_container_from_args(args, hybrid_config_from_args(args))
    pretrain(container, datasets, ModelType.encoder_or_decoder, forward_step)
