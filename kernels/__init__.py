"""Triton kernels, one module an op, named after it. Installed as ``ssm_fast.kernels``."""
