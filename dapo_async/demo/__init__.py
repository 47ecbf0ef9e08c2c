"""A task, data and a warm-started model made on the spot, so that nothing must be downloaded."""
