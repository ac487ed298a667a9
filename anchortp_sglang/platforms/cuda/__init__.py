"""The platform of GPUs: environment, moves, graphs, health. Tried on one H100 for minutes only: see docs/cuda.md."""
