"""How weights get from the learner into workers: publishing, ways, deltas, shared memory, subscribing."""
