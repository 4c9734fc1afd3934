"""Options in, one ready-to-run training script out; never imports torch."""

__version__ = "0.1.0"
