"""`megatron-cp data`: corpora for training."""

import typer

app = typer.Typer(no_args_is_help=True, help=__doc__)


@app.callback()
def data() -> None:
    """Build and inspect corpora in Megatron's .bin/.idx format."""
