"""Pictures from what was measured."""
