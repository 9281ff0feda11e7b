"""PPO with actor processes on games: a trainer of its own, which knows nothing of pi0 or LIBERO (docs/parallel.md)."""
