"""Tested building blocks for PyTorch training and inference, each file copyable alone."""
