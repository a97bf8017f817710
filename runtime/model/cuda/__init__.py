"""The network on device tensors: attention through the ops of `weft.kernels.gpu`, the rest in torch.

On CPU tensors the same code runs through the ops' references, or Triton's interpreter: that is how it is tested
without a GPU.
"""
