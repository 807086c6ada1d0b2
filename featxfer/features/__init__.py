"""A frozen backbone's features of whole sets of images."""
