"""Whether an answer is right: built-in checks, math-verify, a user's function in child processes."""
