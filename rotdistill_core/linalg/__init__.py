"""Linear algebra: second moments, solvers, and maps between spaces."""
