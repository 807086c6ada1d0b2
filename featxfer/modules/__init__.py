"""What acts on features and maps: the head, the block, and how they are saved."""

from featxfer.modules import block, head

__all__ = ["block", "head"]  # their classes are found by what is saved
