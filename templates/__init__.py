"""Tested building blocks for PyTorch training and inference, each copyable alone."""
