"""On-policy training with verifiable rewards, a thin user of fastdiv's public functions.

Needs ``fastdiv[train]``.
Importing this package is cheap; ``fastdiv.training.loop.train(config)`` is the trainer, ``fastdiv train`` its
command line.
"""
