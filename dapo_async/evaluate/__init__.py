"""Workers answering prompts without a learner that trains: ``dapo-async eval`` and ``check --parity``."""
