"""The learner's side of the control socket: workers, leases, groups, evaluations, and the processes it starts."""
