"""PyTorch: one front (``autograd``) over two engines (``cpu``, ``cuda``)."""
