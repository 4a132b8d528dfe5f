"""Draw measurements and simulations."""
