"""What runs in training: the recurrence, its backward pass, a second evaluation that leaves no trace."""
