"""Rollout workers: the processes that generate. They never import the learner."""
