"""GPU code. ``step``, ``cuda/`` and ``nvrtc``: the streaming step as one CUDA kernel. The rest are
Triton kernels for training; ``launch`` says which problems fit them and how they are launched."""
