"""atlas: post-training of small language models, a thin layer on TRL. See docs/ for the guide."""

__version__ = "0.1.0"
