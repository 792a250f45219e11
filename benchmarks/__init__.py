"""Benchmarks of every operator against eager torch and torch.compile: `fastdiv bench`."""
