"""What a teacher says, wherever it is from."""
