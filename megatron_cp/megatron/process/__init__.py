"""The process of one rank: launch, train, stop."""
