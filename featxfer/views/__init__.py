"""Images, and the HR and LR views that are made of them."""
