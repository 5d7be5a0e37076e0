"""curvature(): eigenvalues and trace of the Hessian, from Hessian-vector products."""
