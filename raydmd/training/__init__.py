"""What a role does in a process, without Ray: its state, its updates, and the sequential executor."""
