"""What acts on features and maps: the head, the block, and how they are saved."""
