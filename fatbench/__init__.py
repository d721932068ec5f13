"""fatbench: adversarial-training defenses, trained by one loop and examined under one protocol."""

__version__ = "0.1.0"
