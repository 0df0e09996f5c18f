"""NVIDIA GPUs: one CUDA source and what CuPy and PyTorch share around it."""
