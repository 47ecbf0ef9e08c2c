"""The schedule in virtual time, and plans for real runs made with it."""
