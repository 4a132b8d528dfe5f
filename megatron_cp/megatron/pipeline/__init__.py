"""Pipeline schedules inside Megatron's training step."""
