"""The learner's side of the control socket: workers, leases, groups, evaluations, and the processes it starts.

What each message does, and what becomes of a worker that is lost: ``handlers``.
"""
