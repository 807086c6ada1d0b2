"""Figures: average precision, SVMs, pairs of views, the VOC devkit."""
