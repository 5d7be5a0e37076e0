"""curvature(): eigenvalues and trace of the Hessian, from products with vectors."""
