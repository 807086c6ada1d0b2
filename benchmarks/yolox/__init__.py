"""What transfer gives back to a detector that nobody here trained: YOLOX-nano."""
