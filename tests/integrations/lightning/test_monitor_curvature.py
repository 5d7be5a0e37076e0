"""GradientMonitor(curvature=): the Hessian's numbers along a fit, which stays as it is."""

import math

import torch

import gradwatch
from gradwatch_lightning import GradientMonitor


def test_curvature_along_a_fit(kit):
    """Steps 1 and 3 have the numbers of gradwatch.curvature(), and the weights are those without."""
    batch = next(iter(kit.loader(1)))
    every = gradwatch.CurvatureEvery(2, lambda net: net.loss(batch), tolerance=1e-4)
    monitor, net, plain = GradientMonitor(curvature=every), kit.Net(), kit.Net()

    kit.trainer(monitor).fit(net, kit.loader(3))
    kit.trainer().fit(plain, kit.loader(3))

    assert all(map(torch.equal, net.parameters(), plain.parameters()))
    steps = monitor.history.steps()
    assert [math.isnan(value) for value in steps.hessian_trace] == [False, True, False]
    now = gradwatch.curvature(net, lambda: net.loss(batch))
    assert math.isclose(steps.hessian_eigenvalue[3], now.largest_eigenvalue, rel_tol=1e-3)
