"""What hangs on PyTorch while a run is watched: on parameters, modules, optimizers, ranks."""
