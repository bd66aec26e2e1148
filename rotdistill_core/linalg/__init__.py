"""Linear algebra: second moments, closed-form solvers, and maps between spaces."""
