"""What workers and learner say to each other, and how it travels: messages, sockets, encryption, keys, addresses."""
