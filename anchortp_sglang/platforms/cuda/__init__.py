"""What is different on GPUs: environment, moves, graphs, health. None of it has run on one yet: docs/cuda.md."""
