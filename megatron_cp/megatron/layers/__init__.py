"""Layer specs and the attention module inside Megatron's layers."""
