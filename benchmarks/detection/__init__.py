"""What transfer gives back to a detector that was trained on HR images and meets LR ones."""
