"""Options in, one ready-to-run training script out; never imports torch."""

__version__ = "0.2.0"
