"""Which groups are generated and trained when: a pure state machine without socket, thread, file or clock."""
