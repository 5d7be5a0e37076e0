"""Black-box suites for the public contract: `import gradwatch`, PyTorch and a float64 reference, nothing private."""
