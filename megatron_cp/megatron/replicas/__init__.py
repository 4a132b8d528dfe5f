"""Islands of replicas in Megatron: instances of its distributed optimizer that train apart."""
