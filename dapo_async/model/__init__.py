"""The policy in the learner: loading and checking it, microbatches, log-probs of completions."""
