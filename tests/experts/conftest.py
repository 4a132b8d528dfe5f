from tests.context.conftest import nan_in_empty_tensors

__all__ = ["nan_in_empty_tensors"]
