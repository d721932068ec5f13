"""`python -m fatbench`, and what torchrun starts."""

from fatbench.cli import main

if __name__ == "__main__":
    main()
