"""All that hooks into PyTorch: parameters, modules, optimizers, scalers and data parallelism."""
