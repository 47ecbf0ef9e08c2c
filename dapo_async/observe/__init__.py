"""What people see of a run: metrics, terminal, the files that a run leaves in its folder."""
