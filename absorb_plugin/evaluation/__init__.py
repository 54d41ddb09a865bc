"""What a pruned model is worth, and how the command line makes one."""
