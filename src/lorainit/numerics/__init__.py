"""Mathematics without a model: products and norms, iterative solvers, sketches, seeded streams."""
